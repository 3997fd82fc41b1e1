"""`in_chunks`: a prompt's rows see their own chunk and a few before it; carriers see everything."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax import Array

from kvjax.cache.rule import Choice, Rule
from kvjax.cache.rules.bands import BLOCK, Bands, bands
from kvjax.cache.rules.groups import CARRIER, Groups
from kvjax.cache.stage import Mark
from kvjax.cache.types import Query


@dataclasses.dataclass(frozen=True)
class InChunks(Rule):
    """See `in_chunks`."""

    groups: Groups
    chunk: int = 4
    previous: int = 3
    carry: bool = True
    block: int = BLOCK

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("previous", 0), ("block", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ValueError(f"in_chunks({name}={number!r}): expected an integer >= {least}")

    @property
    def reads(self) -> tuple[Mark, ...]:
        return (self.groups.mark,)

    def start(self, pos: Array, columns: Mapping[str, Array]) -> Bands:
        g = self.groups(columns.get(self.groups.name), pos)
        carrier = (g.kind == CARRIER) & self.carry
        keys = carrier | (g.group == -1)
        rows = carrier | (g.group == g.count[:, None])
        return bands(pos, g.group // self.chunk, rows, keys, self.previous, self.block)

    def choose(self, layer: Array, query: Query, keys: Array, carry: Bands) -> tuple[Choice, Bands]:
        return Choice(bands=carry), carry


def in_chunks(
    groups: Groups, chunk: int = 4, previous: int = 3, carry: bool = True, block: int = BLOCK
) -> InChunks:
    """Attention of a prompt in chunks of some groups, the same in all layers.

        row i sees key j <= i  where  chunk_i - chunk_j <= previous,  or j is of the prefix,
                                      or i is of the end,  or i or j is a carrier

    Blocks of pairs that are all forbidden are not computed. Carriers stand together for this, so
    that they do not make every block a needed one.

    Args:
      groups: what the tokens are, see `groups`.
      chunk: groups of a chunk; the last may have fewer.
      previous: how many chunks before its own a row sees, 0 or more.
      carry: whether carriers see all before them and are seen by all after them; False: they open
        groups and are content otherwise.
      block: rows and keys that are computed together.

    Raises:
      ValueError: numbers out of range.

    >>> from kvjax.cache import groups
    >>> in_chunks(groups()) == in_chunks(groups(), chunk=4)
    True
    """
    return InChunks(groups, chunk, previous, carry, block)
