"""Budgets: how many tokens of a prompt each layer and head may keep.

Layer budgets are arithmetic, known before compilation; head budgets are data within a layer's
fixed total.
"""

from __future__ import annotations

import dataclasses

import jax
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


@dataclasses.dataclass(frozen=True)
class Coverage(Overall):
    """See `coverage`."""

    whole_layer: bool = True

    def heads(self, value: Array, per_head: Array) -> Array:
        shape = value.shape[:3]
        if self.whole_layer:
            value = jnp.mean(value, 2, keepdims=True)
        number = super().heads(covered(value), per_head)
        return jnp.broadcast_to(number, shape)


def covered(value: Array) -> Array:
    """Minus the part of its head's sum that lies before each token, by falling value.

    The token of largest value has 0, the next minus the first one's part, and so on; those that
    always stay (+inf) or never (-inf) keep their value and are not in the sum.
    """
    votes = jnp.isfinite(value)
    part = jnp.where(votes, jnp.maximum(value, 0.0), 0.0)
    total = jnp.sum(part, -1, keepdims=True)
    part = part / jnp.where(total > 0, total, 1.0)
    order = jnp.argsort(-jnp.where(votes, value, -jnp.inf), -1, stable=True)
    line = jnp.take_along_axis(part, order, -1)
    before = jnp.take_along_axis(jnp.cumsum(line, -1) - line, jnp.argsort(order, -1), -1)
    return jnp.where(votes, -before, value)


def coverage(whole_layer: bool = True) -> Budget:
    """Each layer keeps the fewest of its best tokens that hold one share p of its whole score.

        o_l = min{o : sum of the o largest >= p sum of all};  p such that all layers fit the total

    p is the same everywhere, so flat layers keep more tokens than peaked ones. Found exactly, by
    one sort: the token that would enter next is the one with the smallest share before it.

    Args:
      whole_layer: heads of a layer keep as many, by the mean of their scores; False: p is common to
        all heads of all layers.
    """
    return Coverage(whole_layer)


STATISTICS = ("variance", "spread")


@dataclasses.dataclass(frozen=True)
class Evenness(Overall):
    """See `evenness`."""

    statistic: str = "variance"
    limit: float = 2.0

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic={self.statistic!r}: expected one of {STATISTICS}")
        if self.limit < 1:
            raise ValueError(f"evenness(limit={self.limit}): at least the mean, 1")

    def heads(self, value: Array, per_head: Array) -> Array:
        votes = jnp.isfinite(value)
        number = jnp.maximum(jnp.sum(votes, -1), 1)
        mean = jnp.sum(jnp.where(votes, value, 0.0), -1) / number
        off = jnp.where(votes, value - mean[..., None], 0.0)
        uneven = jnp.sum(off * off, -1) / number  # [L, B, H]
        if self.statistic == "spread":
            low, high = (f(uneven, 2, keepdims=True) for f in (jnp.min, jnp.max))
            uneven = (uneven - low) / (high - low + 1e-6)
        share = -jnp.mean(uneven, 2)
        fixed = jnp.max(jnp.sum(jnp.isposinf(value), -1), (0, 2))
        there = jnp.max(jnp.sum(value > -jnp.inf, -1), (0, 2))
        high = jnp.minimum(jnp.floor(self.limit * jnp.mean(per_head, 0) + 1e-4), there)
        each = shared(share, jnp.sum(per_head, 0), jnp.minimum(fixed + 1, high), high)
        return jnp.broadcast_to(each[..., None], value.shape[:3])

    def most(self, per_head: int, length: int, heads: int) -> int:
        return min(length, int(self.limit * per_head + 1e-4))


def shared(share: Array, total: Array, low: Array, high: Array) -> Array:
    """Whole numbers [L, ...] in proportion to exp(share), but between low and high; their sum over
    L is `total` if that lies between L low and L high.

    Args:
      share: float [L, ...], logarithms. total, low, high: [...]. NumPy and JAX arrays alike.
    """
    xp = np if isinstance(share, np.ndarray) else jnp
    share = share - xp.max(share, 0)
    size = lambda scale: xp.clip(xp.exp(scale + share), low, high)  # noqa: E731

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        less = xp.sum(size(middle), 0) < total
        return xp.where(less, middle, ends[0]), xp.where(less, ends[1], middle)

    above = xp.log(xp.maximum(high, 1.0)) - xp.min(share, 0) + 1
    scales = (xp.zeros_like(above) - 1, above)
    if xp is np:
        for step in range(60):
            scales = halve(step, scales)
    else:
        scales = jax.lax.fori_loop(0, 60, halve, scales)
    # Rounding the running sum keeps the total.
    ends = xp.floor(xp.cumsum(size(scales[1]), 0) + 0.5)
    each = ends - xp.concatenate([xp.zeros_like(ends[:1]), ends[:-1]])
    return xp.clip(each, low, high).astype(xp.int32)


def evenness(statistic: str = "variance", limit: float = 2.0) -> Budget:
    """Layers whose scores are spread evenly over tokens keep more than those with a few large ones.

        c_l = L n softmax_l(-F_l), at most limit n;  F_l = mean over heads of the variance of scores

    What a layer may not have goes to the others in proportion, so that the total is exact. Heads of
    a layer keep as many. Tokens that always stay are left out of the variance.

    Args:
      statistic: "variance", or "spread": each layer's variances are first scaled to [0, 1] over its
        heads, so that budgets differ by a factor of e at most.
      limit: the most that a layer may keep, in units of the mean n, at least 1 (1: uniform).
    """
    return Evenness(statistic, limit)


@dataclasses.dataclass(frozen=True)
class Given(Budget):
    """See `given`."""

    parts: tuple[float, ...]
    always: int = 0

    def __post_init__(self) -> None:
        if not self.parts or min(self.parts) <= 0:
            raise ValueError(f"parts={self.parts}: expected a positive number for each layer")

    @property
    def ragged(self) -> bool:
        return True

    def layers(self, kept: Array, length: Array, count: int) -> Array:
        if count != len(self.parts):
            raise ValueError(f"parts={self.parts}: {len(self.parts)} numbers for {count} layers")
        xp = np if isinstance(kept, np.ndarray) else jnp
        parts = xp.log(xp.asarray(self.parts, xp.float32)).reshape(-1, *(1,) * xp.ndim(kept))
        parts = xp.broadcast_to(parts, (count, *xp.shape(kept)))
        low = xp.minimum(xp.maximum(self.always, 1), length)
        return shared(parts, kept * count, low, xp.maximum(length, low))


def given(parts: tuple[float, ...], always: int = 0) -> Budget:
    """Layers share in given proportions, at least `always` tokens and at most the prompt each.

    Args:
      parts: of each layer, relative to one another.
      always: tokens that always stay.
    """
    return Given(tuple(parts), always)
