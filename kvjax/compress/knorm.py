"""Key norm: small keys are the attended ones."""

from kvjax.cache import Chain, key_norm
from kvjax.compress.common import Storage, pruned, size


def knorm(keep: float | None = None, tokens: int | None = None, storage: Storage = None) -> Chain:
    """Keeps the keys of a prompt that have the smallest norm, per head.

        prune(keep, key_norm()) > storage;  s_j = -|k_j|

    Args:
      keep: fraction of the prompt kept per head (default 0.5). tokens: a number in its place.
      storage: what holds the survivors: any chain that codes heads one by one; None: exactly.

    Raises:
      ValueError: both sizes, or a size out of range.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
    arXiv 2406.11430.

    >>> from kvjax.cache import chain, key_norm, prune, store
    >>> knorm(keep=0.5) == chain(prune(keep=0.5, score=key_norm()), store())
    True
    """
    tokens, keep = size("knorm", keep, tokens, default=0.5)
    return pruned(tokens, keep, key_norm(), storage)
