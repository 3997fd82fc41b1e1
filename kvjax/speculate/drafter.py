"""What a drafter is: three pure functions around a state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import pytree
from kvjax.models.llama import Model
from kvjax.speculate.tree import Tree


@pytree()
class Context:
    """What a drafter may look at.

    Attributes:
      model: the target.
      tokens: int32 [B, S], every token at its position, -1 where there is none or it is not known.
      length: int32 [B], tokens so far: the root, drawn but not yet run, stands at length - 1.
      active: bool [B], rows that still decode; what others draft is not used.
      key: PRNG key of this step.
      constants: arrays of the drafter (weights, tables); never donated, never changed.
    """

    model: Model
    tokens: Array
    length: Array
    active: Array
    key: Array
    constants: Any = None

    @property
    def root(self) -> Array:
        """int32 [B], the newest token of each row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, 1)[:, 0]


@pytree()
class Outcome:
    """What came of a draft: everything that the target computed on it.

    Attributes:
      tree: as drafted, its root in place. Nodes of rows that have ended count for nothing.
      positions: int32 [B, N], -1 where there is no node.
      logits: float32 [B, N, V], the target's, of all nodes, accepted or not.
      hidden: layer -> hidden states [B, N, D], the layers that `Drafter.hidden` named.
      path: int32 [B, depth + 1], accepted nodes from the root on, -1 after the last.
      next: int32 [B], the token drawn after the last accepted node.
    """

    tree: Tree
    positions: Array
    logits: Array
    hidden: dict[int, Array]
    path: Array
    next: Array


@dataclasses.dataclass(frozen=True)
class Drafter:
    """Base of drafters: values (equal fields, equal drafter), static under jit.

    All that changes is the state, a pytree of the drafter's choosing; it comes back from a
    generation and may be given to the next.
    """

    @property
    def hidden(self) -> tuple[int, ...]:
        """Layers whose inputs `update` wants to see (the number of layers: the final output)."""
        return ()

    def init(self, model: Model, prompt: Array, max_length: int, constants: Any = None) -> Any:
        """The state before a first draft.

        Args:
          prompt: int32 [B, T], -1 for padding. max_length: room per row.
        """
        return ()

    def draft(self, state: Any, context: Context) -> Tree:
        """Guesses, of static size; the root's token is `context.root`."""
        raise NotImplementedError

    def update(self, state: Any, context: Context, outcome: Outcome) -> Any:
        """The state after the target has judged a draft."""
        return state
