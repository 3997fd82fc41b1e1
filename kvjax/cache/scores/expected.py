"""The score of Expected Attention: what a Gaussian of future queries would pay each key."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.scores.score import Score
from kvjax.cache.stage import Commit, Statistic
from kvjax.cache.types import KV, Rope, Spec, pytree, rotate


@pytree()
class Moments:
    """Sums over rows of unrotated scaled queries: first [L, B, Hq, D], second [.., D, D],
    count float32 [B], last int32 [B] (the highest position)."""

    first: Array
    second: Array
    count: Array
    last: Array


@dataclasses.dataclass(frozen=True)
class QueryMoments(Statistic):
    """Mean and covariance of queries before rotation, without the first `skip` positions."""

    name: str = "query_moments"
    skip: int = 4

    def init(self, spec: Spec) -> Moments:
        shape = (spec.layers, spec.batch, spec.heads, spec.width)
        return Moments(
            jnp.zeros(shape),
            jnp.zeros((*shape, spec.width)),
            jnp.zeros((spec.batch,)),
            jnp.full((spec.batch,), -1, jnp.int32),
        )

    def update(self, value: Moments, k: Array, context: Commit) -> Moments:
        seen = context.seen
        weight = (seen.pos >= self.skip).astype(jnp.float32)

        def layer(args: tuple[Array, Rope]) -> tuple[Array, Array]:
            q, rope = args
            raw = rotate(q.astype(jnp.float32), seen.pos[:, None], rope, inverse=True)
            raw = jnp.where(weight[:, None, :, None] > 0, raw, 0.0)  # drops what padding holds
            return jnp.sum(raw, 2), jnp.einsum("bhtd,bhte->bhde", raw, raw)

        one, two = jax.lax.map(layer, (seen.q, context.rope))
        return Moments(
            value.first + one,
            value.second + two,
            value.count + jnp.sum(weight, 1),
            jnp.maximum(value.last, jnp.max(seen.pos, 1)),
        )


def mean_rotation(freq: Array, factor: Array, start: Array, steps: int, width: int) -> Array:
    """The mean rotation matrix over positions start .. start + steps - 1, [..., D, D].

    Args:
      freq: [R / 2]. factor: scalar. start: int32 [...].
    """
    half = freq.shape[-1]
    angle = (start[..., None] + jnp.arange(steps))[..., None].astype(jnp.float32) * freq
    cos, sin = (factor * jnp.mean(f(angle), -2) for f in (jnp.cos, jnp.sin))
    i = jnp.arange(half)
    matrix = jnp.zeros((*start.shape, width, width))
    matrix = matrix.at[..., i, i].set(cos).at[..., i + half, i + half].set(cos)
    matrix = matrix.at[..., i, i + half].set(-sin).at[..., i + half, i].set(sin)
    rest = jnp.arange(2 * half, width)
    return matrix.at[..., rest, rest].set(1.0)


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Score):
    """See `expected_attention`."""

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0
    covariance: bool = True
    value_norm: bool = True

    def __post_init__(self) -> None:
        if self.future < 1:
            raise ValueError(f"future={self.future}: at least 1 position must be averaged")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks}: must be at least 0")

    @property
    def always(self) -> int:
        return self.sinks

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (QueryMoments(f"query_moments_{self.sinks}", self.sinks),)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        moments: Moments = context.stats[self.statistics[0].name]
        groups = moments.first.shape[2] // kv.k.shape[2]
        count = jnp.maximum(moments.count, 1.0)[:, None, None]
        k = context.rotated(kv, unrotated).astype(jnp.float32)
        pos = jnp.broadcast_to(kv.pos, kv.k.shape[:4])

        def layer(args: tuple[Array, ...]) -> Array:
            k, v, pos, one, two, rope = args
            mean = one / count
            cov = two / count[..., None] - mean[..., :, None] * mean[..., None, :]
            turn = mean_rotation(
                rope.freq, rope.factor, moments.last + 1, self.future, k.shape[-1]
            )[:, None]
            mean = jnp.einsum("bhde,bhe->bhd", jnp.broadcast_to(turn, cov.shape), mean)
            cov = turn @ cov @ jnp.swapaxes(turn, -1, -2)
            split = lambda x: x.reshape(x.shape[0], -1, groups, *x.shape[2:])  # noqa: E731
            z = jnp.einsum("bhgd,bhtd->bhgt", split(mean), k)
            if self.covariance:
                z = z + 0.5 * jnp.einsum("bhtd,bhgde,bhte->bhgt", k, split(cov), k, optimize=True)
            free = (pos >= self.sinks)[:, :, None, :]
            p = jnp.mean(jax.nn.softmax(jnp.where(free, z, -jnp.inf), -1), 2)
            score = jnp.where(free[:, :, 0], p, 0.0) + self.epsilon
            if self.value_norm:
                score = score * jnp.linalg.norm(v.astype(jnp.float32), axis=-1)
            return jnp.where(pos >= self.sinks, score, jnp.inf)

        return jax.lax.map(layer, (k, kv.v, pos, moments.first, moments.second, context.rope))


def expected_attention(
    future: int = 512,
    sinks: int = 4,
    epsilon: float = 0.0,
    covariance: bool = True,
    value_norm: bool = True,
) -> Score:
    """Attention that a Gaussian of future queries is expected to pay (arXiv 2510.00636).

        z_j = k_j . R mu + k_j' R S R' k_j / 2;   score_j = (mean_g softmax(z)_j + epsilon) |v_j|

    with mu and S the mean and covariance of the prompt's queries before rotation (scaled by the
    attention scale) and R the mean rotation over the next `future` positions. The first `sinks`
    positions take no part and always stay.
    """
    return ExpectedAttention(future, sinks, epsilon, covariance, value_norm)
