"""How a token is stored: dense, quantised, rotated, low rank, sparse, and their combinations."""

from kvjax.codecs.affine import Quantize, quantize
from kvjax.codecs.base import Code, Codec, Constants
from kvjax.codecs.bitmap import Sparse, sparse
from kvjax.codecs.coarse import (
    Fourier,
    Signs,
    SplitChannels,
    Ternary,
    fourier,
    signs,
    split_channels,
    ternary,
)
from kvjax.codecs.codebook import Codebook, codebook, gaussian_levels
from kvjax.codecs.combine import (
    Compose,
    Residual,
    WithOutliers,
    compose,
    residual,
    with_outliers,
)
from kvjax.codecs.dense import Dense, dense
from kvjax.codecs.heads import (
    AcrossHeads,
    PermuteHeads,
    RotateHeads,
    across_heads,
    apart,
    joins_heads,
    permute_heads,
    rotate_heads,
)
from kvjax.codecs.levels import Levels, Normalize, levels, normalize
from kvjax.codecs.lowrank import LowRank, low_rank
from kvjax.codecs.packing import pack, quantum, unpack
from kvjax.codecs.pair import PerKV, as_pair, per_kv
from kvjax.codecs.projections import MergeHeads, ProjectHeads, merge_heads, project_heads
from kvjax.codecs.sparse import Outliers, outliers
from kvjax.codecs.transform import (
    Balance,
    Projection,
    Rotate,
    Transform,
    balance,
    hadamard,
    projection,
    rotate,
    walsh_hadamard,
)

__all__ = [
    "AcrossHeads",
    "Balance",
    "Code",
    "Codebook",
    "Codec",
    "Compose",
    "Constants",
    "Dense",
    "Fourier",
    "Levels",
    "LowRank",
    "MergeHeads",
    "Normalize",
    "Outliers",
    "PerKV",
    "PermuteHeads",
    "ProjectHeads",
    "Projection",
    "Quantize",
    "Residual",
    "Rotate",
    "RotateHeads",
    "Signs",
    "Sparse",
    "SplitChannels",
    "Ternary",
    "Transform",
    "WithOutliers",
    "across_heads",
    "apart",
    "as_pair",
    "balance",
    "codebook",
    "compose",
    "dense",
    "fourier",
    "gaussian_levels",
    "hadamard",
    "joins_heads",
    "levels",
    "low_rank",
    "merge_heads",
    "normalize",
    "outliers",
    "pack",
    "per_kv",
    "permute_heads",
    "project_heads",
    "projection",
    "quantize",
    "quantum",
    "residual",
    "rotate",
    "rotate_heads",
    "signs",
    "sparse",
    "split_channels",
    "ternary",
    "unpack",
    "walsh_hadamard",
    "with_outliers",
]
