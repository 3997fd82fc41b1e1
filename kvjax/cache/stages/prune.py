"""`prune`: once a prompt is complete, its best tokens flow on and the rest is forgotten."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.budgets import Budget, uniform
from kvjax.cache.scores.score import Score, rank
from kvjax.cache.stage import Carried, Column, Commit, Statistic
from kvjax.cache.stages.absorb import WORTH, Absorb
from kvjax.cache.stages.passing import Passing, Stateless
from kvjax.cache.types import KV, Spec

UNIFORM = uniform()


@dataclasses.dataclass(frozen=True)
class Prune(Passing):
    """See `prune`."""

    score: Score
    n: int | None = None
    keep: Fraction | None = None
    budget: Budget = UNIFORM
    absorb: Absorb | None = None

    @property
    def streaming(self) -> bool:
        return False

    @property
    def once(self) -> bool:
        return True

    @property
    def columns(self) -> tuple[Column, ...]:
        kept = self.absorb.extra if self.absorb else ()
        return (*self.score.columns, *map(Carried, kept))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return self.score.statistics

    def kept(self, length: Any) -> Any:
        """Mean tokens kept per head of a prompt of `length` (int, NumPy or JAX)."""
        xp = jnp if isinstance(length, Array) else np
        if self.keep is None:
            return xp.minimum(self.n, length)
        return xp.maximum(
            length * self.keep.numerator // self.keep.denominator, xp.minimum(1, length)
        )

    def _layers(self, spec: Spec) -> list[int]:
        """Tokens per head that each layer keeps of a full-length prompt, static."""
        prompt = np.asarray(spec.prompt)
        return [
            int(n) for n in self.budget.layers(np.asarray(self.kept(prompt)), prompt, spec.layers)
        ]

    def init(self, spec: Spec) -> Stateless:
        kept, always = int(self.kept(np.asarray(spec.prompt))), self.score.always
        if kept < min(always, spec.prompt):
            size = f"n={self.n}" if self.keep is None else f"keep={float(self.keep):g}"
            raise ValueError(
                f"prune({size}) keeps {kept} of a prompt of {spec.prompt} tokens, but "
                f"{self.score} always keeps {min(always, spec.prompt)}: keep more, or give the "
                "score fewer such tokens"
            )
        return super().init(spec)

    def downstream(self, spec: Spec) -> Spec | None:
        each = self._layers(spec)
        most = max(self.budget.most(n, spec.prompt, spec.kv_heads) for n in each)
        most = min(most, spec.prompt)
        ragged = self.budget.ragged
        apart = ragged or self.absorb is not None
        split = self.score.apart(spec)
        totals = tuple(n * spec.kv_heads for n in each)
        return split.replace(
            max_length=most + spec.max_length - spec.prompt,
            prompt=most,
            per_layer=split.per_layer or apart,
            per_head=split.per_head or apart,
            totals=((sum(totals),) if self.budget.shared else totals) if ragged else spec.totals,
        )

    def commit(self, state: Any, kv: KV, context: Commit) -> tuple[Any, KV]:
        spec = state.spec
        if context.phase != "prefill" or spec.prompt == 0:
            return state, kv
        after = self.downstream(spec)
        value = self.score(kv, context, spec.unrotated)
        value = jnp.broadcast_to(value, (*after.lead, kv.size))
        value = jnp.where(kv.pos >= 0, value, -jnp.inf)  # no votes for what is not there
        length = jnp.max(kv.count, (0, 2))
        kept = jnp.maximum(self.kept(length), jnp.minimum(self.score.always, length))
        per_head = self.budget.layers(kept, length, spec.layers)
        # Room is made for a prompt of full length; a shorter one may ask a layer for more.
        per_head = jnp.minimum(per_head, jnp.asarray(self._layers(spec))[:, None])
        number = self.budget.heads(value, per_head[: after.lead[0]])
        wins = (jnp.argsort(rank(value, kv), -1) < number[..., None]) & (kv.pos >= 0)
        if self.absorb is None:
            kept, _ = buffer.compact(kv, wins)
            return state, buffer.head(kept, after.prompt)
        names = {n: buffer.column(kv, n) for n in self.absorb.extra}
        if self.absorb.weighs:
            worth = self.score.importance(kv, context, spec.unrotated)
            names[WORTH] = jnp.broadcast_to(worth, (*kv.lead, kv.size))
        kv = dataclasses.replace(kv, extra={**kv.extra, **names})
        kept, _ = buffer.compact(kv, wins)
        lost, _ = buffer.compact(kv, ~wins & (kv.pos >= 0))
        kept = buffer.head(kept, after.prompt)
        kept, _, _ = self.absorb(kept, lost, self.absorb.init(spec))
        kept.extra.pop(WORTH, None)
        return state, kept


def prune(
    n: int | None = None,
    score: Score | None = None,
    *,
    keep: float | None = None,
    budget: Budget | None = None,
    absorb: Absorb | None = None,
) -> Prune:
    """Of a complete prompt, lets the best tokens flow on; forgets the rest. Identity afterwards.

    The dual of `heavy`: `chain(prune(keep=0.5, score=...), store(quantize(4)))` stores the best
    half at four bits. Acts in `finish`; until then the chain holds the exact prompt.

    Args:
      n: tokens kept per head (mean over layers and heads, where the budget shares them out).
      score: how much a token is worth.
      keep: in place of n, the fraction of the prompt to keep, in (0, 1]; at least one token.
      budget: how layers and heads share; None: uniformly.
      absorb: merging rule for those that are not kept, such as `nearest(0.5)`; None: forgotten.
    """
    if score is None:
        raise ValueError("prune(score=None): expected a score, such as window_attention()")
    if (n is None) == (keep is None):
        raise ValueError(f"prune(n={n}, keep={keep}): give exactly one of n and keep")
    if n is not None and n < 1:
        raise ValueError(f"prune(n={n}): at least 1 token must be kept")
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"prune(keep={keep}): a fraction of the prompt lies in (0, 1]")
    fraction = None if keep is None else Fraction(keep).limit_denominator(1000)
    return Prune(score, n, fraction, UNIFORM if budget is None else budget, absorb)
