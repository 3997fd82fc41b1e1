"""The recent window as arithmetic: which arrivals are held, and which leave, is a function of
how many have come. Shared by `recent` (all of a token) and `store` (keys and values apart)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.buffer import along, put_rows


@dataclasses.dataclass(frozen=True)
class Window:
    """The newest `n` arrivals, the older ones leaving `release` at a time, oldest first.

    Arrival i (counted per row and head) is held while  left(seen) <= i < seen,  with

        left(s) = 0 if s < n + release else release * floor((s - n) / release)

    so between n and n + release - 1 are held once s >= n, each in ring slot i mod capacity.
    """

    n: int
    release: int = 1

    def __post_init__(self) -> None:
        if self.n < 0:
            raise ValueError(f"n={self.n}: a window holds at least 0 tokens")
        if self.release < 1:
            raise ValueError(f"release={self.release}: at least 1 token leaves at a time")

    @property
    def capacity(self) -> int:
        return self.n + self.release - 1

    def fitting(self, ring: Array) -> Window:
        """The window of a ring [L, B, H, N, D] that was cut to the most tokens that can come."""
        return self if ring.shape[3] == self.capacity else Window(ring.shape[3])

    def left(self, seen: Array) -> Array:
        """How many arrivals have left, int32 like `seen`."""
        full = self.release * ((seen - self.n) // self.release)
        return jnp.where(seen < self.n + self.release, 0, full)

    def horizon(self, seen: Array) -> Array:
        """Arrivals up to and including the one that makes tokens leave: at least 1."""
        return self.left(seen) + self.n + self.release - seen

    def leaving(self, arrivals: int) -> int:
        """The most tokens that can leave when `arrivals` come at once (static)."""
        if self.capacity == 0:
            return arrivals
        return (arrivals + self.release - 1) // self.release * self.release

    def held(self, seen: Array) -> Array:
        """Arrival number in each ring slot, int32 [..., capacity]; -1 where the slot is free."""
        slot = jnp.arange(self.capacity, dtype=jnp.int32)
        last = seen[..., None] - 1
        number = last - (last - slot) % self.capacity
        return jnp.where(number >= self.left(seen)[..., None], number, -1)

    def gather(self, ring: Array, rows: Array, seen: Array, number: Array) -> Array:
        """Values of arrivals `number` [L or 1, B, H or 1, M], from the ring or the new rows.

        Args:
          ring: [L, B, H, capacity, ...]. rows: [L, B, H, T, ...], the arrivals from `seen` on.
          seen: int32 [L or 1, B, H or 1], arrivals before these rows.

        Returns:
          [L, B, H, M, ...]; where `number` is negative, arbitrary finite values.
        """
        fresh = along(rows, jnp.maximum(number - seen[..., None], 0))
        if self.capacity == 0:
            return fresh
        old = along(ring, jnp.maximum(number, 0) % self.capacity)
        new = number >= seen[..., None]
        return jnp.where(new.reshape(new.shape + (1,) * (ring.ndim - 4)), fresh, old)

    def write(
        self, ring: Array, rows: Array, seen: Array, arrived: Array, layout: Any = None
    ) -> Array:
        """The ring after `arrived` of `rows` came; rows that left at once are not written."""
        if self.capacity == 0:
            return ring
        number = seen[..., None] + jnp.arange(rows.shape[3], dtype=jnp.int32)
        total = (seen + arrived)[..., None]
        stays = (number < total) & (number >= self.left(total))
        return put_rows(ring, jnp.where(stays, number % self.capacity, -1), rows, layout)


def tree_gather(window: Window, ring: object, rows: object, seen: Array, number: Array) -> object:
    """`Window.gather` over matching pytrees."""
    return jax.tree.map(lambda a, b: window.gather(a, b, seen, number), ring, rows)


def tree_write(
    window: Window, ring: object, rows: object, seen: Array, arrived: Array, layout: Any = None
) -> object:
    """`Window.write` over matching pytrees."""
    return jax.tree.map(lambda a, b: window.write(a, b, seen, arrived, layout), ring, rows)
