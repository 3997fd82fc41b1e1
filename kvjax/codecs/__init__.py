"""How a token is stored: dense, quantised, rotated, low rank, sparse, and their combinations."""

from kvjax.codecs.affine import Quantize, quantize
from kvjax.codecs.base import Code, Codec, Constants
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
from kvjax.codecs.lowrank import LowRank, low_rank
from kvjax.codecs.packing import pack, quantum, unpack
from kvjax.codecs.pair import PerKV, as_pair, per_kv
from kvjax.codecs.sparse import Outliers, outliers
from kvjax.codecs.transform import (
    Balance,
    Projection,
    Rotate,
    Transform,
    balance,
    projection,
    rotate,
    walsh_hadamard,
)

__all__ = [
    "Balance",
    "Code",
    "Codebook",
    "Codec",
    "Compose",
    "Constants",
    "Dense",
    "LowRank",
    "Outliers",
    "PerKV",
    "Projection",
    "Quantize",
    "Residual",
    "Rotate",
    "Transform",
    "WithOutliers",
    "as_pair",
    "balance",
    "codebook",
    "compose",
    "dense",
    "gaussian_levels",
    "low_rank",
    "outliers",
    "pack",
    "per_kv",
    "projection",
    "quantize",
    "quantum",
    "residual",
    "rotate",
    "unpack",
    "walsh_hadamard",
    "with_outliers",
]
