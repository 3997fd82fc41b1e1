"""`dropping`: rows of one kind that the others attend to little end behind given layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import dot_keys
from kvjax.cache.rule import Choice, Rule
from kvjax.cache.scores.score import draws
from kvjax.cache.stage import LayerMark, Mark
from kvjax.cache.types import Partial, Query

KIND, PROTECTED = Mark("visual"), Mark("key")
ROWS = 128  # rows judged at a time: nothing [T, T] is stored
STAYS = 1e6  # worth of rows that no filter judges; a share of attention is at most 1


@dataclasses.dataclass(frozen=True)
class Dropping(Rule):
    """See `dropping`."""

    layers: tuple[int, ...] = (2, 6, 10, 14)
    total: float = 0.001
    single: float = 0.001
    span: tuple[int, int] | None = None
    shares: tuple[float, ...] | None = None
    seed: int | None = None
    name: str = "received"

    def __post_init__(self) -> None:
        if not self.layers or any(b <= a for a, b in zip((-1, *self.layers), self.layers)):
            raise ValueError(f"dropping(layers={self.layers}): expected layers in ascending order")
        for name, value in (("total", self.total), ("single", self.single)):
            if value < 0:
                raise ValueError(f"dropping({name}={value}): a threshold is at least 0")
        if self.span is not None and not 0 <= self.span[0] <= self.span[1]:
            raise ValueError(f"dropping(span={self.span}): expected (first, end) of positions")
        if self.shares is not None and (
            len(self.shares) != len(self.layers) or not all(0 < s <= 1 for s in self.shares)
        ):
            raise ValueError(
                f"dropping(shares={self.shares}): expected one in (0, 1] for each of {self.layers}"
            )

    @property
    def reads(self) -> tuple[Mark, ...]:
        return (KIND, PROTECTED)

    @property
    def mark(self) -> LayerMark:
        """The column that it notes: what a row received at the last filter up to a layer."""
        return LayerMark(self.name)

    @property
    def notes(self) -> tuple[LayerMark, ...]:
        return (self.mark,)

    @property
    def drops(self) -> bool:
        return True

    def start(self, pos: Array, columns: Mapping[str, Array]) -> dict[str, Array]:
        valid = pos >= 0
        if KIND.name in columns:
            kind = valid & (columns[KIND.name] > 0.5)
        elif self.span is not None:
            kind = valid & (pos >= self.span[0]) & (pos < self.span[1])
        else:
            kind = jnp.zeros_like(valid)
        key = kind & (columns.get(PROTECTED.name, jnp.zeros(pos.shape)) > 0.5)
        worth = jnp.full(pos.shape, STAYS)
        return {"alive": valid, "kind": kind, "key": key, "worth": worth}

    def choose(
        self, layer: Array, query: Query, keys: Array, carry: dict[str, Array]
    ) -> tuple[Choice, Any]:
        return Choice(carry["alive"]), carry

    def note(self, choice: Choice, carry: dict[str, Array]) -> dict[str, Array]:
        return {self.name: carry["worth"]}

    def received(
        self, query: Query, keys: Array, part: Partial, rows: Array, columns: Array
    ) -> tuple[Array, Array]:
        """What `columns` bool [B, T] got from `rows` bool [B, T], mean over heads: (sum over rows,
        largest of a row), float32 [B, T] both."""
        time, heads = query.pos.shape[1], query.q.shape[1]
        size = min(ROWS, time)
        top = jnp.where(jnp.isneginf(part.max), 0.0, part.max)
        scale = 1.0 / jnp.where(part.sum > 0, part.sum, 1.0)

        def step(done: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            first = jnp.minimum(i * size, time - size)
            cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, size, axis)  # noqa: E731
            mine = cut(rows, 1) & (first + jnp.arange(size) >= i * size)

            def read() -> tuple[Array, Array]:
                q = query.grouped(cut(query.q, 2), keys.shape[1])
                logits = query.cap(dot_keys(q, keys))
                logits = logits.reshape(-1, heads, size, time)
                row, key = cut(query.pos, 1)[:, :, None], query.pos[:, None]
                see = mine[:, :, None] & columns[:, None] & (key <= row)
                if query.window:
                    see &= row - key < query.span
                p = jnp.exp(logits - cut(top, 2)[..., None]) * cut(scale, 2)[..., None]
                p = jnp.mean(jnp.where(see[:, None], p, 0.0), 1)
                return done[0] + jnp.sum(p, 1), jnp.maximum(done[1], jnp.max(p, 1))

            return jax.lax.cond(jnp.any(mine), read, lambda: done), None

        none = jnp.zeros(query.pos.shape, jnp.float32)
        return jax.lax.scan(step, (none, none), jnp.arange(-(-time // size)))[0]

    def after(
        self, layer: Array, query: Query, keys: Array, part: Partial, carry: dict[str, Array]
    ) -> dict[str, Array]:
        def judge() -> dict[str, Array]:
            alive, kind, key = carry["alive"], carry["kind"], carry["key"]
            judged = alive & kind
            got, most = self.received(query, keys, part, alive & ~kind, judged)
            all_of_it = jnp.sum(got, 1, keepdims=True)
            if self.shares is None:
                gone = (got < self.total * all_of_it) & (most < self.single)
            else:
                gone = self._beyond(layer, query.pos, got, kind, judged, key)
            part_of_it = got / jnp.where(all_of_it > 0, all_of_it, 1.0)
            worth = jnp.where(judged, part_of_it, carry["worth"])
            return {**carry, "alive": alive & ~(judged & gone & ~key), "worth": worth}

        return jax.lax.cond(jnp.any(layer == jnp.asarray(self.layers)), judge, lambda: carry)

    def _beyond(
        self, layer: Array, pos: Array, got: Array, kind: Array, judged: Array, key: Array
    ) -> Array:
        """Those that are not among the best share of this layer."""
        share = jnp.asarray(self.shares)[jnp.argmax(layer == jnp.asarray(self.layers))]
        number = jnp.ceil(share * jnp.sum(kind, 1)).astype(jnp.int32)
        if self.seed is not None:
            got = draws(self.seed, pos)
        got = jnp.where(judged, jnp.where(key, jnp.inf, got), -jnp.inf)
        order = jnp.lexsort((pos, -got))
        return jnp.argsort(order, axis=1) >= number[:, None]

    def held(self, rows: Array, carry: dict[str, Array]) -> Array:
        before = jnp.arange(rows.shape[0])[:, None, None] < self.layers[0]
        return jnp.where(before, rows, carry["alive"])


def dropping(
    layers: tuple[int, ...] = (2, 6, 10, 14),
    total: float = 0.001,
    single: float = 0.001,
    span: tuple[int, int] | None = None,
    shares: tuple[float, ...] | None = None,
    seed: int | None = None,
    name: str = "received",
) -> Dropping:
    """Behind some layers, rows of one kind that got little attention from all others end.

        g_j = sum_i a_ij,  x_j = max_i a_ij,  a the mean over heads, i the rows of the other kind
        j ends if  g_j < total * sum g  and  x_j < single

    Later layers neither see nor compute with them. From the first of these layers on the cache
    holds what is left in the end; layers before it hold all. Positions stay as they are.

    The kind is the column "visual" (1 or 0) of the tokens; rows with 1 in the column "key" never
    end.

    Args:
      layers: behind which rows end, ascending.
      total, single: thresholds; with one of them 0 none ends.
      span: positions [first, end) that are of the kind where tokens bring no column; None: none.
      shares: for comparison, which part of the kind's rows is left behind each layer, the best by
        g, in place of thresholds. seed: drawn at random instead.
      name: of the column that notes g_j / sum g at the last filter up to each layer.

    Raises:
      ValueError: layers that do not ascend, negative thresholds, shares of another number.

    Source: MustDrop, arXiv 2411.10803.

    >>> dropping((2,), total=0.01) == dropping(layers=(2,), total=0.01)
    True
    """
    return Dropping(tuple(layers), total, single, span, shares, seed, name)
