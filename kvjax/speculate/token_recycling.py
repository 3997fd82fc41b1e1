"""Token Recycling: what the target last ranked high after a token, it may say again."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.models.llama import Model
from kvjax.speculate.drafter import Context, Drafter, Outcome
from kvjax.speculate.tree import Template, Tree, template

# The original's tree "2.2.2", the last rank of a path as digits: 80 nodes, 8, 21, 25, 15, 8 and 3
# of each depth.
_PAPER = """
0 1 2 3 4 5 6 7
00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70
000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500
0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000
00000 00001 00002 00010 00020 00100 01000 10000
000000 000001 000100
"""


@dataclasses.dataclass(frozen=True)
class TokenRecycling(Drafter):
    """See `token_recycling`."""

    tree: Template
    width: int = 8

    def __post_init__(self) -> None:
        if not self.tree.paths:
            raise ValueError("token_recycling(tree): a tree with no node but its root drafts none")
        if self.width < self.tree.width:
            raise ValueError(
                f"token_recycling(width={self.width}): the tree has ranks up to "
                f"{self.tree.width - 1}, so at least {self.tree.width} tokens must be kept"
            )

    def init(self, model: Model, prompt: Array, max_length: int, constants: Any = None) -> Array:
        """int32 [V, width]: after token v the target last ranked these first; -1: not known."""
        return jnp.full((model.config.vocab_size, self.width), -1, jnp.int32)

    def draft(self, state: Array, context: Context) -> Tree:
        tokens = context.root[:, None]
        parents, ranks = self.tree.parents, [0, *(path[-1] for path in self.tree.paths)]
        for first, last in self.tree.levels:
            above = tokens[:, jnp.asarray(parents[first:last])]
            guess = state[jnp.maximum(above, 0), jnp.asarray(ranks[first:last])]
            tokens = jnp.concatenate([tokens, jnp.where(above >= 0, guess, -1)], 1)
        return Tree(tokens, self.tree.parent(), self.tree.depth)

    def update(self, state: Array, context: Context, outcome: Outcome) -> Array:
        best = jax.lax.top_k(outcome.logits, self.width)[1].astype(jnp.int32)
        path = outcome.path
        there = (outcome.positions >= 0) & (outcome.tree.tokens >= 0)
        batch, size = there.shape
        row = jnp.arange(batch)[:, None]
        real = jnp.zeros((batch, size), bool)
        real = real.at[row, jnp.where(path >= 0, path, size)].set(True, mode="drop")
        # One token may stand at several nodes. An accepted node wins over others, then the later
        # one: of all rows' nodes each has a rank of its own, so the result knows no order.
        number = jnp.arange(batch * size, dtype=jnp.int32).reshape(batch, size)
        rank = jnp.where(there, number + real * (batch * size), -1)
        slot = jnp.where(there, outcome.tree.tokens, state.shape[0])
        most = jnp.full((state.shape[0],), -1, jnp.int32).at[slot].max(rank, mode="drop")
        wins = there & (most[jnp.minimum(slot, state.shape[0] - 1)] == rank)
        return state.at[jnp.where(wins, slot, state.shape[0])].set(best, mode="drop")


def paper_tree() -> Template:
    """The static tree of the paper: 80 guesses, up to 6 deep.

    >>> tree = paper_tree()
    >>> tree.size, tree.depth, [last - first for first, last in tree.levels]
    (81, 6, [8, 21, 25, 15, 8, 3])
    """
    return template([[int(digit) for digit in path] for path in _PAPER.split()])


def small_tree(nodes: int) -> Template:
    """The `nodes` guesses of the paper's tree that lie nearest to its best path.

    A pass over 81 tokens is not free where arithmetic is scarce; a part of the tree has most of its
    gain. Nodes are taken by ascending sum of (1 + 2 * rank) over their path, ties by depth: an
    ordering of ours, which keeps parents before children.

    >>> small_tree(5).paths
    ((0,), (1,), (0, 0), (0, 1), (0, 0, 0))
    """
    paths = paper_tree().paths
    if not 1 <= nodes <= len(paths):
        raise ValueError(f"small_tree(nodes={nodes}): between 1 and {len(paths)}")
    cost = lambda path: (sum(1 + 2 * rank for rank in path), len(path), path)  # noqa: E731
    return template(sorted(paths, key=cost)[:nodes])


def token_recycling(tree: Template | int | None = None, width: int = 8) -> Drafter:
    """A tree unrolled from a table of the target's own rankings, refreshed by every pass.

        M[v] = the `width` tokens that the target ranked first when it last stood at token v

    The root's row of M gives the first level, the rows of these the second, and so on. One pass
    over the tree judges it and rewrites the rows of all its tokens, accepted or not. M is the
    drafter's state: pass it on (`state=`) and it is warm from the first token of the next request.
    All rows of a batch share it. Where a token stands at several nodes, accepted ones count before
    others, then the later one.

    Unlike the original, rows not yet written give no guess (there: token 0).

    Args:
      tree: None: the paper's, of 80 guesses; a number: that many of them (`small_tree`); or any
        template.
      width: tokens kept after each.

    Raises:
      ValueError: a tree without guesses, or with ranks beyond the width.

    Source: Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling, arXiv 2408.08696.

    >>> token_recycling() == token_recycling(80)
    True
    """
    if tree is None:
        tree = paper_tree()
    elif isinstance(tree, int):
        tree = small_tree(tree)
    if not isinstance(tree, Template):
        raise ValueError(
            f"token_recycling(tree={tree!r}): expected a template or a number of nodes"
        )
    return TokenRecycling(tree, width)
