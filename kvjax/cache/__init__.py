"""The cache: which tokens live where. Three ideas, each a monoid.

`Partial` and `merge`: attention over parts of the keys, put together. `chain`: stages in a row,
each keeping some tokens and passing the rest on. Codecs (`kvjax.codecs`): how a token is stored.

To read in this order: `types` (the values that move, `merge`), `stage` (what a stage is), `chain`,
`cache` (`attend`, `commit`, `finish`), `init`, `stages/windows` (the plainest stages). Then what is
of interest: `stages` that hold tokens, `scores` by which they choose, `readers` that read a
part of what is held, `rules` of attention within a prompt, `budgets` over layers and heads.
"""

from kvjax.cache.attention import attend_new, attend_slots, received
from kvjax.cache.axes import logical_axes
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
    nbytes,
    start,
    together,
    tokens_held,
    used_bytes,
)
from kvjax.cache.chain import Chain, Pending, chain
from kvjax.cache.checkpoint import restore_cache, save_cache
from kvjax.cache.init import init_cache
from kvjax.cache.marks import token_columns
from kvjax.cache.readers.blocks import best_blocks
from kvjax.cache.readers.reader import Reader, best_pages, best_tokens
from kvjax.cache.readers.spans import best_spans, ends_every, ends_in
from kvjax.cache.recurrent import Recurrence, previous
from kvjax.cache.ring import Window
from kvjax.cache.rotary import rope_of, span_of
from kvjax.cache.rule import Choice, Rule, attending
from kvjax.cache.rules.bands import Bands, attend_bands, bands
from kvjax.cache.rules.chunks import in_chunks
from kvjax.cache.rules.covering import covering
from kvjax.cache.rules.dropping import dropping
from kvjax.cache.rules.groups import Groups, groups
from kvjax.cache.scores.expected import expected_attention
from kvjax.cache.scores.importance import global_local, protect
from kvjax.cache.scores.replay import replayed, replayed_attention
from kvjax.cache.scores.score import (
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
from kvjax.cache.stages.absorb import Absorb, moving, nearest
from kvjax.cache.stages.bases import LayerBases, layer_bases
from kvjax.cache.stages.chosen import Chosen, chosen
from kvjax.cache.stages.cluster import cluster
from kvjax.cache.stages.fit import Fit
from kvjax.cache.stages.heavy import Growth, growth, heavy
from kvjax.cache.stages.later import later
from kvjax.cache.stages.levels import Levels, levels, named, relevance
from kvjax.cache.stages.prefix import prefix
from kvjax.cache.stages.prune import prune
from kvjax.cache.stages.sift import sift
from kvjax.cache.stages.store import Store, store
from kvjax.cache.stages.windows import by_position, first, recent
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
    "used_bytes",
    "window_attention",
]
