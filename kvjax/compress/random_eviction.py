"""Random eviction: what a method must beat."""

from kvjax.cache import Chain, random
from kvjax.compress.common import Storage, pruned, size


def random_eviction(
    keep: float | None = None, tokens: int | None = None, seed: int = 0, storage: Storage = None
) -> Chain:
    """Keeps a random part of a prompt, drawn for each layer and head by itself.

        prune(keep, random(seed)) > storage

    Args:
      keep: fraction of the prompt kept per head (default 0.5). tokens: a number in its place.
      seed: what is kept is a function of seed, layer, head and position alone.
      storage: what holds the survivors: any chain that codes heads one by one; None: exactly.

    Raises:
      ValueError: both sizes, or a size out of range.

    >>> random_eviction(keep=0.5, seed=1) == random_eviction(keep=0.5, seed=2)
    False
    """
    tokens, keep = size("random_eviction", keep, tokens, default=0.5)
    return pruned(tokens, keep, random(seed), storage)
