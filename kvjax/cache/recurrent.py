"""State of constant size: what recurrent layers remember, under the same contract as keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """What the recurrent layers of a model remember, and how rows advance it.

    A cache holds it beside its chains, as a group of its own: `forward` reads the state and returns
    `New.recurrent`, rows that say by themselves (without weights) how each token changes the state;
    `commit` replays the accepted ones. So nothing has to be undone after verification, and no state
    is ever stored per token.

    A subclass is a frozen dataclass of hashable fields that gives `init` and `advance`.
    """

    # What a cache asks of any group: nothing waits for the whole prompt, nothing watches attention.
    streaming = True

    def init(self, layers: int, batch: int, dtype: Any) -> Any:
        """The state before the first token: a pytree of arrays [L, B, ...].

        Args:
          dtype: of exact activations; what is summed up over many tokens should be float32.
        """
        raise NotImplementedError(f"{type(self).__name__} has no initial state")

    def advance(self, state: Any, rows: Any, valid: Array) -> Any:
        """The state after the valid rows, one after the other.

        Args:
          rows: pytree of arrays [L, B, T, ...], as `forward` returned them.
          valid: bool [B, T]; the others, anywhere, change nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how rows advance it")

    def read(self, state: Any) -> Any:
        """The state of one layer [B, ...] as its layers compute with it: decoded, where a cache
        holds it in another form."""
        return state

    def axes(self, state: Any) -> Any:
        """Logical axis names of the state's arrays, one tuple each."""
        return jax.tree.map(lambda x: ("layers", "batch") + (None,) * (x.ndim - 2), state)

    def needs_attention(self, state: Any) -> bool:
        return False

    def commit(self, state: Any, rows: Any, index: Array) -> Any:
        """Advances by the rows at `index` [B, K], -1 for none, in that order."""

        def take(x: Array) -> Array:
            at = index.reshape(1, *index.shape, *(1,) * (x.ndim - 3))
            got = jnp.take_along_axis(x, jnp.maximum(at, 0), 2)
            return jnp.where(at >= 0, got, jnp.zeros((), x.dtype))

        return self.advance(state, jax.tree.map(take, rows), index >= 0)


def previous(valid: Array, width: int) -> Array:
    """Where the `width` tokens before each row are, for short convolutions over valid rows only.

    Args:
      valid: bool [B, T].

    Returns:
      int32 [B, T + 1, width]: indices into `width` tokens remembered, oldest first, followed by the
      T rows. The last entry of axis 1 is the window to remember next.

    >>> previous(jnp.array([[True, False, True]]), 2)[0].tolist()
    [[0, 1], [1, 2], [1, 2], [2, 4]]
    """
    batch, rows = valid.shape
    order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)  # valid rows first
    kept = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    sequence = jnp.concatenate([kept, width + order], 1)
    seen = jnp.cumsum(valid, 1, dtype=jnp.int32)
    before = jnp.concatenate([seen - valid, seen[:, -1:]], 1)
    at = before[..., None] + jnp.arange(width, dtype=jnp.int32)
    return jnp.take_along_axis(sequence, at.reshape(batch, -1), 1).reshape(batch, rows + 1, width)
