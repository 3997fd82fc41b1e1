"""Logits processors: pure functions with a pytree state, applied before sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class Processor:
    """Changes logits before a token is drawn; a value, static under jit.

    A subclass gives any of the three methods; state is a pytree of its own choosing.
    """

    def init(self, prompt: Array, vocab: int) -> Any:
        """State before the first new token. prompt: int32 [B, T], -1 for padding."""
        return ()

    def __call__(self, state: Any, logits: Array) -> Array:
        """Logits float32 [B, V] -> the same."""
        return logits

    def update(self, state: Any, token: Array) -> Any:
        """After tokens int32 [B] were drawn; -1 for rows that have stopped."""
        return state


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(Processor):
    """See `repetition_penalty`."""

    penalty: float

    def init(self, prompt: Array, vocab: int) -> Array:
        seen = jnp.zeros((prompt.shape[0], vocab), bool)
        row = jnp.arange(prompt.shape[0])[:, None]
        return seen.at[row, jnp.where(prompt >= 0, prompt, vocab)].set(True, mode="drop")

    def __call__(self, state: Array, logits: Array) -> Array:
        changed = jnp.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return jnp.where(state, changed, logits)

    def update(self, state: Array, token: Array) -> Array:
        token = jnp.where(token >= 0, token, state.shape[1])
        return state.at[jnp.arange(state.shape[0]), token].set(True, mode="drop")


def repetition_penalty(penalty: float) -> Processor:
    """Divides positive and multiplies negative logits of tokens already seen (arXiv 1909.05858).

    Args:
      penalty: above 0; 1 changes nothing.
    """
    if penalty <= 0:
        raise ValueError(f"repetition_penalty({penalty}): must be above 0 (1: no change)")
    return RepetitionPenalty(penalty)


@dataclasses.dataclass(frozen=True)
class HostMask(Processor):
    """See `host_mask`."""

    allowed: Callable[[np.ndarray], np.ndarray]

    def init(self, prompt: Array, vocab: int) -> Array:
        return jnp.full((prompt.shape[0],), -1, jnp.int32)

    def __call__(self, state: Array, logits: Array) -> Array:
        shape = jax.ShapeDtypeStruct(logits.shape, bool)

        def ask(last: Array) -> np.ndarray:
            mask = np.asarray(self.allowed(np.asarray(last)), bool)
            if mask.shape != logits.shape:
                raise ValueError(f"host_mask: got a mask {mask.shape}, expected {logits.shape}")
            return mask

        mask = jax.experimental.io_callback(ask, shape, state, ordered=True)
        return jnp.where(mask, logits, -jnp.inf)

    def update(self, state: Array, token: Array) -> Array:
        return token


def host_mask(allowed: Callable[[np.ndarray], np.ndarray]) -> Processor:
    """Masks tokens by a function on the host, called once per step in order (grammars).

    Args:
      allowed: from the tokens drawn last, int32 [B] (-1 at the first step and for rows that have
        stopped), to bool [B, V], which tokens may come next. It may keep state of its own: it is
        compared by identity.
    """
    return HostMask(allowed)


@dataclasses.dataclass(frozen=True)
class Both(Processor):
    """See `processors`."""

    parts: tuple[Processor, ...]

    def init(self, prompt: Array, vocab: int) -> tuple:
        return tuple(p.init(prompt, vocab) for p in self.parts)

    def __call__(self, state: tuple, logits: Array) -> Array:
        for part, own in zip(self.parts, state):
            logits = part(own, logits)
        return logits

    def update(self, state: tuple, token: Array) -> tuple:
        return tuple(p.update(own, token) for p, own in zip(self.parts, state))


def processors(*parts: Processor) -> Processor:
    """Several processors, applied in order."""
    return Both(parts)
