"""Published KV-cache methods, each a short expression in the cache's algebra.

    from kvjax.compress import kivi, snapkv
    cache = init_cache(config, snapkv(keep=0.5, storage=kivi(bits=4)), batch, max_length, prompt)

Every function returns a chain, runs without arguments, and is known to `parse` by its name.
"""

from kvjax.compress.actqkv import actqkv
from kvjax.compress.adakv import adakv
from kvjax.compress.chelsea import chelsea
from kvjax.compress.compress_kv_heads import compress_kv_heads
from kvjax.compress.cskv import cskv
from kvjax.compress.d2o import d2o
from kvjax.compress.dense import dense
from kvjax.compress.double_sparsity import double_sparsity
from kvjax.compress.ems import ems
from kvjax.compress.expected_attention import expected_attention
from kvjax.compress.gear import gear
from kvjax.compress.h2o import h2o
from kvjax.compress.hydragen import hydragen
from kvjax.compress.keydiff import keydiff
from kvjax.compress.kivi import kivi
from kvjax.compress.knorm import knorm
from kvjax.compress.kvquant import kvquant
from kvjax.compress.kvzip import kvzip
from kvjax.compress.mikv import mikv
from kvjax.compress.mustafar import mustafar
from kvjax.compress.mustdrop import mustdrop
from kvjax.compress.parse import METHODS, parse
from kvjax.compress.prefixkv import prefixkv
from kvjax.compress.pyramidkv import pyramidkv
from kvjax.compress.random_eviction import random_eviction
from kvjax.compress.rotatekv import rotatekv
from kvjax.compress.rtn import rtn
from kvjax.compress.sentencekv import sentencekv
from kvjax.compress.snapkv import snapkv
from kvjax.compress.streaming_llm import streaming_llm
from kvjax.compress.tova import tova
from kvjax.compress.turboquant import turboquant
from kvjax.compress.video_xl_2 import video_xl_2
from kvjax.compress.vidkv import vidkv
from kvjax.compress.xkv import xkv
from kvjax.compress.zipvl import zipvl

__all__ = [
    "METHODS",
    "actqkv",
    "adakv",
    "chelsea",
    "compress_kv_heads",
    "cskv",
    "d2o",
    "dense",
    "double_sparsity",
    "ems",
    "expected_attention",
    "gear",
    "h2o",
    "hydragen",
    "keydiff",
    "kivi",
    "knorm",
    "kvquant",
    "kvzip",
    "mikv",
    "mustafar",
    "mustdrop",
    "parse",
    "prefixkv",
    "pyramidkv",
    "random_eviction",
    "rotatekv",
    "rtn",
    "sentencekv",
    "snapkv",
    "streaming_llm",
    "tova",
    "turboquant",
    "video_xl_2",
    "vidkv",
    "xkv",
    "zipvl",
]
