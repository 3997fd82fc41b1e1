"""Which positions are decoded together: block schedules."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from kvjax.diffusion.view import Prediction, View


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """Cuts the positions to be generated into blocks, decoded from left to right.

    A value with pure methods; block ends are data and differ by row. A block that has no mask is
    never opened.

    Attributes:
      size: the most positions of a block (static: so many logits are computed per step).
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"{type(self).__name__}(size={self.size}): at least 1 position")

    def begin(self, view: View, after: Array, first: Array) -> Array:
        """Where the next block begins, int32 [B].

        Args:
          after: int32 [B], the end of the block before.
          first: int32 [B], the first mask at or behind `after`.
        """
        raise NotImplementedError

    def end(self, view: View, prediction: Prediction) -> Array:
        """Where a block that begins at view.begin ends, int32 [B]; asked once per block, with the
        predictions of its first step for all masks up to view.begin + size."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Blocks(BlockSchedule):
    """See `blocks`."""

    def begin(self, view: View, after: Array, first: Array) -> Array:
        return view.origin + (first - view.origin) // self.size * self.size

    def end(self, view: View, prediction: Prediction) -> Array:
        return jnp.minimum(view.begin + self.size, view.limit)


def blocks(size: int) -> Blocks:
    """Semi-autoregressive blocks of `size` positions, counted from the end of each row's prompt.

    A size of the whole answer is pure diffusion, a size of 1 decodes from left to right. The last
    block may be shorter.

    Source: Large Language Diffusion Models, arXiv 2502.09992.

    >>> blocks(32) == blocks(32)
    True
    """
    return Blocks(size)
