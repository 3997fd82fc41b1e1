"""Draft trees: guesses at the next tokens, of static size, judged by one forward pass."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import pytree


@pytree("depth", "chain")
class Tree:
    """Guesses for each row of a batch. Node 0 is the root, the newest token; it is certain.

    Attributes:
      tokens: int32 [B, N], of each node; -1: no node here (then none below it either).
      parent: int32 [B or 1, N], smaller than the node's own index; -1 for the root.
      depth: static, the most steps from the root to a node.
      q: float32 [B, N, V], the law from which each node was drawn, given that its earlier siblings
        (those of lower index) were drawn; None: nodes were chosen without chance, or need not say.
      chain: static, whether every node's parent is the node before it. Recurrent layers, which take
        rows one after the other, can verify nothing else.
      embeddings: [B, N, D], what the target reads at nodes without a token (-1): scratch rows, run
        and shown to the drafter, never accepted and never written. None: there are none.
    """

    tokens: Array
    parent: Array
    depth: int
    q: Array | None = None
    chain: bool = False
    embeddings: Array | None = None

    @property
    def size(self) -> int:
        """N, the root included."""
        return self.tokens.shape[1]

    def ancestors(self) -> Array:
        """bool [B or 1, N, N]: (i, j) holds where j is i or lies above it. The attention mask.

        >>> chain_of(jnp.asarray([[5, 6, 7]])).ancestors().astype(int).tolist()
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
        """
        node = jnp.arange(self.size)
        reach = (self.parent[..., None] == node) | (node[:, None] == node)
        for _ in range(max(self.depth - 1, 0).bit_length()):
            # Squaring doubles the steps; 0/1 sums below 2^24 are exact in float32.
            wide = reach.astype(jnp.float32)
            reach = (wide @ wide) > 0
        return reach

    def positions(self, root: Array, ancestors: Array | None = None) -> Array:
        """int32 [B, N], root [B] plus the depth of each node; -1 where there is no node."""
        above = self.ancestors() if ancestors is None else ancestors
        depth = jnp.sum(above, -1, dtype=jnp.int32) - 1
        scratch = self.embeddings is not None
        there = jnp.all(~above | scratch | (self.tokens >= 0)[:, None, :], -1)
        return jnp.where(there & (root >= 0)[:, None], root[:, None] + depth, -1)


def chain_of(tokens: Array, q: Array | None = None) -> Tree:
    """The tree without branches: tokens int32 [B, N], root first; q as in `Tree`."""
    size = tokens.shape[1]
    return Tree(tokens, jnp.arange(-1, size - 1, dtype=jnp.int32)[None], size - 1, q, chain=True)


@dataclasses.dataclass(frozen=True)
class Template:
    """The shape of a tree: a value, static. See `template`.

    Attributes:
      paths: of every node but the root, the ranks taken on the way to it; by depth.
    """

    paths: tuple[tuple[int, ...], ...]

    @property
    def depth(self) -> int:
        return max((len(path) for path in self.paths), default=0)

    @property
    def size(self) -> int:
        """Nodes, the root included."""
        return len(self.paths) + 1

    @property
    def width(self) -> int:
        """Guesses needed per node: one more than the largest rank."""
        return max((path[-1] + 1 for path in self.paths), default=0)

    @functools.cached_property
    def parents(self) -> tuple[int, ...]:
        """Of every node, the root (-1) first."""
        number = {(): 0} | {path: i + 1 for i, path in enumerate(self.paths)}
        return (-1, *(number[path[:-1]] for path in self.paths))

    @functools.cached_property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """First and last (exclusive) node of each depth from 1 on."""
        bounds = [1 + sum(len(path) <= d for path in self.paths) for d in range(self.depth + 1)]
        return tuple(itertools.pairwise(bounds))

    def parent(self) -> Array:
        """int32 [1, N], as a `Tree` wants it."""
        return jnp.asarray([self.parents], jnp.int32)


def template(paths: Sequence[Sequence[int]]) -> Template:
    """A tree from the paths to its nodes, each the ranks taken from the root on.

    Raises:
      ValueError: a path without its beginning, a path twice, an empty path, a negative rank.

    >>> tree = template([(0,), (1,), (0, 0)])
    >>> tree.parents, tree.depth, tree.levels
    ((-1, 0, 0, 1), 2, ((1, 3), (3, 4)))
    """
    chosen = sorted((tuple(int(r) for r in path) for path in paths), key=lambda p: (len(p), p))
    known = {()}
    for path in chosen:
        if not path or path in known:
            raise ValueError(f"template: path {path} is the root, or is there twice")
        if min(path) < 0 or path[:-1] not in known:
            raise ValueError(f"template: path {path} needs ranks from 0 and {path[:-1]} before it")
        known.add(path)
    return Template(tuple(chosen))


def chain_template(length: int) -> Template:
    """The most probable guess, `length` times in a row."""
    return template([(0,) * (i + 1) for i in range(length)])
