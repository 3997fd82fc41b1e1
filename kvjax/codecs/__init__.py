"""How a token is stored: dense, quantised, rotated, low rank, sparse, and their combinations."""

from kvjax.codecs.affine import Quantize, quantize
from kvjax.codecs.base import Code, Codec, Constants
from kvjax.codecs.dense import Dense, dense
from kvjax.codecs.packing import pack, quantum, unpack
from kvjax.codecs.pair import PerKV, as_pair, per_kv

__all__ = [
    "Code",
    "Codec",
    "Constants",
    "Dense",
    "PerKV",
    "Quantize",
    "as_pair",
    "dense",
    "pack",
    "per_kv",
    "quantize",
    "quantum",
    "unpack",
]
