"""What a window of queries asks for as one: running statistics, weights of rows, even scores."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import pytree

Weights = Literal["activation", "largest", "mean", "random"]
WEIGHTS = ("activation", "largest", "mean", "random")
TINY = 1e-30


@pytree()
class Running:
    """Mean and variance of every channel of every query head over the rows so far.

    Attributes:
      count: float32 [..., B, 1], rows.
      mean, variance: float32 [..., B, Hq, D]; the variance is the unbiased one, 0 of a single row.
    """

    count: Array
    mean: Array
    variance: Array

    @staticmethod
    def empty(shape: tuple[int, ...]) -> Running:
        """Of no rows; `shape` is that of the mean."""
        zeros = lambda: jnp.zeros(shape, jnp.float32)  # noqa: E731
        return Running(jnp.zeros((*shape[:-2], 1), jnp.float32), zeros(), zeros())

    def take_up(self, h: Array, valid: Array) -> Running:
        """With further rows h [..., B, Hq, T, D], those of `valid` [B, T]: what one pass over all
        rows would give, whatever they came with.

            S <- S + sum_t (h_t - u)^2 + (u - mean)^2 n m / (n + m),  variance = S / (n + m - 1)
        """
        there = valid[:, None, :, None].astype(jnp.float32)
        h = h.astype(jnp.float32)
        count = jnp.broadcast_to(jnp.sum(valid, -1, keepdims=True), self.count.shape)
        count = count.astype(jnp.float32)
        total = self.count + count
        old, more, both = (x[..., None] for x in (self.count, count, total))
        mean = jnp.sum(there * h, -2) / jnp.maximum(more, 1)
        squares = jnp.sum(there * (h - mean[..., None, :]) ** 2, -2)
        step = mean - self.mean
        squares += self.variance * jnp.maximum(old - 1, 0)
        squares += step**2 * old * more / jnp.maximum(both, 1)
        return Running(
            total,
            self.mean + step * more / jnp.maximum(both, 1),
            squares / jnp.maximum(both - 1, 1),
        )


def row_weights(
    running: Running, h: Array, valid: Array, pos: Array, how: Weights = "activation"
) -> Array:
    """How much each row of a window says about what all of them ask for, float32 [..., B, T].

        w_t = a_t / sum_t a_t;  a_t = mean_c (h_tc - mean_c)^2 / (var_c + mean(var) / 100)

    Args:
      running: of all rows up to these, these included.
      h: [..., B, Hq, T, D]. valid: bool [B, T]; other rows weigh nothing. pos: int32 [B, T].
      how: "activation": as above. "largest": the row of the largest a_t alone. "mean": all alike.
        "random": by numbers from 0 to 1 that the positions give.
    """
    shape = (*h.shape[:-3], h.shape[-2])
    if how == "mean":
        value = jnp.ones(shape)
    elif how == "random":
        noise = jnp.sin(pos.astype(jnp.float32) * 12.9898) * 43758.547
        value = jnp.broadcast_to(noise - jnp.floor(noise), shape)
    else:
        spread = running.variance
        spread = spread + jnp.mean(spread, (-2, -1), keepdims=True) / 100
        away = (h.astype(jnp.float32) - running.mean[..., None, :]) ** 2
        value = jnp.mean(away / jnp.maximum(spread, TINY)[..., None, :], (-3, -1))
    value = jnp.where(valid, value, 0.0)
    if how == "largest":
        best = jnp.argmax(value, -1, keepdims=True)
        value = jnp.where(jnp.arange(shape[-1]) == best, 1.0, 0.0) * valid
    total = jnp.sum(value, -1, keepdims=True)
    alike = valid / jnp.maximum(jnp.sum(valid, -1, keepdims=True), 1)
    return jnp.where(total > 0, value / jnp.maximum(total, TINY), alike)


def cosine(probe: Array, keys: Array) -> Array:
    """Cosines over all heads together: probe [..., H, R, D], keys [..., H, N, D] -> [..., R, N]."""
    dot = jnp.einsum("...hrd,...hnd->...rn", probe, keys, preferred_element_type=jnp.float32)
    size = lambda x: jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, (-3, -1)))  # noqa: E731
    return dot / jnp.maximum(size(probe)[..., :, None] * size(keys)[..., None, :], TINY)


def flatness(score: Array, there: Array) -> Array:
    """Entropy of the softmax over scores [..., N] that are `there`, as a part of the largest that N
    of them can have: 0 to 1; 1 where there are fewer than two.

        -sum_i p_i log(p_i + 1e-10) / log N
    """
    count = jnp.sum(there, -1)
    top = jnp.max(jnp.where(there, score, -jnp.inf), -1, keepdims=True)
    weight = jnp.where(there, jnp.exp(score - jnp.where(jnp.isneginf(top), 0.0, top)), 0.0)
    p = weight / jnp.maximum(jnp.sum(weight, -1, keepdims=True), TINY)
    entropy = -jnp.sum(p * jnp.log(p + 1e-10), -1)
    return jnp.where(count > 1, entropy / jnp.log(jnp.maximum(count, 2)), 1.0)
