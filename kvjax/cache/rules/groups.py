"""`groups`: what each token is and to which group it belongs, from a type that the tokens bring."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.stage import Mark
from kvjax.cache.types import pytree

TEXT, CARRIER, CONTENT = 0, 1, 2


@pytree()
class Grouped:
    """Tokens in groups; arrays [B, T], tokens in ascending order, padding anywhere.

    Attributes:
      kind: int32, TEXT, CARRIER or CONTENT.
      group: int32, counted from 0; -1 before the first group; `count` behind the last one; -2 for
        padding.
      place: int32, of a content token: how many content tokens of its group come before it.
      size: int32, of a content token: how many its group has.
      count: int32 [B], groups.
    """

    kind: Array
    group: Array
    place: Array
    size: Array
    count: Array

    @property
    def valid(self) -> Array:
        return self.group >= -1

    @property
    def inside(self) -> Array:
        """Tokens of some group."""
        return (self.group >= 0) & (self.group < self.count[:, None])


@dataclasses.dataclass(frozen=True)
class Groups:
    """See `groups`."""

    length: int = 0
    carriers: int = 1
    prefix: int = 0
    name: str = "type"

    def __post_init__(self) -> None:
        for name, least in (("length", 0), ("carriers", 1), ("prefix", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ValueError(f"groups({name}={number!r}): expected an integer >= {least}")
        if 0 < self.length <= self.carriers:
            raise ValueError(
                f"groups(carriers={self.carriers}): expected fewer than length={self.length}"
            )

    @property
    def mark(self) -> Mark:
        return Mark(self.name)

    def __call__(self, said: Array | None, pos: Array) -> Grouped:
        """Groups of tokens at pos int32 [B, T] (-1: padding); `said`: their types [B, T]."""
        valid, time = pos >= 0, pos.shape[1]
        said = jnp.zeros(pos.shape) if said is None else said
        kind = jnp.where(valid, jnp.round(said), 0).astype(jnp.int32)
        if self.length:
            late = pos - self.prefix
            laid = jnp.where(late % self.length < self.carriers, CARRIER, CONTENT)
            laid = jnp.where(valid & (late >= 0), laid, TEXT)
            kind = jnp.where(jnp.any(kind > 0, 1, keepdims=True), kind, laid)
        index = jnp.arange(time, dtype=jnp.int32)
        newest = jax.lax.cummax(jnp.where(valid, index, -1), axis=1)
        before = jnp.pad(newest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        earlier = jnp.take_along_axis(kind, jnp.maximum(before, 0), 1)
        opens = (kind == CARRIER) & ((before < 0) | (earlier != CARRIER))
        group = jnp.cumsum(opens, 1, dtype=jnp.int32) - 1
        count = jnp.max(group, 1, initial=-1) + 1
        last = jnp.max(jnp.where(kind > TEXT, index, -1), 1, keepdims=True)
        group = jnp.where(index > last, count[:, None], group)
        group = jnp.where(valid, group, -2)
        content = kind == CONTENT
        number = jnp.cumsum(content, 1, dtype=jnp.int32)
        place = number - 1 - jax.lax.cummax(jnp.where(opens, number, 0), axis=1)
        return Grouped(kind, group, place, _total(content, group), count)


def _total(content: Array, group: Array) -> Array:
    """Content tokens of each token's group, [B, T]."""
    row = jnp.arange(group.shape[0])[:, None]
    at = jnp.maximum(group + 1, 0)
    sums = jnp.zeros((group.shape[0], group.shape[1] + 2), jnp.int32)
    sums = sums.at[row, at].add(content.astype(jnp.int32), mode="drop")
    return jnp.take_along_axis(sums, jnp.minimum(at, sums.shape[1] - 1), 1)


def groups(length: int = 0, carriers: int = 1, prefix: int = 0, name: str = "type") -> Groups:
    """Groups of tokens, each opened by carrier tokens (a time stamp, a heading).

    Tokens bring their type in a column: 0 text, 1 carrier, 2 content. A carrier that follows
    another token than a carrier opens a group. What comes before the first group is the prefix;
    text behind the last carrier or content token is the end (a question), in no group. Text between
    stays in its group but is never merged.

    Args:
      length: rows of which no token says a type are laid out by position: every `length` tokens are
        a group, the first `carriers` of them carriers; 0: such rows have no groups.
      prefix: how many tokens come before, in such rows.
      name: of the column.

    Raises:
      ValueError: numbers out of range.

    >>> said = jnp.array([[0.0, 1, 1, 2, 2, 1, 2, 0]])
    >>> groups()(said, jnp.arange(8)[None]).group.tolist()
    [[-1, 0, 0, 0, 0, 1, 1, 2]]
    >>> groups(3)(None, jnp.arange(8)[None]).group.tolist()
    [[0, 0, 0, 1, 1, 1, 2, 2]]
    """
    return Groups(length, carriers, prefix, name)
