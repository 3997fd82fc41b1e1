"""`chosen`: the best tokens of a prompt, held in a store of their own; all others flow on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.scores.score import Score, rank
from kvjax.cache.share import Share, tokens_of
from kvjax.cache.stage import FOREVER, Column, Commit, Statistic
from kvjax.cache.stages.passing import Around
from kvjax.cache.stages.store import Store, Stored, store
from kvjax.cache.types import KV, Partial, Query, Spec


@dataclasses.dataclass(frozen=True)
class Chosen(Around):
    """See `chosen`."""

    n: int | Share
    score: Score | None
    inner: Store

    def __post_init__(self) -> None:
        if not isinstance(self.n, Share) and self.n < 1:
            raise ValueError(f"chosen(n={self.n}): expected at least 1 token")
        if self.inner.keys.n or self.inner.values.n or self.inner.reader is not None:
            raise ValueError(
                f"chosen(storage={self.inner}): what it holds never changes, so the store needs "
                "neither exact windows nor a reader"
            )

    @property
    def streaming(self) -> bool:
        return False

    @property
    def columns(self) -> tuple[Column, ...]:
        return () if self.score is None else self.score.columns

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        own = () if self.score is None else self.score.statistics
        return (*own, *self.inner.statistics)

    def _most(self, spec: Spec) -> int:
        """Tokens per head that a full prompt leaves here, in whole units of the store."""
        n = min(tokens_of(self.n, spec), spec.prompt) if spec.prompt else 0
        return n // self.inner.unit * self.inner.unit

    def _split(self, spec: Spec) -> Spec:
        """The spec of what is selected apart: heads and layers may choose differently."""
        return spec if self.score is None else self.score.apart(spec)

    def init(self, spec: Spec) -> Stored:
        if spec.totals is not None:
            raise ValueError("chosen(...) needs heads of equal budget, not a ragged one")
        most = self._most(spec)
        inner = self._split(spec).replace(max_length=most, prompt=most, columns=self.lasting(spec))
        return self.inner.init(inner, whole=True)

    def downstream(self, spec: Spec) -> Spec:
        if self.score is not None and self.score.refuses:
            return self._split(spec)
        # A shorter prompt may leave more: all but its whole units.
        left = max(spec.prompt - self._most(spec), min(self.inner.unit - 1, spec.prompt))
        later = spec.max_length - spec.prompt
        return self._split(spec).replace(max_length=left + later, prompt=left)

    def attend(
        self, state: Stored, layer: Array, query: Query, carry: Any
    ) -> tuple[Partial | None, Any]:
        if state.spec.max_length == 0:
            return None, carry
        return super().attend(state, layer, query, carry)

    def commit(self, state: Stored, kv: KV, context: Commit) -> tuple[Stored, KV]:
        most = state.spec.max_length
        if context.phase != "prefill" or most == 0:
            return state, kv
        there = kv.pos >= 0
        if self.score is None:
            place = jnp.arange(kv.size)
            number = kv.count
        else:
            value = self.score(kv, context, state.spec.unrotated)
            value = jnp.broadcast_to(value, (*state.spec.lead, kv.size))
            there = jnp.broadcast_to(there, value.shape) & (value > -jnp.inf)
            place = jnp.argsort(rank(jnp.where(there, value, -jnp.inf), kv), -1)
            number = jnp.sum(there, -1)
        unit = self.inner.unit
        number = jnp.minimum(number, most) // unit * unit
        wins = there & (place < number[..., None])
        stay, _ = buffer.compact(kv, wins)
        state, _ = self.inner.commit(state, buffer.head(stay, most), context)
        over, _ = buffer.compact(kv, ~wins & (kv.pos >= 0))
        return state, over

    def horizon(self, state: Stored) -> tuple[Array, bool]:
        return jnp.full(state.seen.shape[1:2], FOREVER), False


def chosen(n: int | Share, score: Score | None = None, storage: Store | None = None) -> Chosen:
    """Of a complete prompt, holds the best n tokens for good; the others, and all that come later,
    flow on. Acts in `finish`; until then the chain holds the exact prompt.

    With a score that knows sinks it protects them, `chosen(20, score)`; without one it holds the
    oldest, so that `chosen(share(1), None, store(a)) > store(b)` codes the prompt in another way
    than what follows it. Only whole units of the store's codec are taken (a codec of 64 tokens
    takes the largest multiple of 64).

    Args:
      n: tokens per row and head, or a `share` of the prompt; at most the prompt.
      score: how much a token is worth; None: older ones more. Tokens worth -inf are not chosen.
      storage: a store without exact windows; None: exact.

    >>> chosen(20) == chosen(20, None, store())
    True
    """
    return Chosen(n, score, store() if storage is None else storage)
