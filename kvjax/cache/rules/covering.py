"""`covering`: of a prompt, as few rows as hold a share of the attention, chosen layer by layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import dot_keys
from kvjax.cache.rule import Choice, Rule
from kvjax.cache.scores.score import draws
from kvjax.cache.stage import LayerMark
from kvjax.cache.types import Query


def fewest(value: Array, cover: float) -> Array:
    """How many of the largest hold `cover` of the sum: int32 [...] of value >= 0 [..., T].

        min{k : sum of the k largest >= cover * sum of all}

    >>> fewest(jnp.array([0.1, 0.6, 0.3]), 0.9), fewest(jnp.array([0.1, 0.6, 0.3]), 0.5)
    (Array(2, dtype=int32), Array(1, dtype=int32))
    """
    sums = jnp.cumsum(-jnp.sort(-value, -1), -1)
    return 1 + jnp.sum(sums < cover * sums[..., -1:], -1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class Covering(Rule):
    """See `covering`."""

    cover: float = 0.975
    ratio: float | None = None
    recent: int = 64
    drawn: int = 64
    last: int = 1
    seed: int = 0
    sizes: int = 0
    all_ask: bool = False
    name: str = "important"

    def __post_init__(self) -> None:
        for name, part in (("cover", self.cover), ("ratio", self.ratio)):
            if part is not None and not 0 < part <= 1:
                raise ValueError(f"covering({name}={part}): a share lies in (0, 1]")
        for name, least in (("recent", 1), ("drawn", 0), ("last", 1), ("sizes", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ValueError(f"covering({name}={number!r}): expected an integer >= {least}")

    @property
    def mark(self) -> LayerMark:
        """The column that it notes: a row's normalised score, -inf where it was not chosen."""
        return LayerMark(self.name)

    @property
    def notes(self) -> tuple[LayerMark, ...]:
        return (self.mark,)

    def probes(self, layer: Array, pos: Array) -> tuple[Array, Array]:
        """Rows that ask: indices int32 [B, P], and whether there is such a row, bool [B, P]."""
        time = pos.shape[1]
        late, newest = jax.lax.top_k(pos, min(self.recent, time))
        others = (pos >= 0) & (pos < late[:, -1:])
        luck = jnp.where(others, draws(self.seed, layer, pos), -1.0)
        lucky, some = jax.lax.top_k(luck, min(self.drawn, time))
        there = jnp.concatenate([late >= 0, lucky >= 0], 1)
        return jnp.concatenate([newest, some], 1).astype(jnp.int32), there

    def received(self, layer: Array, query: Query, keys: Array) -> tuple[Array, Array]:
        """(attention that rows got from the probes, summed over heads; probes that see each row),
        float32 [B, T] both."""
        index, there = self.probes(layer, query.pos)
        q = jnp.take_along_axis(query.q, index[:, None, :, None], 2)
        logits = query.cap(dot_keys(query.grouped(q, keys.shape[1]), keys))
        row = jnp.take_along_axis(query.pos, index, 1)[:, :, None]
        key = query.pos[:, None, :]
        see = there[:, :, None] & (key >= 0) & (key <= row)
        if query.window:
            see &= row - key < query.span
        groups = query.q.shape[1] // keys.shape[1]
        mask = jnp.tile(see[:, None], (1, 1, groups, 1))
        top = jnp.max(jnp.where(mask, logits, -jnp.inf), -1, keepdims=True)
        p = jnp.where(mask, jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top)), 0.0)
        total = jnp.sum(p, -1, keepdims=True)
        got = jnp.sum(p / jnp.where(total > 0, total, 1.0), (1, 2))
        return got, jnp.sum(see, 1, dtype=jnp.float32)

    def choose(self, layer: Array, query: Query, keys: Array, carry: Any) -> tuple[Choice, Any]:
        valid = query.pos >= 0
        if (self.cover if self.ratio is None else self.ratio) == 1:  # all, whatever rounding says
            return Choice(valid, columns={self.name: jnp.where(valid, 0.0, -jnp.inf)}), carry
        got, seers = self.received(layer, query, keys)
        length = jnp.sum(valid, 1, dtype=jnp.int32)
        if self.ratio is None:
            number = fewest(got, self.cover)
        else:
            number = jnp.ceil(self.ratio * length).astype(jnp.int32)
        number = jnp.clip(number, jnp.minimum(self.last, length), length)
        value = got / jnp.maximum(seers, 1.0)
        last = jax.lax.top_k(query.pos, min(self.last, valid.shape[1]))[0][:, -1:]
        worth = jnp.where(query.pos >= last, jnp.inf, value)
        # Among equals the lower position wins: order by position first, then by worth.
        order = jnp.lexsort((query.pos, jnp.where(valid, -worth, jnp.inf)))
        rows = valid & (jnp.argsort(order, axis=1) < number[:, None])
        columns = {self.name: jnp.where(rows, value, -jnp.inf)}
        if self.all_ask:
            row, key = query.pos[:, :, None], query.pos[:, None]
            return Choice(mask=rows[:, None] & (key <= row), columns=columns), carry
        return Choice(rows, columns=columns), carry


def covering(
    cover: float = 0.975,
    ratio: float | None = None,
    recent: int = 64,
    drawn: int = 64,
    last: int = 1,
    seed: int = 0,
    sizes: int = 0,
    all_ask: bool = False,
    name: str = "important",
) -> Covering:
    """In each layer only its important rows attend and are seen; the others pass it by.

    A few rows ask, before the layer's attention: the newest, and some drawn at random.

        a_j = sum over heads and probes i of softmax(q_i . k)_j
        p = min{k : sum of the k largest a >= cover * sum of all}
        important: the p largest  a_j / (number of probes that see j)

    One number and one set for all heads of a layer; layers choose apart. The number is by plain
    sums, the choice by normalised ones, which do not favour early rows.

    Args:
      cover: the share of attention that the number is to hold, in (0, 1]; 1: all rows.
      ratio: a fixed part of all rows in every layer, in place of `cover`.
      recent, drawn: how many newest rows, and how many others at random, ask.
      last: the newest rows that are always important.
      seed: of the draw, which depends on layer and position alone.
      sizes: smaller programs for attention among few rows, see `Rule.sizes`.
      all_ask: whether the other rows attend too, to the important ones (for comparison).
      name: of the column that notes the normalised score of important rows, -inf of the others.

    Raises:
      ValueError: a share outside of (0, 1], a negative number.

    Source: ZipVL, arXiv 2410.08584, equations 6 to 9.

    >>> covering(0.9) == covering(cover=0.9), covering().mark == LayerMark("important")
    (True, True)
    """
    return Covering(cover, ratio, recent, drawn, last, seed, sizes, all_ask, name)
