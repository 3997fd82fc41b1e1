"""Scores made of others: protected ends, and attention from all rows beside that from the last."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import received
from kvjax.cache.scores.score import LastRows, Received, Rows, Score
from kvjax.cache.stage import Column, Commit, Statistic
from kvjax.cache.types import KV, Observation

TERMS = ("sum", "max", "global", "local")


@dataclasses.dataclass(frozen=True)
class Protect(Score):
    """See `protect`."""

    inner: Score
    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise ValueError(
                f"protect(first={self.first}, last={self.last}): expected no negative number"
            )

    @property
    def streaming(self) -> bool:
        return self.inner.streaming and self.last == 0

    @property
    def over_set(self) -> bool:
        return self.inner.over_set or self.last > 0

    @property
    def per_head(self) -> bool:
        return self.inner.per_head

    @property
    def per_layer(self) -> bool:
        return self.inner.per_layer

    @property
    def always(self) -> int:
        return self.first + self.last

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.inner.columns

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return self.inner.statistics

    def importance(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        return self.inner.importance(kv, context, unrotated)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        value = self.inner(kv, context, unrotated)
        safe = kv.pos < self.first
        if self.last:
            safe |= kv.pos > jnp.max(kv.pos, -1, keepdims=True) - self.last
        return jnp.where(safe, jnp.inf, value)


def protect(score: Score, first: int = 0, last: int = 0) -> Score:
    """`score`, but positions below `first` and the newest `last` of those compared always stay."""
    return Protect(score, first, last)


@dataclasses.dataclass(frozen=True)
class GlobalLocal(Score):
    """See `global_local`."""

    window: int = 32
    terms: Literal["sum", "max", "global", "local"] = "sum"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"global_local(window={self.window}): at least 1 row must vote")
        if self.terms not in TERMS:
            raise ValueError(f"global_local(terms={self.terms!r}): expected one of {TERMS}")

    @property
    def columns(self) -> tuple[Column, ...]:
        return () if self.terms == "local" else (Received("attention"),)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        if self.terms == "global":
            return ()
        return (LastRows(f"last_{self.window}_rows", self.window),)

    def __call__(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        if self.terms == "global":
            return kv.extra["attention"]
        rows: Rows = context.stats[self.statistics[0].name]
        seen = Observation(rows.q, rows.max, rows.sum, rows.pos, rows.span)
        weight = (rows.pos >= 0).astype(jnp.float32)
        local = received(context.rotated(kv, unrotated), kv.pos, seen, weight, context.softcap)
        if self.terms == "local":
            return local
        whole = kv.extra["attention"]
        # Sums over the same tokens: their ratio is that of the means.
        there = kv.pos >= 0
        sum_of = lambda x: jnp.sum(jnp.where(there, x, 0.0), -1, keepdims=True)  # noqa: E731
        total = sum_of(local)
        local = local * sum_of(whole) / jnp.where(total > 0, total, 1.0)
        return whole + local if self.terms == "sum" else jnp.maximum(whole, local)


def global_local(
    window: int = 32, terms: Literal["sum", "max", "global", "local"] = "sum"
) -> Score:
    """Attention received from all rows of the prompt, and from its last `window` rows.

        s_j = g_j + l_j mean(g) / mean(l);  g_j = sum_i mean_g softmax(q_gi . k)_j over all rows i,
                                            l_j the same over the last `window` rows

    The first favours early tokens, which more rows see, the second late ones; brought to one mean
    they are added ("sum") or the larger counts ("max"). "global" and "local": one of them alone.
    """
    return GlobalLocal(window, terms)
