"""Which positions are computed in a step, and whose keys and values are kept: cache policies."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache import Chain, by_position, chain
from kvjax.diffusion.view import View


@dataclasses.dataclass(frozen=True)
class DiffusionCache:
    """A policy over a position-indexed cache; a value with pure methods.

    In every step the active positions are computed. They attend to each other and to what the
    cache holds at the other positions; a held slot of an active position is superseded, not read.
    The policy must let every position be active or held, and every candidate be active.

    Attributes:
      codec: how keys and values are stored, a per-token codec or per_kv of two; None: exactly.
    """

    codec: Any = None

    def __post_init__(self) -> None:
        by_position(1, self.codec)  # refuses codecs of several tokens

    @property
    def uses_cache(self) -> bool:
        return True

    def storage(self, width: int) -> Chain:
        """The chain that holds `width` positions."""
        return chain(by_position(width, self.codec))

    def sizes(self, width: int, block: int) -> tuple[int, ...]:
        """How many positions a step is compiled for: descending, the first is all of them. A step
        runs with the smallest size that is enough for its active positions in every row."""
        found = [width]
        while len(found) < 4 and found[-1] > 8:
            found.append(-(-found[-1] // 2))
        return tuple(found)

    def active(self, view: View) -> Array:
        """Positions to compute: bool [B, N]."""
        raise NotImplementedError

    def keep(self, view: View, chosen: Array) -> Array:
        """Of the active positions, those to store: bool [B, N].

        Args:
          view: as it was when they were computed. chosen: bool [B, N], committed in this step.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NoCache(DiffusionCache):
    """See `no_cache`."""

    codec: None = None

    @property
    def uses_cache(self) -> bool:
        return False

    def sizes(self, width: int, block: int) -> tuple[int, ...]:
        return (width,)

    def active(self, view: View) -> Array:
        return view.inside

    def keep(self, view: View, chosen: Array) -> Array:
        return jnp.zeros_like(chosen)


def no_cache() -> NoCache:
    """Every position is computed in every step, as LLaDA does."""
    return NoCache()


@dataclasses.dataclass(frozen=True)
class DKVDecode(DiffusionCache):
    """See `dkv_decode`."""

    refresh: int = 8
    delay: int = 1
    prompt: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refresh < 1:
            raise ValueError(f"dkv_decode(refresh={self.refresh}): at least 1")
        if self.delay not in (0, 1):
            raise ValueError(f"dkv_decode(delay={self.delay}): expected 0 or 1")

    def sizes(self, width: int, block: int) -> tuple[int, ...]:
        return (width,) if self.refresh == 1 else super().sizes(width, block)

    def active(self, view: View) -> Array:
        # The first step of a block stores nothing, so the second must compute all again.
        full = (view.index <= 1) | (view.index % self.refresh == 0)
        held = view.known & ~view.fresh if self.delay else view.known
        if not self.prompt:
            held &= view.position >= view.origin[:, None]
        return view.inside & (full[:, None] | ~held)

    def keep(self, view: View, chosen: Array) -> Array:
        known = view.known if self.delay else view.known | chosen
        return known & (view.index > 0)[:, None]


def dkv_decode(
    refresh: int = 8, delay: int = 1, codec: Any = None, prompt: bool = True
) -> DKVDecode:
    """Keys and values of decoded tokens are kept, one step late; masks are always computed.

    Step i of a block, D_i the positions known at its start:
      i = 0: all positions are computed, nothing is kept;
      i = 1, and every `refresh` steps: all are computed, those of D_i kept;
      otherwise: all but D_(i-1) are computed, those of D_i among them kept.
    A token is thus frozen as computed in the step after it was committed, when its true embedding
    was the input. With refresh=1 nothing is ever read: exactly no cache, whatever the codec.

    Args:
      refresh: steps between full recomputations, counted in each block.
      delay: 1; 0 freezes a token as computed when it was still a mask (the paper's ablation).
      codec: per-token codec of the stored keys and values, such as quantize(4, axis="token").
      prompt: whether what stands before the answer is kept like decoded tokens, as in the paper;
        False: it is computed in every step. Where a model notes on the prompt's positions what
        the answer has used already, kept ones are stale a step later (README, Masked diffusion).

    Source: dKV-Cache: The Cache for Diffusion Language Models, arXiv 2505.15781 (Decode).
    """
    return DKVDecode(codec, refresh, delay, prompt)
