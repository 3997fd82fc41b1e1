"""What the parts of a diffusion decoder see of a step: the canvas, the block, the predictions."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import pytree


@pytree()
class View:
    """A canvas of B rows and N positions at the start of a step. Rows are independent.

    Attributes:
      tokens: int32 [B, N]; position n of a row is column n.
      masked: bool [B, N], positions inside the row whose token is still unknown.
      fresh: bool [B, N], positions whose token was committed in the row's last step.
      origin: int32 [B], where generation starts: blocks are counted from here.
      limit: int32 [B], one past the row's last position.
      begin, end: int32 [B], the row's current block. In the first step of a block `end` is the
        largest end that the schedule may choose.
      index: int32 [B], the step within the block, from 0.
      total: int32 [B], masks in the block when it was opened.
    """

    tokens: Array
    masked: Array
    fresh: Array
    origin: Array
    limit: Array
    begin: Array
    end: Array
    index: Array
    total: Array

    def replace(self, **changes: Array) -> View:
        return dataclasses.replace(self, **changes)

    @property
    def position(self) -> Array:
        """int32 [1, N]."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]

    def between(self, low: Array, high: Array) -> Array:
        """Positions in [low, high) of each row: bool [B, N]."""
        return (self.position >= low[:, None]) & (self.position < high[:, None])

    @property
    def inside(self) -> Array:
        """Positions that belong to the row: bool [B, N]."""
        return self.position < self.limit[:, None]

    @property
    def known(self) -> Array:
        """Positions whose token is given or committed: bool [B, N]."""
        return self.inside & ~self.masked

    @property
    def block(self) -> Array:
        """Positions of the current block: bool [B, N]."""
        return self.between(self.begin, self.end)

    @property
    def candidates(self) -> Array:
        """Masked positions of the current block: bool [B, N]."""
        return self.masked & self.block


@pytree()
class Prediction:
    """What the network says of the candidates.

    Attributes:
      token: int32 [B, N], the token chosen for each position; where there is no candidate, 0.
      confidence: float32 [B, N], -inf where there is no candidate.
    """

    token: Array
    confidence: Array
