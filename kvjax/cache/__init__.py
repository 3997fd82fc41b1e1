"""The cache: which tokens live where. Three ideas, each a monoid.

`Partial` and `merge`: attention over parts of the keys, put together. `chain`: stages in a row,
each keeping some tokens and passing the rest on. Codecs (`kvjax.codecs`): how a token is stored.
"""

from kvjax.cache.absorb import Absorb, moving, nearest
from kvjax.cache.attention import attend_new, attend_slots, received
from kvjax.cache.axes import logical_axes
from kvjax.cache.bands import Bands, attend_bands, bands
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
from kvjax.cache.chunks import in_chunks
from kvjax.cache.cluster import cluster
from kvjax.cache.covering import covering
from kvjax.cache.dropping import dropping
from kvjax.cache.expected import expected_attention
from kvjax.cache.fit import Fit
from kvjax.cache.groups import Groups, groups
from kvjax.cache.heavy import Growth, growth, heavy
from kvjax.cache.importance import global_local, protect
from kvjax.cache.later import later
from kvjax.cache.levels import Levels, levels, named, relevance
from kvjax.cache.marks import token_columns
from kvjax.cache.prefix import prefix
from kvjax.cache.prune import prune
from kvjax.cache.readers import Reader, best_pages, best_tokens
from kvjax.cache.recurrent import Recurrence, previous
from kvjax.cache.replay import replayed, replayed_attention
from kvjax.cache.ring import Window
from kvjax.cache.rotary import rope_of, span_of
from kvjax.cache.rule import Choice, Rule, attending
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
from kvjax.cache.sift import sift
from kvjax.cache.spans import best_spans, ends_every, ends_in
from kvjax.cache.stage import (
    Carried,
    Column,
    Commit,
    InputMark,
    LayerMark,
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
    "Bands",
    "Budget",
    "Cache",
    "Carried",
    "Chain",
    "Choice",
    "Chosen",
    "Column",
    "Commit",
    "Fit",
    "Groups",
    "Growth",
    "InputMark",
    "LayerBases",
    "LayerMark",
    "Levels",
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
    "Rule",
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
    "attend_bands",
    "attend_new",
    "attend_slots",
    "attending",
    "bands",
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
    "covering",
    "dropping",
    "ends_every",
    "ends_in",
    "evenness",
    "expected_attention",
    "finish",
    "first",
    "given",
    "global_local",
    "groups",
    "growth",
    "heavy",
    "horizon",
    "in_chunks",
    "init_cache",
    "key_difference",
    "key_norm",
    "later",
    "layer_bases",
    "levels",
    "logical_axes",
    "marked",
    "merge",
    "merge_over",
    "moving",
    "named",
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
    "relevance",
    "replayed",
    "replayed_attention",
    "restore_cache",
    "rope_of",
    "rotate",
    "save_cache",
    "share",
    "sift",
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
