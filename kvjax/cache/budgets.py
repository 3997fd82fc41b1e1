"""Budgets: how many tokens of a prompt each layer and head may keep.

Layer budgets are arithmetic, known before compilation; head budgets are data within a layer's
fixed total.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Budget:
    """Every layer and head keeps the same number."""

    @property
    def ragged(self) -> bool:
        """Whether layers or heads may keep different numbers."""
        return False

    @property
    def shared(self) -> bool:
        """Whether layers share one total, which scores divide; `layers` then gives their mean."""
        return False

    def layers(self, kept: Array, length: Array, count: int) -> Array:
        """Tokens per head in each layer, [count, ...].

        Args:
          kept: mean tokens per head and layer, int [...]. length: prompt length, int [...].
          count: number of layers. Works on NumPy and JAX arrays alike.
        """
        return (
            np.stack([kept] * count) if isinstance(kept, np.ndarray) else jnp.stack([kept] * count)
        )

    def heads(self, value: Array, per_head: Array) -> Array:
        """Tokens of each head, int32 [L, B, H], given scores [L, B, H, T] and [L, B] tokens."""
        return jnp.broadcast_to(per_head[:, :, None], value.shape[:3])

    def most(self, per_head: int, length: int, heads: int) -> int:
        """The most tokens that one head of a layer can get, static."""
        return per_head


def uniform() -> Budget:
    """Every layer and head keeps the same number."""
    return Budget()


@dataclasses.dataclass(frozen=True)
class Pyramid(Budget):
    """See `pyramid`."""

    beta: float = 20.0
    window: int = 32

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise ValueError(f"pyramid(beta={self.beta}): beta must be at least 1 (1: uniform)")

    @property
    def ragged(self) -> bool:
        return True

    def layers(self, kept: Array, length: Array, count: int) -> Array:
        xp = np if isinstance(kept, np.ndarray) else jnp
        voted = xp.maximum(kept - self.window, 0)
        low = voted / self.beta
        high = 2 * voted - low
        room = xp.maximum(length - self.window, 0)
        low, high = xp.where(high > room, 2 * voted - room, low), xp.minimum(high, room)
        step = (high - low) / max(count - 1, 1)
        # Rounding the running sum keeps the total exact.
        shape = (count, *(1,) * xp.ndim(voted))
        index = xp.arange(count).reshape(shape)
        ends = (index + 1) * high - step * index * (index + 1) / 2
        ends = xp.floor(ends + 0.5 + 1e-4)
        each = ends - xp.concatenate([xp.zeros_like(ends[:1]), ends[:-1]])
        each = each + xp.minimum(kept, self.window)
        return xp.where(kept >= length, length, xp.minimum(each, length)).astype(xp.int32)


def pyramid(beta: float = 20.0, window: int = 32) -> Budget:
    """Low layers keep more, linearly fewer upwards, the mean unchanged (arXiv 2406.02069).

        c_l = max - l (max - min) / (L - 1);  min = b / beta, max = 2 b - min,  b = kept - window

    Args:
      beta: ratio of the mean to the top layer's share; 1: uniform.
      window: tokens kept in every layer beside the voted ones.
    """
    return Pyramid(beta, window)


@dataclasses.dataclass(frozen=True)
class Adaptive(Budget):
    """See `adaptive`."""

    alpha: float = 0.2
    window: int = 32
    base: Budget = Budget()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"adaptive(alpha={self.alpha}): a share lies in [0, 1]")

    @property
    def ragged(self) -> bool:
        return True

    def layers(self, kept: Array, length: Array, count: int) -> Array:
        return self.base.layers(kept, length, count)

    def heads(self, value: Array, per_head: Array) -> Array:
        layers, batch, heads, tokens = value.shape
        fixed = jnp.isposinf(value)  # the window: every head keeps it
        inside = jnp.sum(fixed, -1)
        voted = jnp.maximum(per_head - jnp.max(inside, -1), 0)
        flat = jnp.where(fixed, -jnp.inf, value).reshape(layers, batch, -1)
        # Among equals the lower position wins, then the lower head.
        head = jnp.broadcast_to(jnp.arange(heads)[:, None], (heads, tokens)).reshape(-1)
        time = jnp.broadcast_to(jnp.arange(tokens), (heads, tokens)).reshape(-1)
        spread = lambda x: jnp.broadcast_to(x, flat.shape)  # noqa: E731
        order = jnp.lexsort((spread(head), spread(time), -flat))
        place = jnp.argsort(order, -1).reshape(value.shape)
        wins = (place < (voted * heads)[..., None, None]) & ~fixed & (value > -jnp.inf)
        number = jnp.sum(wins, -1)
        # The safeguard mixes in a uniform share; remainders go to the largest fractions, so that
        # the total is exact.
        least = jnp.floor(voted * self.alpha + 1e-4)[..., None]
        rest = (voted[..., None] - least) * heads
        share = number / jnp.maximum(jnp.sum(number, -1, keepdims=True), 1) * rest
        whole = jnp.floor(share + 1e-4)
        missing = rest - jnp.sum(whole, -1, keepdims=True)
        fraction = jnp.argsort(jnp.argsort(-(share - whole), -1, stable=True), -1)
        each = least + whole + (fraction < missing)
        return each.astype(jnp.int32) + inside

    def most(self, per_head: int, length: int, heads: int) -> int:
        return min(length, per_head * heads)


def adaptive(alpha: float = 0.2, window: int = 32, base: Budget | None = None) -> Budget:
    """Heads of a layer share its total by how many of the layer's best tokens each holds.

    Ada-KV (arXiv 2407.11550): head i gets alpha b plus its part of (1 - alpha) h b.

    Args:
      alpha: uniform share; 1: uniform.
      window: tokens that every head keeps whatever their score.
      base: layer budgets, e.g. `pyramid()`; None: uniform.
    """
    return Adaptive(alpha, window, Budget() if base is None else base)


@dataclasses.dataclass(frozen=True)
class Overall(Budget):
    """See `overall`."""

    @property
    def ragged(self) -> bool:
        return True

    @property
    def shared(self) -> bool:
        return True

    def heads(self, value: Array, per_head: Array) -> Array:
        layers, batch, heads, tokens = value.shape
        fixed = jnp.isposinf(value)
        # Among equals the lower position wins, then the lower layer and head.
        line = jnp.moveaxis(jnp.where(fixed, -jnp.inf, value), (1, 3), (0, 1)).reshape(batch, -1)
        order = jnp.argsort(-line, -1, stable=True)
        place = jnp.argsort(order, -1).reshape(batch, tokens, layers, heads)
        place = jnp.moveaxis(place, (0, 1), (1, 3))
        always = jnp.sum(fixed, (0, 2, 3))
        voted = jnp.maximum(jnp.sum(per_head, 0) * heads - always, 0)
        wins = (place < voted[:, None, None]) & (value > -jnp.inf)
        return jnp.sum(fixed | wins, -1, dtype=jnp.int32)

    def most(self, per_head: int, length: int, heads: int) -> int:
        return length


def overall() -> Budget:
    """All heads of all layers share one total: of all their tokens together the best stay.

    A head may keep all of its tokens or none but those that always stay. They lie in one pool of
    pages, so that what is allocated is what is kept, whichever layers it falls to.
    """
    return Overall()
