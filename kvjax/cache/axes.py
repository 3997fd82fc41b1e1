"""Logical axis names of a cache's arrays, to be mapped to a mesh by rules."""

from __future__ import annotations

from typing import Any

import jax

from kvjax.cache.cache import Cache
from kvjax.cache.paging import Pool
from kvjax.cache.recurrent import Recurrence
from kvjax.cache.store import Stored

HELD = ("layers", "batch", "kv_heads", "slots")


def _named(x: Any, names: tuple[str, ...]) -> tuple[str | None, ...]:
    """Names for the axes of x: `names` in order, axes of size 1 and the rest unnamed."""
    names = names[: x.ndim] + (None,) * (x.ndim - len(names))
    return tuple(None if size == 1 else name for size, name in zip(x.shape, names))


def logical_axes(cache: Cache) -> Cache:
    """The cache with each array replaced by a tuple of axis names, one per axis, or None.

    Names: "layers", "batch", "kv_heads", "heads", "slots". Arrays of a pool have "slots" alone:
    its heads lie in one run. Axes of size 1 (layers or heads that hold the same tokens) have none.
    """

    def state(own: Any) -> Any:
        if own is None:
            return None
        if isinstance(own, Stored) and isinstance(own.place, Pool):
            flat = lambda x: _named(x, ("slots",))  # noqa: E731
            held = jax.tree.map(lambda x: _named(x, HELD), own)
            place = Pool(_named(own.place.address, HELD), (None,), own.place.starts, own.place.page)
            pool = jax.tree.map(flat, (own.pos, own.extra, own.k, own.v))
            return held.replace(pos=pool[0], extra=pool[1], k=pool[2], v=pool[3], place=place)
        if hasattr(own, "stats"):
            stats = jax.tree.map(lambda x: _named(x, ("layers", "batch", "heads")), own.stats)
            rest = jax.tree.map(lambda x: _named(x, HELD), own)
            return type(own)(rest.kv, rest.seen, stats, own.spec)
        if getattr(own, "ndim", None) == 1:
            return _named(own, ("batch",))
        return jax.tree.map(lambda x: _named(x, HELD), own)

    def group(transform: Any, held: Any) -> Any:
        if isinstance(transform, Recurrence):
            return transform.axes(held)
        return tuple(state(own) for own in held) if isinstance(held, tuple) else state(held)

    states = tuple(map(group, cache.transforms, cache.state))
    constants = jax.tree.map(lambda x: (None,) * x.ndim, cache.constants)
    return cache.replace(state=states, length=("batch",), constants=constants)
