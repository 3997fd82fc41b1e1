"""SnapKV: the prompt's last rows vote."""

from kvjax.cache import Chain, window_attention
from kvjax.compress.common import Storage, pruned, size


def snapkv(
    keep: float | None = None,
    tokens: int | None = None,
    window: int = 32,
    kernel: int = 5,
    pool: str = "mean",
    storage: Storage = None,
) -> Chain:
    """Keeps of a prompt what its last rows attend to, and their neighbours; once, when it ends.

        prune(tokens, window_attention(window, kernel, pool)) > storage
        s_j = pool_j( sum_{i in window} mean_g softmax(q_gi . k)_j )

    The window's own tokens always stay, and count. Tokens generated later are all kept.

    Args:
      keep: fraction of the prompt kept per KV head. tokens: a number in its place, at least the
        window (default 1024); a prompt of no more is kept whole.
      window: rows that vote.
      kernel, pool: neighbours pooled (odd; 1: none), by "mean" (zeros beyond the ends count) or
        "max".
      storage: what holds the survivors: any chain that codes heads one by one; None: exactly.

    Raises:
      ValueError: both sizes; tokens below the window; on init_cache, a `keep` that leaves less
        of the prompt than the window.

    Source: SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469.

    >>> from kvjax.cache import chain, prune, store, window_attention
    >>> snapkv(keep=0.25) == chain(prune(keep=0.25, score=window_attention(32)), store())
    True
    """
    score = window_attention(window, kernel, pool)
    tokens, keep = size("snapkv", keep, tokens, default=1024, least=window)
    return pruned(tokens, keep, score, storage)
