"""Ada-KV: heads of a layer share its budget by need."""

from kvjax.cache import Chain, adaptive, pyramid, window_attention
from kvjax.compress.common import Storage, pruned, size


def adakv(
    keep: float | None = None,
    tokens: int | None = None,
    alpha: float = 0.2,
    window: int = 32,
    kernel: int = 7,
    pool: str = "max",
    beta: float = 1.0,
    storage: Storage = None,
) -> Chain:
    """SnapKV's vote, with a layer's budget shared among its heads by where the best tokens are.

        prune(tokens, window_attention(window, kernel, pool),
              budget=adaptive(alpha, window)) > storage
        c_i = alpha b + (1 - alpha) n_i,  n_i = entries of head i among the layer's best H b

    with b = tokens - window; every head also keeps the window. Rounded so that the layer's total is
    exactly H b. Heads really hold that many: one pool, no masking.

    Args:
      keep: fraction of the prompt kept, mean over heads (default 0.5). tokens: a number in its
        place, at least the window.
      alpha: the part that is shared equally; 1: uniform, 0: by need alone.
      window, kernel, pool: as in `snapkv` (mean over the query heads first, then pooling).
      beta: above 1, layers get pyramid budgets (Ada-Pyramid).
      storage: what holds the survivors: any chain that codes heads one by one, without constants
        or readers, since heads hold unlike numbers of tokens; None: exactly.

    Raises:
      ValueError: both sizes; tokens below the window; alpha outside [0, 1]; beta below 1; on
        init_cache, a `keep` that leaves less of the prompt than the window.

    Source: Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, arXiv 2407.11550.

    >>> from kvjax.cache import adaptive, chain, prune, store, window_attention
    >>> score, budget = window_attention(32, 7, "max"), adaptive(0.2, 32)
    >>> adakv(tokens=256) == chain(prune(256, score, budget=budget), store())
    True
    """
    score = window_attention(window, kernel, pool)
    tokens, keep = size("adakv", keep, tokens, default=0.5, least=window)
    base = None if beta == 1 else pyramid(beta, window)
    return pruned(tokens, keep, score, storage, adaptive(alpha, window, base))
