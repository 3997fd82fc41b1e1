"""KeyDiff: keys that point away from the others."""

from kvjax.cache import Chain, key_difference
from kvjax.compress.common import Storage, pruned, size


def keydiff(keep: float | None = None, tokens: int | None = None, storage: Storage = None) -> Chain:
    """Keeps the keys of a prompt that differ most from the mean key, per head.

        prune(keep, key_difference()) > storage
        s_j = -cos(k_j, mean_i k_i / |k_i|),  keys after rotation

    The one-shot form: the whole prompt is ranked once, against one anchor. No token is protected,
    neither the first nor the newest.

    Args:
      keep: fraction of the prompt kept per head (default 0.5; the paper fixes 8K tokens).
        tokens: a number in its place.
      storage: what holds the survivors: any chain that codes heads one by one; None: exactly.

    Raises:
      ValueError: both sizes, or a size out of range.

    Source: KeyDiff: Key Similarity-Based KV Cache Eviction, arXiv 2504.15364.

    >>> from kvjax.cache import chain, key_difference, prune, store
    >>> keydiff(tokens=8192) == chain(prune(8192, key_difference()), store())
    True
    """
    tokens, keep = size("keydiff", keep, tokens, default=0.5)
    return pruned(tokens, keep, key_difference(), storage)
