"""Logical axis names of a cache's arrays, to be mapped to a mesh by rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kvjax.cache.cache import Cache
from kvjax.cache.chain import Pending
from kvjax.cache.paging import Pool
from kvjax.cache.recurrent import Recurrence
from kvjax.cache.stages.store import Stored
from kvjax.cache.stages.windows import Slots

HELD = ("layers", "batch", "kv_heads", "slots")
WINDOW = ("layers", "batch", "kv_heads", "window")
PAGES = ("layers", "batch", "kv_heads", "pages")


def _named(x: Any, names: tuple[str, ...]) -> tuple[str | None, ...]:
    """Names for the axes of x: `names` in order, axes of size 1 and the rest unnamed."""
    names = names[: x.ndim] + (None,) * (x.ndim - len(names))
    return tuple(None if size == 1 else name for size, name in zip(x.shape, names))


def _all(tree: Any, names: tuple[str, ...]) -> Any:
    return jax.tree.map(lambda x: _named(x, names), tree)


def state_axes(own: Any) -> Any:
    """The state of one stage (or of a pending prompt) with axis names in place of its arrays."""
    if isinstance(own, Pending):
        stats = _all(own.stats, ("layers", "batch", "heads"))
        return dataclasses.replace(_all(own, HELD), stats=stats)
    if isinstance(own, Stored):
        held = _all(own, HELD)
        if isinstance(own.place, Pool):
            place = dataclasses.replace(
                own.place, address=_named(own.place.address, HELD), owner=(None,), starts=(None,)
            )
            pos, extra, k, v = _all((own.pos, own.extra, own.k, own.v), ("pool",))
            held = held.replace(pos=pos, extra=extra, k=k, v=v, place=place)
        rings = _all((own.k_ring, own.v_ring), WINDOW)
        return held.replace(k_ring=rings[0], v_ring=rings[1], index=_all(own.index, PAGES))
    if isinstance(own, Slots):
        return _all(own, HELD)
    if getattr(own, "ndim", None) == 1:
        return _named(own, ("batch",))
    return _all(own, HELD[:2])  # of what other stages hold no more is known


def logical_axes(cache: Cache) -> Cache:
    """The cache with each array replaced by a tuple of axis names, one per axis, or None.

    Names: "layers", "batch", "kv_heads", "heads", "slots"; "window" for the few exact tokens
    before a store, "pages" for the index of a reader. Arrays of a pool have "pool" alone: its heads
    lie in one run. Axes of size 1 (layers or heads that hold the same tokens) have none. Only what
    has "slots" may be split over devices that attend to parts of it: buffers of exact stages, of
    stores, and of a prompt that is not finished.
    """

    def group(transform: Any, held: Any) -> Any:
        if isinstance(transform, Recurrence):
            return transform.axes(held)
        if isinstance(held, Pending):
            return state_axes(held)
        return tuple(state_axes(own) for own in held)

    states = tuple(map(group, cache.transforms, cache.state))
    constants = jax.tree.map(lambda x: (None,) * x.ndim, cache.constants)
    return cache.replace(state=states, length=_named(cache.length, ("batch",)), constants=constants)
