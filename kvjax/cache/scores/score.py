"""Scores: how much a token is worth keeping. Higher stays; ties go to the lower position.

A score is a small frozen dataclass, called with tokens and the commit's context. It may read
columns that tokens carry (attention received), statistics of the whole prompt (only `prune`, which
acts once the prompt is complete), or the tokens alone (`streaming`: the same at any time).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import received
from kvjax.cache.barrier import computed
from kvjax.cache.stage import Column, Commit, LayerMark, Mark, Statistic
from kvjax.cache.types import KV, Observation, Spec, pytree


@dataclasses.dataclass(frozen=True)
class Score:
    """Base of scores. `over_set`: the value depends on the other tokens it is compared with."""

    @property
    def streaming(self) -> bool:
        return False

    @property
    def over_set(self) -> bool:
        return False

    @property
    def per_head(self) -> bool:
        return True

    @property
    def per_layer(self) -> bool:
        return True

    @property
    def always(self) -> int:
        """How many tokens of a prompt it keeps whatever they are worth (score +inf)."""
        return 0

    @property
    def refuses(self) -> bool:
        """Whether tokens may be worth -inf: not to be had at any price."""
        return False

    @property
    def columns(self) -> tuple[Column, ...]:
        return ()

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ()

    def apart(self, spec: Spec) -> Spec:
        """`spec` for what is chosen by this score: layers and heads may choose differently."""
        return spec.replace(
            per_layer=spec.per_layer or self.per_layer, per_head=spec.per_head or self.per_head
        )

    def importance(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        """The same, finite for tokens that always stay: what a token weighs beside others."""
        return self(kv, context, unrotated)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        """float32 [L, B, H, T] (axes of size 1 where all layers or heads agree)."""
        raise NotImplementedError


# --- attention received -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Received(Column):
    """Attention received: summed over all rows committed so far, or that of the newest row."""

    name: str = "attention"
    newest: bool = False
    whole_layer: bool = False

    def update(self, old: Array, k: Array, pos: Array, context: Commit) -> Array:
        seen = context.seen
        if seen is None:
            raise ValueError(
                "attention statistics are needed by this chain but were not computed: "
                "call forward with the cache itself, so that it can ask for them"
            )
        if self.newest and seen.pos.shape[1] > 1:  # the other rows are not asked
            seen = _newest(seen)
        weight = (seen.pos >= 0).astype(jnp.float32)
        got = received(k, pos, seen, weight, context.softcap)
        if self.whole_layer:
            got = jnp.broadcast_to(jnp.mean(got, 2, keepdims=True), got.shape)
        if not self.newest:
            return old + got
        anything = jnp.any(weight > 0, 1)[None, :, None, None]
        # Written once, over the old column: else XLA makes a second for the choice of a slot.
        return computed(jnp.where(anything, got, old))


def _newest(seen: Observation) -> Observation:
    """The row of highest position of each row of the batch alone."""
    at = jnp.argmax(seen.pos, 1)
    row = lambda x: jnp.take_along_axis(x, at.reshape(1, -1, 1, 1, *(1,) * (x.ndim - 4)), 3)  # noqa: E731
    pos = jnp.take_along_axis(seen.pos, at[:, None], 1)
    return Observation(row(seen.q), row(seen.max), row(seen.sum), pos, seen.span)


@dataclasses.dataclass(frozen=True)
class ReceivedScore(Score):
    """See `accumulated_attention` and `newest_attention`."""

    column: Received

    @property
    def per_head(self) -> bool:
        return not self.column.whole_layer

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.column,)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        value = kv.extra[self.column.name]
        return value if self.per_head else value[:, :, :1]


def accumulated_attention(whole_layer: bool = False) -> Score:
    """The sum of attention probabilities received from all rows since arrival (H2O).

        s_j = sum_i mean_g softmax(q_gi . k)_j

    Unnormalised by age; mean over the query heads that share a key-value head.

    Args:
      whole_layer: mean over all heads of the layer, one index set per layer; False: per KV head.
    """
    if whole_layer:
        return ReceivedScore(Received("attention_of_layer", whole_layer=True))
    return ReceivedScore(Received("attention"))


@dataclasses.dataclass(frozen=True)
class Marked(Score):
    """See `marked`."""

    column: Mark
    refuses: bool = False

    @property
    def streaming(self) -> bool:
        return True

    @property
    def per_head(self) -> bool:
        return False

    @property
    def per_layer(self) -> bool:
        return isinstance(self.column, LayerMark)

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.column,)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        value = kv.extra[self.column.name]
        return value[:, :, :1] if self.per_layer else value[:1, :, :1]


def marked(column: Mark, refuses: bool = False) -> Score:
    """The value of a column that tokens bring, the same for all heads.

    Args:
      column: one that the caller puts into `New.kv.extra`, or a `LayerMark`, made by `forward`.
      refuses: whether it may be -inf, for tokens that are never to be chosen.
    """
    return Marked(column, refuses)


def newest_attention(whole_layer: bool = True) -> Score:
    """Attention probability received from the newest row (TOVA).

    Args:
      whole_layer: mean over all heads of the layer, one index set per layer; False: per KV head.
    """
    name = "newest_attention" + ("" if whole_layer else "_per_head")
    return ReceivedScore(Received(name, newest=True, whole_layer=whole_layer))


# --- observation window -------------------------------------------------------------------------


@pytree()
class Rows:
    """The last rows of a prompt: q [L, B, Hq, w, D] rotated and scaled; max, sum [L, B, Hq, w];
    pos int32 [B, w] ascending, -1 first where a prompt is shorter; span int32 [L]."""

    q: Array
    max: Array
    sum: Array
    pos: Array
    span: Array


@dataclasses.dataclass(frozen=True)
class LastRows(Statistic):
    """Queries of the last w rows."""

    name: str = "last_rows"
    rows: int = 32

    def init(self, spec: Spec) -> Rows:
        shape = (spec.layers, spec.batch, spec.heads, self.rows)
        return Rows(
            jnp.zeros((*shape, spec.width), jnp.float32),
            jnp.full(shape, -jnp.inf),
            jnp.zeros(shape),
            jnp.full((spec.batch, self.rows), -1, jnp.int32),
            jnp.zeros((spec.layers,), jnp.int32),
        )

    def update(self, value: Rows, k: Array, context: Commit) -> Rows:
        seen = context.seen
        pos = jnp.concatenate([value.pos, seen.pos], 1)
        order = jnp.argsort(pos, axis=1, stable=True)[:, -self.rows :]
        index = order[None, :, None, :]

        def last(a: Array, b: Array) -> Array:
            both = jnp.concatenate([a, b.astype(a.dtype)], 3)
            at = index.reshape(index.shape + (1,) * (both.ndim - 4))
            return jnp.take_along_axis(both, at, 3)

        return Rows(
            last(value.q, seen.q), last(value.max, seen.max), last(value.sum, seen.sum),
            jnp.take_along_axis(pos, order, 1), seen.span,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WindowVote(Score):
    """See `window_attention`."""

    window: int = 32
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"
    whole_layer: bool = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least 1 row must vote")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: expected an odd number of positions")
        if self.pool not in ("mean", "max"):
            raise ValueError(f"pool={self.pool!r}: expected 'mean' or 'max'")

    @property
    def per_head(self) -> bool:
        return not self.whole_layer

    @property
    def always(self) -> int:
        return self.window

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (LastRows(f"last_{self.window}_rows", self.window),)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        rows: Rows = context.stats[self.statistics[0].name]
        seen = Observation(rows.q, rows.max, rows.sum, rows.pos, rows.span)
        weight = (rows.pos >= 0).astype(jnp.float32)
        vote = received(context.rotated(kv, unrotated), kv.pos, seen, weight, context.softcap)
        # Tokens of the window itself do not stand for election, and lend no votes to neighbours.
        opening = jnp.min(jnp.where(rows.pos >= 0, rows.pos, jnp.iinfo(jnp.int32).max), 1)
        inside = kv.pos >= opening[None, :, None, None]
        vote = _pool(jnp.where(inside, 0.0, vote), self.kernel, self.pool)
        vote = jnp.where(inside, jnp.inf, vote)
        return jnp.mean(vote, 2, keepdims=True) if self.whole_layer else vote


def _pool(x: Array, kernel: int, kind: str) -> Array:
    """Pools along the last axis, stride 1, zero padding counted (x >= 0)."""
    if kernel == 1:
        return x
    window, pad = (1,) * (x.ndim - 1) + (kernel,), [(0, 0)] * (x.ndim - 1) + [(kernel // 2,) * 2]
    strides = (1,) * x.ndim
    if kind == "max":
        return jax.lax.reduce_window(x, 0.0, jax.lax.max, window, strides, pad)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, pad) / kernel


def window_attention(
    window: int = 32,
    kernel: int = 5,
    pool: Literal["mean", "max"] = "mean",
    whole_layer: bool = False,
) -> Score:
    """Attention received from the last `window` rows of the prompt, pooled along the sequence.

    The rows' softmax runs over everything they saw. The window's own tokens always stay.

    Args:
      window: rows that vote.
      kernel: odd number of neighbouring tokens pooled; 1: none.
      pool: "mean" (zeros beyond the ends are counted) or "max".
      whole_layer: one vote per layer, the mean over its heads.
    """
    return WindowVote(window, kernel, pool, whole_layer)


# --- tokens alone -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KeyNorm(Score):
    """See `key_norm`."""

    @property
    def streaming(self) -> bool:
        return True

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        return -jnp.linalg.norm(kv.k.astype(jnp.float32), axis=-1)


def key_norm() -> Score:
    """Minus the norm of the key: small keys tend to receive much attention (arXiv 2406.11430)."""
    return KeyNorm()


@dataclasses.dataclass(frozen=True)
class KeyDifference(Score):
    """See `key_difference`."""

    @property
    def over_set(self) -> bool:
        return True

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        k = context.rotated(kv, unrotated).astype(jnp.float32)
        norm = jnp.linalg.norm(k, axis=-1, keepdims=True)
        unit = k / jnp.where(norm > 0, norm, 1.0)
        valid = (kv.pos >= 0)[..., None]
        anchor = jnp.sum(jnp.where(valid, unit, 0.0), -2, keepdims=True)
        anchor = anchor / jnp.maximum(jnp.sum(valid, -2, keepdims=True), 1)
        size = jnp.linalg.norm(anchor, axis=-1, keepdims=True)
        anchor = anchor / jnp.where(size > 0, size, 1.0)
        return -jnp.sum(unit * anchor, -1)


def key_difference() -> Score:
    """Minus the cosine between the key and the mean direction of all keys (arXiv 2504.15364)."""
    return KeyDifference()


@dataclasses.dataclass(frozen=True)
class Recency(Score):
    """See `recency`."""

    sinks: int = 0

    @property
    def streaming(self) -> bool:
        return True

    @property
    def always(self) -> int:
        return self.sinks

    @property
    def per_head(self) -> bool:
        return False

    @property
    def per_layer(self) -> bool:
        return False

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        age = kv.pos.astype(jnp.float32)
        return jnp.where(kv.pos < self.sinks, jnp.inf, age)


def recency(sinks: int = 0) -> Score:
    """The position itself; positions below `sinks` always stay."""
    return Recency(sinks)


@dataclasses.dataclass(frozen=True)
class Random(Score):
    """See `random`."""

    seed: int = 0

    @property
    def streaming(self) -> bool:
        return True

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        layers, _, heads = kv.k.shape[:3]
        lane = jnp.arange(layers)[:, None, None, None] * heads + jnp.arange(heads)[:, None]

        shape = kv.k.shape[:4]
        return draws(self.seed, jnp.broadcast_to(lane, shape), jnp.broadcast_to(kv.pos, shape))


def random(seed: int = 0) -> Score:
    """Uniform in [0, 1), a function of seed, layer, head and position alone."""
    return Random(seed)


def draws(seed: int, *numbers: Array) -> Array:
    """Uniform in [0, 1), each a function of the seed and of its own integers alone."""

    def one(*numbers: Array) -> Array:
        return jax.random.uniform(functools.reduce(jax.random.fold_in, numbers, key))

    key = jax.random.key(seed)
    return jnp.vectorize(one)(*numbers)


def rank(score: Any, kv: KV) -> Array:
    """Indices of tokens by descending score, int32 like `score`; invalid tokens last.

    Ties go to the lower position (tokens in flight are in ascending order).
    """
    value = jnp.where(kv.pos >= 0, score, -jnp.inf)
    # Invalid tokens stand behind valid ones that score -inf; lexsort is stable.
    empty = jnp.broadcast_to(kv.pos < 0, value.shape)
    return jnp.lexsort((empty, -value)).astype(jnp.int32)
