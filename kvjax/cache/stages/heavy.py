"""`heavy`: the best n tokens by a score; the others flow on, or melt into those that stay."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.budgets import Budget
from kvjax.cache.scores.score import Score, rank
from kvjax.cache.share import Share, as_fraction, tokens_of
from kvjax.cache.stage import FOREVER, Column, Commit, least
from kvjax.cache.stages.absorb import WORTH, Absorb
from kvjax.cache.stages.windows import Slots, SlotStage
from kvjax.cache.types import KV, Spec

LOCAL = "score"


@dataclasses.dataclass(frozen=True)
class Growth:
    """See `growth`."""

    part: Fraction
    beside: int | Share = 0

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise ValueError(f"growth(part={float(self.part)}): a part of all lies in (0, 1]")

    def limit(self, arrived: Any, spec: Spec) -> Any:
        """Tokens to be held of `arrived` (int or int32 array): at least 1."""
        beside = tokens_of(self.beside, spec)
        number = (arrived + beside) * self.part.numerator // self.part.denominator - beside
        return max(number, 1) if isinstance(number, int) else jnp.maximum(number, 1)


def growth(part: float | Fraction, beside: int | Share = 0) -> Growth:
    """A size that grows: floor(part * (t + beside)) - beside tokens, after t have arrived.

    In `chain(recent(m), heavy(growth(0.2, beside=m), score))` both together always hold a fifth of
    all tokens, the window being m of them.

    Args:
      part: of all tokens, in (0, 1]; with 1 none ever leaves.
      beside: tokens that a stage in front holds.
    """
    return Growth(as_fraction(part), beside)


@dataclasses.dataclass(frozen=True)
class Heavy(SlotStage):
    """See `heavy`."""

    n: int | Share | Growth
    score: Score
    recent: int | Fraction = 0
    absorb: Absorb | None = None
    codec: Any = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        self._pair()
        if self.codec is not None and (self.absorb is not None or self.score.over_set):
            raise ValueError(
                f"heavy(codec={self.codec}): merging, and scores that compare tokens, need exact "
                "keys; leave out the codec, absorb or the score"
            )
        if isinstance(self.n, int) and self.n < 1:
            raise ValueError(f"heavy(n={self.n}): n must be at least 1")
        part = isinstance(self.recent, Fraction)
        most = 1 if part else self.n if isinstance(self.n, int) else self.recent
        if not 0 <= self.recent <= most:
            raise ValueError(
                f"heavy(n={self.n}, recent={self.recent}): the recent tokens are among the n"
            )
        if self.budget is not None and isinstance(self.n, Growth):
            raise ValueError(f"heavy(n={self.n}, budget={self.budget}): layers share a fixed sum")
        if self.score.statistics:
            raise ValueError(
                f"heavy(score={self.score}) needs statistics of a whole prompt, which only prune "
                "has; use a score that new tokens can be given, such as accumulated_attention()"
            )

    @property
    def streaming(self) -> bool:
        alone = self.absorb is None and self.budget is None
        return self.score.streaming and self.recent == 0 and alone

    @property
    def by_arrival(self) -> bool:
        return not self.streaming

    @property
    def in_order(self) -> bool:
        return False

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.score.columns

    def _limit(self, arrived: Any, spec: Spec) -> Any:
        """How many of `arrived` tokens are held at most: an int, or like `arrived`."""
        if isinstance(self.n, Growth):
            return self.n.limit(arrived, spec)
        return tokens_of(self.n, spec)

    @property
    def _local(self) -> bool:
        """Whether the score is of the token alone: computed once, kept in a column of ours."""
        return not self.score.columns and not self.score.over_set

    def _apart(self, spec: Spec) -> Spec:
        """`spec` where layers and heads may hold different tokens."""
        spec = self.score.apart(spec)
        if self.absorb is None and self.budget is None:
            return spec
        return spec.replace(per_layer=True, per_head=True)

    def init(self, spec: Spec) -> Slots:
        extra = (LOCAL,) if self._local else ()
        extra += self.absorb.extra if self.absorb else ()
        spec = self._apart(spec)
        n = slots = self._limit(spec.max_length, spec)
        if self.recent > n:
            raise ValueError(f"heavy(n={n}, recent={self.recent}): the recent are among the n")
        memory = self.absorb.init(spec) if self.absorb else {}
        if self.budget is not None:
            slots = max(self.budget.most(n, spec.max_length, spec.kv_heads), n)
            memory["limit"] = jnp.full(spec.lead, n, jnp.int32)
        return self._empty(spec, min(slots, spec.max_length), extra).replace(memory=memory)

    def downstream(self, spec: Spec) -> Spec | None:
        n = self._limit(spec.max_length, spec)
        if spec.max_length <= n:
            return None
        held = n if self.budget is None else 1
        prompt = max(spec.prompt - (self._limit(spec.prompt, spec) if held > 1 else held), 0)
        return self._apart(spec.less(held).replace(prompt=prompt))

    def _most(self, state: Slots, arrived: Any) -> Any:
        """`_limit`, or what the layers' budget said when the prompt was finished."""
        return state.memory.get("limit", self._limit(arrived, state.spec))

    def releases(self, state: Slots, kv: KV) -> Array:
        after = state.seen + kv.count
        return jnp.any(after > self._most(state, after))

    def _value(self, kv: KV, context: Commit, unrotated: bool) -> Array:
        if self._local:
            return kv.extra[LOCAL]
        return self.score(kv, context, unrotated)

    def commit(self, state: Slots, kv: KV, context: Commit) -> tuple[Slots, KV]:
        spec = state.spec
        if self._local:
            value = self.score(kv, context, spec.unrotated)
            value = jnp.broadcast_to(value, (*kv.lead, kv.size))
            kv = dataclasses.replace(kv, extra={**kv.extra, LOCAL: value})
        arrived = jnp.broadcast_to(kv.count, spec.lead)
        kv = dataclasses.replace(kv, extra={n: buffer.column(kv, n) for n in state.kv.extra})
        kv = self._store(kv, spec)
        limit, memory = self._most(state, state.seen + arrived), state.memory
        alone = self.score.over_set or (self.absorb is not None and self.absorb.weighs)
        if kv.size == 1 and not alone:
            held, over = self._replace_one(state.kv, kv, context, spec.unrotated, limit)
            if self.absorb is not None:
                held, gone, memory = self.absorb(held, over, memory, context.layout)
                over = dataclasses.replace(over, pos=jnp.where(gone, -1, over.pos))
        else:
            both = buffer.by_position(buffer.concat(state.kv, kv))
            lead = both.pos.shape[:3]
            value = self._value(both, context, spec.unrotated)[: lead[0], :, : lead[2]]
            if self.budget is not None and context.phase == "prefill" and spec.prompt:
                # Where all fits, there is nothing to share out.
                n = self._limit(0, spec)
                worth = jnp.where(both.pos >= 0, value, -jnp.inf)
                each = jnp.full(spec.lead[:2], n, jnp.int32)
                shared = self.budget.heads(jnp.broadcast_to(worth, both.pos.shape), each)
                limit = jnp.where(both.count <= n, n, jnp.minimum(shared, state.kv.size))
                memory = {**memory, "limit": limit}
            held, over, memory = self._select(
                both, value, state.kv.size, kv.size, context, spec.unrotated, limit, memory
            )
        over = dataclasses.replace(over, extra={n: over.extra[n] for n in spec.columns})
        state = state.replace(kv=held, seen=state.seen + arrived, memory=memory)
        return state, self._load(over, spec)

    def _protected(self, pos: Array, newest: Array, limit: Any) -> Array:
        """The `recent` newest positions."""
        if not self.recent:
            return jnp.zeros((), bool)
        recent = self.recent
        if isinstance(recent, Fraction):  # of what each head holds, beside those that always stay
            limit = jnp.asarray(limit)
            part = limit * recent.numerator // recent.denominator
            recent = jnp.minimum(part, limit - self.score.always)[..., None]
        return (pos > newest - recent) & (pos >= 0)

    @property
    def _varies(self) -> bool:
        """Whether heads may hold fewer tokens than there are slots."""
        return isinstance(self.n, Growth) or self.budget is not None

    def _replace_one(
        self, held: KV, kv: KV, context: Commit, unrotated: bool, limit: Any
    ) -> tuple[KV, KV]:
        """One new token takes a free slot, or that of the worst; or is itself the worst."""
        lead = held.pos.shape[:3]
        newest = jnp.maximum(jnp.max(held.pos, -1, keepdims=True), kv.pos)

        def worth(tokens: KV) -> tuple[Array, Array]:
            value = self._value(tokens, context, unrotated)[: lead[0], :, : lead[2]]
            pos = jnp.broadcast_to(tokens.pos, (*lead, tokens.size))
            value = jnp.where(self._protected(pos, newest, limit), jnp.inf, value)
            return value, pos

        value, pos = worth(held)
        # Free slots are taken first, up to the limit.
        free = -jnp.inf
        if self._varies:
            room = jnp.sum(pos >= 0, -1, dtype=jnp.int32) < limit
            free = jnp.where(room, -jnp.inf, jnp.inf)[..., None]
        value = jnp.where(pos >= 0, value, free)
        low = jnp.min(value, -1, keepdims=True)
        # Among equals the highest position goes.
        choice = jnp.where(value == low, jnp.where(pos < 0, jnp.iinfo(jnp.int32).max, pos), -1)
        slot = jnp.argmax(choice, -1, keepdims=True).astype(jnp.int32)
        free = jnp.take_along_axis(pos, slot, -1) < 0
        mine, mypos = worth(kv)
        older = mypos < jnp.take_along_axis(pos, slot, -1)
        enters = (mypos >= 0) & (free | (mine > low) | ((mine == low) & older))
        gone = enters & ~free
        leave = lambda held: buffer.take(held, jnp.where(gone, slot, -1))  # noqa: E731
        out = buffer.read_if(jnp.any(gone), 1, leave, held)
        rejected = (mypos >= 0) & ~enters

        def pick(a: Array, b: Array) -> Array:
            at = rejected.reshape(rejected.shape + (1,) * (a.ndim - 4))
            return jnp.where(at, b.astype(a.dtype), a)

        over = jax.tree.map(pick, out, dataclasses.replace(kv, pos=mypos))
        slot = buffer.after(slot, *jax.tree.leaves(out))
        return buffer.put(held, jnp.where(enters, slot, -1), kv, context.layout), over

    def _select(
        self, both: KV, value: Array, slots: int, came: int, context: Commit, unrotated: bool,
        limit: Any, memory: dict[str, Array],
    ) -> tuple[KV, KV, dict[str, Array]]:  # fmt: skip
        """Many new tokens: all compete anew."""
        newest = jnp.max(both.pos, -1, keepdims=True)
        value = jnp.where(self._protected(both.pos, newest, limit), jnp.inf, value)
        order = rank(value, both)
        place = jnp.argsort(order, -1)
        most = limit[..., None] if self._varies else slots
        wins = (place < most) & (both.pos >= 0)
        if self.absorb is not None and self.absorb.weighs:
            worth = self.score.importance(both, context, unrotated)
            worth = jnp.broadcast_to(worth, (*both.lead, both.size))
            both = dataclasses.replace(both, extra={**both.extra, WORTH: worth})
        stay, _ = buffer.compact(both, wins)
        lose, _ = buffer.compact(both, ~wins & (both.pos >= 0))
        # At most as many can lose as came.
        stay, lose = buffer.head(stay, slots), buffer.head(lose, came)
        if self.absorb is not None:
            stay, gone, memory = self.absorb(stay, lose, memory)
            stay.extra.pop(WORTH, None)
            lose, _ = buffer.compact(lose, ~gone & (lose.pos >= 0))
        return stay, lose, memory

    def horizon(self, state: Slots) -> tuple[Array, bool]:
        n = self._limit(1 if isinstance(self.n, Growth) else 0, state.spec)
        n = least(state.memory["limit"]) if "limit" in state.memory else n
        reach = n - jnp.minimum(least(state.seen), n) + 1
        if self.downstream(state.spec) is None:
            reach = jnp.full_like(reach, FOREVER)
        return (jnp.ones_like(reach) if self._recodes(state.spec) else reach), True


def heavy(
    n: int | Share | Growth,
    score: Score,
    recent: int | Fraction = 0,
    absorb: Absorb | None = None,
    codec: Any = None,
    budget: Budget | None = None,
) -> SlotStage:
    """The best n tokens by `score`, exactly; the others flow on.

    A single new token replaces the worst held one in place, unless scores compare tokens; a bulk
    competes with all held.

    Args:
      n: tokens held per row and head, a `share` of the prompt, or a `growth` with all tokens.
      score: how much a token is worth; one that new tokens can be given.
      recent: of the n, the tokens at the newest `recent` positions always stay; a `Fraction`: that
        part of what each head holds.
      absorb: merging rule for those that lose their place, such as `nearest(0.5)`.
      codec: per-token codec for the held tokens, e.g. quantize(8); None: exact.
      budget: how layers and heads share n, their mean, when the prompt is finished; from then on
        each holds as many. Slots are allocated for the most that one can get.
    """
    return Heavy(n, score, recent, absorb, codec, budget)
