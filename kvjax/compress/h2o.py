"""H2O: heavy hitters by accumulated attention."""

from kvjax.cache import Chain, accumulated_attention, chain, heavy, recent
from kvjax.compress.common import Storage, per_token, released, split


def h2o(
    keep: float | None = None,
    tokens: int | None = None,
    recent_part: float = 0.5,
    storage: Storage = None,
    release: int = 1,
) -> Chain:
    """Per head, the newest tokens and those that collected most attention; one leaves per step.

        recent(n_recent, release) > heavy(n_heavy, accumulated_attention())
        s_j = sum_i mean_g softmax(q_gi . k)_j over all rows i since token j came

    The raw column sum of the original, not divided by age; the mean over the query heads that
    share a KV head (the original has no such heads). What the prompt's rows gave is counted. The
    sizes are fixed by the prompt that the cache is made for.

    Args:
      keep: tokens held per head as a fraction of the prompt (default 0.2: a tenth each, rounded
        down). tokens: a number in its place, at least 2.
      recent_part: the part of these that goes to the newest, in (0, 1).
      storage: how slots are coded: None (exactly), rtn(...) or a codec of single tokens.
      release: how many leave the newest together, to compete for the heavy hitters' places. Above 1
        (ours) up to release - 1 more are held, and speculation can accept as many as `release`.

    Raises:
      ValueError: both sizes, a size or release out of range; storage that codes tokens together.

    Source: H2O: Heavy-Hitter Oracle for Efficient Generative Inference, arXiv 2306.14048.

    >>> from kvjax.cache import accumulated_attention, chain, heavy, recent
    >>> h2o(tokens=64) == chain(recent(32), heavy(32, accumulated_attention()))
    True
    """
    newest, best = split("h2o", keep, tokens, recent_part, default=0.2)
    codec = per_token("h2o", storage)
    newer = recent(newest, released("h2o", release), codec)
    return chain(newer, heavy(best, accumulated_attention(), codec=codec))
