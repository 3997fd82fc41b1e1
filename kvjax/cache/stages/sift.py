"""`sift`: tokens that pass a test are held in a store of their own, the others flow on."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.rules.covering import fewest
from kvjax.cache.scores.score import Score, rank
from kvjax.cache.share import as_fraction
from kvjax.cache.stage import Column, Commit, Mark, Statistic
from kvjax.cache.stages.passing import Around
from kvjax.cache.stages.store import Store, Stored, store
from kvjax.cache.types import KV, Spec


@dataclasses.dataclass(frozen=True)
class Sift(Around):
    """See `sift`."""

    mark: Mark
    inner: Store
    later: Score | None = None
    cover: float = 1.0
    limit: Fraction = Fraction(1)

    def __post_init__(self) -> None:
        if not 0 < self.cover <= 1:
            raise ValueError(f"sift(cover={self.cover}): a share lies in (0, 1]")
        if not 0 < self.limit <= 1:
            raise ValueError(f"sift(limit={float(self.limit):g}): a part of all lies in (0, 1]")
        if self.later is not None and (self.later.statistics or self.later.per_head):
            raise ValueError(
                f"sift(later={self.later}): expected a score for a whole layer that later tokens "
                "can be given, such as newest_attention()"
            )

    @property
    def streaming(self) -> bool:
        return False

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.mark, *(() if self.later is None else self.later.columns))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return self.inner.statistics

    def _apart(self, spec: Spec) -> Spec:
        return spec.replace(per_layer=True)

    def _room(self, spec: Spec) -> int:
        part = self.limit
        return max(-(-spec.max_length * part.numerator // part.denominator), 1)

    def init(self, spec: Spec) -> Stored:
        if spec.totals is not None:
            raise ValueError("sift(...) needs heads of equal budget, not a ragged one")
        room = self._room(spec)
        own = self._apart(spec).replace(max_length=room, columns=self.lasting(spec))
        return self.inner.init(own.replace(prompt=min(spec.prompt, room)))

    def downstream(self, spec: Spec) -> Spec:
        return self._apart(spec)

    def commit(self, state: Stored, kv: KV, context: Commit) -> tuple[Stored, KV]:
        there = kv.pos >= 0
        if context.phase == "prefill":
            worth = buffer.column(kv, self.mark.name)[:, :, :1]
            passed = there & (worth > -jnp.inf)
            place = jnp.argsort(rank(worth, kv), -1)
        elif self.later is None:
            return state, kv
        else:
            worth = jnp.where(there, self.later(kv, context, state.spec.unrotated), 0.0)
            place = jnp.argsort(rank(worth, kv), -1)
            number = fewest(worth, self.cover)[..., None]
            passed = there & ((self.cover == 1) | (place < number))
        room = state.spec.max_length - state.seen
        wins = passed & (place < room[..., None])  # those that pass stand first
        wins = jnp.broadcast_to(wins, (*state.spec.lead, kv.size))
        stay, _ = buffer.compact(kv, wins)
        state, _ = self.inner.commit(state, stay, context)
        over, _ = buffer.compact(kv, ~wins & there)
        return state, over

    def horizon(self, state: Stored) -> tuple[Array, bool]:
        return self.inner.horizon(state)[0], False


def sift(
    mark: Mark,
    storage: Store | None = None,
    later: Score | None = None,
    cover: float = 1.0,
    limit: float | Fraction = 1,
) -> Sift:
    """Holds what passes a test, in a store of its own; the others flow on. How many pass is data.

    `sift(mark, store(quantize(4))) > store(quantize(2))`: marked tokens at more bits.

    Args:
      mark: a column that a prompt's tokens bring, one value for all heads; those of -inf do not
        pass. Acts in `finish`; until then the chain holds the exact prompt.
      storage: what holds them; None: exactly.
      later: a score for those that come later. Of the tokens that arrive together as few of the
        best pass as hold `cover` of the sum of all scores. None: all of them flow on.
      cover: in (0, 1]; 1: all pass.
      limit: for which part of all tokens there is room, in (0, 1]; the best stay if more pass.

    Raises:
      ValueError: a share out of range; a score that compares heads or needs a whole prompt.

    >>> sift(Mark("good")) == sift(Mark("good"), store(), limit=1.0)
    True
    """
    return Sift(mark, store() if storage is None else storage, later, cover, as_fraction(limit))
