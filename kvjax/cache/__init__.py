"""The cache: which tokens live where. Three ideas, each a monoid.

`Partial` and `merge`: attention over parts of the keys, put together. `chain`: stages in a row,
each keeping some tokens and passing the rest on. Codecs (`kvjax.codecs`): how a token is stored.
"""

from kvjax.cache.absorb import Absorb, moving, nearest
from kvjax.cache.attention import attend_new, attend_slots, received
from kvjax.cache.axes import logical_axes
from kvjax.cache.bases import LayerBases, layer_bases
from kvjax.cache.blocks import best_blocks
from kvjax.cache.budgets import (
    Budget,
    adaptive,
    coverage,
    evenness,
    given,
    overall,
    pyramid,
    uniform,
)
from kvjax.cache.buffer import compact, take
from kvjax.cache.cache import (
    Cache,
    apart,
    attend,
    commit,
    finish,
    horizon,
    init_cache,
    nbytes,
    start,
    together,
    tokens_held,
)
from kvjax.cache.chain import Chain, Pending, chain
from kvjax.cache.checkpoint import restore_cache, save_cache
from kvjax.cache.chosen import Chosen, chosen
from kvjax.cache.cluster import cluster
from kvjax.cache.expected import expected_attention
from kvjax.cache.fit import Fit
from kvjax.cache.heavy import Growth, growth, heavy
from kvjax.cache.importance import global_local, protect
from kvjax.cache.marks import token_columns
from kvjax.cache.prefix import prefix
from kvjax.cache.prune import prune
from kvjax.cache.readers import Reader, best_pages, best_tokens
from kvjax.cache.recurrent import Recurrence, previous
from kvjax.cache.replay import replayed, replayed_attention
from kvjax.cache.ring import Window
from kvjax.cache.rotary import rope_of, span_of
from kvjax.cache.scores import (
    Score,
    accumulated_attention,
    key_difference,
    key_norm,
    marked,
    newest_attention,
    random,
    recency,
    window_attention,
)
from kvjax.cache.share import Share, share
from kvjax.cache.spans import best_spans, ends_every, ends_in
from kvjax.cache.stage import (
    Carried,
    Column,
    Commit,
    InputMark,
    Mark,
    Replay,
    Stage,
    Statistic,
    TokenMark,
)
from kvjax.cache.stages import by_position, first, recent
from kvjax.cache.store import Store, store
from kvjax.cache.types import (
    KV,
    New,
    Observation,
    Partial,
    Phase,
    Query,
    Rope,
    Spec,
    merge,
    merge_over,
    partial_attention,
    rotate,
)

__all__ = [
    "KV",
    "Absorb",
    "Budget",
    "Cache",
    "Carried",
    "Chain",
    "Chosen",
    "Column",
    "Commit",
    "Fit",
    "Growth",
    "InputMark",
    "LayerBases",
    "Mark",
    "New",
    "Observation",
    "Partial",
    "Pending",
    "Phase",
    "Query",
    "Reader",
    "Recurrence",
    "Replay",
    "Rope",
    "Score",
    "Share",
    "Spec",
    "Stage",
    "Statistic",
    "Store",
    "TokenMark",
    "Window",
    "accumulated_attention",
    "adaptive",
    "apart",
    "attend",
    "attend_new",
    "attend_slots",
    "best_blocks",
    "best_pages",
    "best_spans",
    "best_tokens",
    "by_position",
    "chain",
    "chosen",
    "cluster",
    "commit",
    "compact",
    "coverage",
    "ends_every",
    "ends_in",
    "evenness",
    "expected_attention",
    "finish",
    "first",
    "given",
    "global_local",
    "growth",
    "heavy",
    "horizon",
    "init_cache",
    "key_difference",
    "key_norm",
    "layer_bases",
    "logical_axes",
    "marked",
    "merge",
    "merge_over",
    "moving",
    "nbytes",
    "nearest",
    "newest_attention",
    "overall",
    "partial_attention",
    "prefix",
    "previous",
    "protect",
    "prune",
    "pyramid",
    "random",
    "received",
    "recency",
    "recent",
    "replayed",
    "replayed_attention",
    "restore_cache",
    "rope_of",
    "rotate",
    "save_cache",
    "share",
    "span_of",
    "start",
    "store",
    "take",
    "together",
    "token_columns",
    "tokens_held",
    "uniform",
    "window_attention",
]
