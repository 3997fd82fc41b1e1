"""Rules among new rows: which rows of a prompt take part in a layer's attention, and which go on.

By default every new row sees all rows up to it. A rule narrows this layer by layer, from what the
layer itself computes, and may let rows end part-way: later layers neither see nor compute with
them. A chain has at most one (the stage `attending(rule)`); `forward` applies it to prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import attend_new
from kvjax.cache.rules.bands import Bands, attend_bands
from kvjax.cache.stage import FOREVER, Column, Commit, LayerMark, Mark, Stage
from kvjax.cache.types import KV, Partial, Query, Spec, pytree

LEAST = 128  # rows; fewer are not worth a program of their own


@pytree()
class Choice:
    """What a rule says of one layer.

    Attributes:
      rows: bool [B, T], which rows attend and are seen; the others' attention output is zero, and
        they go to the next layer all the same. None: all.
      mask: bool [B or 1, T, T] (row, key), which rows each of these sees (the mask of `forward` and
        their order in time are not applied any more); None: as `forward` says.
      bands: `Bands`, in place of a mask: the same in a form of which empty blocks are skipped;
        then all rows take part.
      columns: what is noted of each row under the names of `Rule.notes`, float32 [B, T].
    """

    rows: Array | None = None
    mask: Array | None = None
    bands: Bands | None = None
    columns: dict[str, Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of rules: a frozen dataclass of hashable fields. What it carries from layer to layer is
    any pytree of one structure; arrays have the batch first, and rows never influence each other.
    """

    @property
    def reads(self) -> tuple[Mark, ...]:
        """Columns of the tokens that it reads where they bring them (`forward(columns=)`)."""
        return ()

    @property
    def notes(self) -> tuple[LayerMark, ...]:
        """Columns that `note` gives, which then travel with the tokens of each layer."""
        return ()

    @property
    def drops(self) -> bool:
        """Whether layers may hold different rows, as `held` says."""
        return False

    @property
    def sizes(self) -> int:
        """How many smaller numbers of rows are compiled, evenly spaced (3: three, two and one
        quarter of all), so that attention among few rows takes less time."""
        return 0

    def start(self, pos: Array, columns: Mapping[str, Array]) -> Any:
        """What the first layer is given as `carry`.

        Args:
          pos: int32 [B, T], -1: padding, anywhere.
          columns: float32 [B, T], those of `reads` that the tokens bring.
        """
        return ()

    def choose(self, layer: Array, query: Query, keys: Array, carry: Any) -> tuple[Choice, Any]:
        """Before the attention of a layer.

        Args:
          layer: int32 scalar, counted among the attention layers.
          query: of all rows (`q` [B, Hq, T, D] rotated and scaled, `pos` [B, T]).
          keys: [B, H, T, D] of the same rows, rotated.
        """
        return Choice(), carry

    def after(self, layer: Array, query: Query, keys: Array, part: Partial, carry: Any) -> Any:
        """After it: `part` has each row's largest logit and sum [B, Hq, T]."""
        return carry

    def note(self, choice: Choice, carry: Any) -> Mapping[str, Array]:
        """What is noted of each row once a layer is done: the columns of `notes`."""
        return choice.columns

    def held(self, rows: Array, carry: Any) -> Array:
        """Which rows each layer holds in the end, bool [L, B, T].

        Args:
          rows: bool [L, B, T], which took part in each layer.
          carry: after the last layer.
        """
        return rows


def attend_chosen(
    query: Query, keys: Array, values: Array, mask: Array | str, choice: Choice, sizes: int = 0
) -> Partial:
    """`attend_new` among the chosen rows; the others attend to nothing (out 0, max -inf, sum 0).

    Args:
      sizes: with so many smaller programs (see `Rule.sizes`), of at least 128 rows. The smallest
        that holds the chosen rows of every row of the batch runs, on gathered rows.
    """
    rows, total = choice.rows, query.pos.shape[1]
    if choice.bands is not None:
        if rows is not None or choice.mask is not None:
            raise ValueError("Choice(bands=...): expected neither rows nor a mask beside them")
        return attend_bands(query, keys, values, choice.bands)
    mask = mask if choice.mask is None else choice.mask
    if rows is None:
        return attend_new(query, keys, values, mask)

    def whole() -> Partial:
        pos = jnp.where(rows, query.pos, -1)
        part = attend_new(dataclasses.replace(query, pos=pos), keys, values, mask)
        return blank(part, rows)

    smaller = [total * n // (sizes + 1) for n in range(sizes, 0, -1)]
    smaller = [size for size in smaller if size >= LEAST]
    if not smaller or not isinstance(mask, str):
        return whole()

    def few(size: int) -> Partial:
        order = jnp.argsort(~rows, axis=1, stable=True)[:, :size]
        there = jnp.take_along_axis(rows, order, 1)
        pos = jnp.where(there, jnp.take_along_axis(query.pos, order, 1), -1)
        at = order[:, None, :, None]
        q, k, v = (jnp.take_along_axis(x, at, 2) for x in (query.q, keys, values))
        part = attend_new(dataclasses.replace(query, q=q, pos=pos), k, v, mask)
        place = jnp.clip(jnp.cumsum(rows, 1) - 1, 0, size - 1)[:, None]

        def spread(x: Array) -> Array:
            return jnp.take_along_axis(x, place.reshape(place.shape + (1,) * (x.ndim - 3)), 2)

        return blank(jax.tree.map(spread, part), rows)

    most = jnp.max(jnp.sum(rows, 1))
    number = sum((most <= size).astype(jnp.int32) for size in smaller)
    branches = [whole, *(lambda size=size: few(size) for size in smaller)]
    return jax.lax.switch(number, branches)


def blank(part: Partial, rows: Array) -> Partial:
    """The partial with nothing seen by the rows where bool [B, T] is false."""
    rows = rows[:, None]
    return Partial(
        jnp.where(rows[..., None], part.out, 0.0),
        jnp.where(rows, part.max, -jnp.inf),
        jnp.where(rows, part.sum, 0.0),
    )


@dataclasses.dataclass(frozen=True)
class Attending(Stage):
    """See `attending`."""

    rule: Rule

    @property
    def columns(self) -> tuple[Column, ...]:
        return ()

    @property
    def every_layer(self) -> bool:
        return True

    def init(self, spec: Spec) -> Array:
        return jnp.zeros((spec.batch,), jnp.int32)

    def downstream(self, spec: Spec) -> Spec:
        return spec

    def attend(self, state: Array, layer: Array, query: Query, carry: Any) -> tuple[None, Any]:
        return None, carry

    def commit(self, state: Array, kv: KV, context: Commit) -> tuple[Array, KV]:
        return state, kv

    def held(self, state: Array) -> Array:
        return state

    def horizon(self, state: Array) -> tuple[Array, bool]:
        return jnp.full(state.shape, FOREVER), False


def attending(rule: Rule) -> Attending:
    """Holds nothing, lets all tokens pass; prompts are computed under a rule among their rows.

    `prefill` applies it, or any `forward(..., cache, phase="prefill")` of a whole prompt. Later
    tokens are computed as ever.

    >>> attending(Rule()) == attending(Rule())
    True
    """
    return Attending(rule)
