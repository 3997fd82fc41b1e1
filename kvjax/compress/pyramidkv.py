"""PyramidKV: low layers keep more."""

from kvjax.cache import Chain, pyramid, window_attention
from kvjax.compress.common import Storage, pruned, size


def pyramidkv(
    keep: float | None = None,
    tokens: int | None = None,
    beta: float = 20.0,
    window: int = 32,
    kernel: int = 5,
    pool: str = "mean",
    storage: Storage = None,
) -> Chain:
    """SnapKV's vote, with budgets that fall linearly from the lowest layer to the highest.

        prune(tokens, window_attention(window, kernel, pool),
              budget=pyramid(beta, window)) > storage
        c_l = window + max - l (max - min) / (L - 1);  min = b / beta, max = 2 b - min

    with b = tokens - window, the mean over layers. Steps are real-valued and rounded so that the
    total is exact; where max exceeds the prompt it is cut and min raised. Unlike the released
    code it never falls back to equal budgets on short prompts.

    Args:
      keep: fraction of the prompt kept, mean over layers. tokens: a number in its place, at least
        the window (default 128); a prompt of no more is kept whole.
      beta: the mean over the highest layer's share, at least 1 (1: SnapKV).
      window, kernel, pool: as in `snapkv`.
      storage: what holds the survivors: any chain that codes heads one by one, without constants
        or readers, since layers hold unlike numbers of tokens; None: exactly.

    Raises:
      ValueError: both sizes; tokens below the window; beta below 1; on init_cache, a `keep` that
        leaves less of the prompt than the window.

    Source: PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling,
    arXiv 2406.02069.

    >>> from kvjax.cache import chain, prune, pyramid, store, window_attention
    >>> score, budget = window_attention(32), pyramid(20, 32)
    >>> pyramidkv(tokens=128) == chain(prune(128, score, budget=budget), store())
    True
    """
    score = window_attention(window, kernel, pool)
    tokens, keep = size("pyramidkv", keep, tokens, default=128, least=window)
    return pruned(tokens, keep, score, storage, pyramid(beta, window))
