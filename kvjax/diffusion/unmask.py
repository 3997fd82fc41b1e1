"""How many candidates become tokens in a step, and which: unmaskers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.diffusion.view import Prediction, View


@dataclasses.dataclass(frozen=True)
class Unmasker:
    """Chooses the candidates to commit. A value with pure methods.

    The loop calls `select` at every step and commits what it returns among the candidates. Ties of
    confidence go to the lower position. Positions are those of the canvas, in sequence order,
    however few of them were computed.
    """

    def init(self, view: View) -> Any:
        """What is remembered from step to step: a pytree, each array [B, ...]."""
        return ()

    def limit(self, size: int) -> int:
        """The most steps that a block of `size` positions may take."""
        return size

    def select(self, view: View, prediction: Prediction, state: Any) -> tuple[Array, Any]:
        """(bool [B, N], positions to commit; state). view.candidates are those to choose from."""
        raise NotImplementedError


def ranks(confidence: Array) -> Array:
    """How many positions are more confident, or as confident and lower: int32 [B, N].

    >>> ranks(jnp.array([[0.5, 0.9, 0.9, -jnp.inf]])).tolist()
    [[2, 0, 1, 3]]
    """
    order = jnp.argsort(-confidence, -1, stable=True)
    return jnp.argsort(order, -1).astype(jnp.int32)


def at_least_one(chosen: Array, prediction: Prediction) -> Array:
    """`chosen`, and the most confident candidate in any case."""
    return chosen | (ranks(prediction.confidence) == 0)


@dataclasses.dataclass(frozen=True)
class Quota(Unmasker):
    """See `quota`."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"quota(steps={self.steps}): at least 1 step per block")

    def limit(self, size: int) -> int:
        return self.steps

    def select(self, view: View, prediction: Prediction, state: Any) -> tuple[Array, Any]:
        extra = view.index < view.total % self.steps
        count = view.total // self.steps + extra
        return ranks(prediction.confidence) < count[:, None], state


def quota(steps: int) -> Quota:
    """So many steps per block; each commits an equal share of the block's masks, the most
    confident. What does not divide goes to the earliest steps.

    LLaDA's "remasking": all others are masked again. Once a block is full, steps that are left
    over are not run (they would commit nothing).

    Args:
      steps: per block, at least 1.

    Source: Large Language Diffusion Models, arXiv 2502.09992.
    """
    return Quota(steps)


@dataclasses.dataclass(frozen=True)
class Threshold(Unmasker):
    """See `threshold`."""

    value: float

    def select(self, view: View, prediction: Prediction, state: Any) -> tuple[Array, Any]:
        return at_least_one(prediction.confidence >= self.value, prediction), state


def threshold(value: float = 0.9) -> Threshold:
    """Every candidate whose confidence is at least `value`, and the most confident in any case.

    Above 1 (for probabilities) it is one token per step; at 0 a block takes one step.

    Source: Fast-dLLM, arXiv 2505.22618 (confidence-aware parallel decoding).
    """
    return Threshold(value)


@dataclasses.dataclass(frozen=True)
class Factor(Unmasker):
    """See `factor`."""

    value: float

    def __post_init__(self) -> None:
        if self.value < 0:
            raise ValueError(f"factor(value={self.value}): at least 0")

    def select(self, view: View, prediction: Prediction, state: Any) -> tuple[Array, Any]:
        rank = ranks(prediction.confidence)
        # The bound rises with the rank and confidence falls: those above it are a prefix.
        bound = 1.0 - self.value / (rank + 2.0)
        return at_least_one(prediction.confidence >= bound, prediction), state


def factor(value: float = 1.0) -> Factor:
    """The n most confident candidates, n the largest with (n + 1)(1 - c_n) <= value; at least one.

    0 is one token per step (unless sure of more), large values the whole block.

    Source: Fast-dLLM, arXiv 2505.22618 (factor-based; the strict prefix).
    """
    return Factor(value)
