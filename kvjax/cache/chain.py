"""`chain`: stages in a row. Tokens enter at the front; what one stage does not keep flows on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.attention import attend_slots
from kvjax.cache.rule import Rule
from kvjax.cache.stage import (
    FOREVER,
    Column,
    Commit,
    InputMark,
    Replay,
    Stage,
    Statistic,
    TokenMark,
    most,
    observe_slots,
    total,
)
from kvjax.cache.types import KV, Partial, Query, Spec, merge, pytree


@pytree("spec", "due")
class Pending:
    """The exact prompt of a chain that must see all of it before it can act.

    Attributes:
      kv: every prompt token so far, in order of arrival, with all columns of the chain.
      seen: int32 [1, B, 1], tokens so far; [L, B, 1] where layers hold different ones.
      stats: prompt statistics by name.
      due: whether what is held must be replayed before it is finished; static.
    """

    kv: KV
    seen: Array
    stats: dict[str, Any]
    spec: Spec
    due: bool = False


@dataclasses.dataclass(frozen=True)
class Chain:
    """Stages applied one after the other; a monoid under `chain`. See `chain`."""

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        for place, stage in enumerate(self.stages):
            if stage.first_only and place > 0:
                raise ValueError(
                    f"{stage} keeps every token at its position and must stand first in a chain, "
                    f"but stands at place {place + 1} of {len(self.stages)}"
                )
        rules = [str(stage) for stage in self.stages if getattr(stage, "rule", None)]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)}: a prompt is computed under one rule")

    # --- what the chain asks for ---

    @property
    def streaming(self) -> bool:
        """Whether commits act at once; otherwise the exact prompt is held until `finish`."""
        ordered = True
        for stage in self.stages:
            if not stage.streaming or (stage.by_arrival and not ordered):
                return False
            ordered &= stage.in_order
        return True

    @property
    def unrotated(self) -> bool:
        """Whether keys travel (and are held) before rotary rotation."""
        return any(stage.unrotated for stage in self.stages)

    @property
    def columns(self) -> tuple[Column, ...]:
        return _union(stage.columns for stage in self.stages)

    @property
    def input_marks(self) -> tuple[InputMark, ...]:
        """Columns that `forward` makes from what each layer reads."""
        return tuple(column for column in self.columns if isinstance(column, InputMark))

    @property
    def token_marks(self) -> tuple[TokenMark, ...]:
        """Columns that `forward` makes from token ids and positions."""
        return tuple(column for column in self.columns if isinstance(column, TokenMark))

    @property
    def made(self) -> tuple[Column, ...]:
        """All columns of a prompt's tokens that `forward` makes."""
        noted = () if self.rule is None else self.rule.notes
        return (*self.input_marks, *self.token_marks, *noted)

    @property
    def replays(self) -> tuple[Replay, ...]:
        """Columns for which the prompt is read again before `finish`."""
        return tuple(column for column in self.columns if isinstance(column, Replay))

    @property
    def rule(self) -> Rule | None:
        """The rule among the rows of a prompt; None: all see all rows up to them."""
        return next((s.rule for s in self.stages if getattr(s, "rule", None)), None)

    def constants(self, width: int) -> tuple[str, ...]:
        """Names of the constants that the stages read."""
        own = (column.constants for column in self.columns)
        return _union([*(stage.constants(width) for stage in self.stages), *own])

    def given(self, constants: Mapping[str, Any], batch: int) -> tuple[Array, int] | None:
        """Tokens that rows see before any is committed; see `Stage.given`."""
        found = [stage.given(constants, batch) for stage in self.stages]
        found = [one for one in found if one is not None]
        if not found:
            return None
        return sum(rows for rows, _ in found[1:]) + found[0][0], sum(most for _, most in found)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return _union(stage.statistics for stage in self.stages)

    def needs_attention(self, state: Any) -> bool:
        """Whether commits into this state must be given attention statistics."""
        pending = isinstance(state, Pending)
        later = not pending and any(stage.observes for stage in self.stages)
        return bool(later or self._observing(0, not pending) or (pending and self.statistics))

    def _columns_from(self, place: int) -> tuple[Column, ...]:
        """Columns held at `place`: what it and later stages ask for, and what tokens bring."""
        brought = (c for stage in self.stages[:place] for c in stage.columns if c.lasting)
        return _union([brought, *(stage.columns for stage in self.stages[place:])])

    def _observing(self, place: int = 0, finished: bool = False) -> tuple[Column, ...]:
        """Those of them that commits update; `finished`: not for stages that have acted."""
        stages = [s for s in self.stages[place:] if not (finished and s.once)]
        wanted = _union(stage.columns for stage in stages)
        return tuple(c for c in self._columns_from(place) if c.observes and c in wanted)

    # --- the contract ---

    def init(self, spec: Spec) -> Any:
        """State before a prompt of at most `spec.prompt` tokens (0: none, ready for tokens)."""
        whole = spec.whole_prompt or spec.prompt
        spec = spec.replace(unrotated=self.unrotated, whole_prompt=whole)
        if self.rule is not None and self.rule.drops:
            spec = spec.replace(per_layer=True)
        if self.streaming or spec.prompt == 0:
            return self._init_stages(spec)
        jax.eval_shape(lambda: self._init_stages(spec))  # raises what is wrong with sizes, early
        names = tuple(column.name for column in self.columns)
        return Pending(
            buffer.empty(spec, spec.slots(spec.prompt), names),
            jnp.zeros(spec.lead, jnp.int32),
            {s.name: s.init(spec) for s in self.statistics},
            spec,
        )

    def _init_stages(self, spec: Spec | None) -> tuple[Any, ...]:
        states = []
        for place, stage in enumerate(self.stages):
            if spec is None:  # nothing can ever come this far
                states.append(None)
                continue
            names = tuple(column.name for column in self._columns_from(place))
            spec = spec.replace(columns=names)
            states.append(stage.init(spec))
            spec = stage.downstream(spec)
        return tuple(states)

    def start(self, state: Any, pos: Array) -> tuple[Any, ...]:
        """What the stages carry into the first layer; rows at pos [B, T]."""
        if isinstance(state, Pending):
            return ()
        return tuple(
            () if own is None else stage.start(own, pos) for stage, own in zip(self.stages, state)
        )

    def attend(
        self, state: Any, layer: Array, query: Query, carry: tuple[Any, ...]
    ) -> tuple[Partial, tuple[Any, ...]]:
        """Attention of the query rows over everything held: a fold of the stages' partials."""
        if isinstance(state, Pending):
            done, carry = _attend(_attend_pending, state, layer, query, carry)
            for stage in self.stages:
                if stage.given(query.constants, query.q.shape[0]) is not None:
                    done = merge(done, stage.attend(None, layer, query, ())[0])
            return done, carry
        if any(getattr(stage, "positions", "true") == "slot" for stage in self.stages):
            opening = jnp.min(jnp.where(query.pos >= 0, query.pos, FOREVER), 1)
            given = self.given(query.constants, query.q.shape[0])
            held = self.held(state) + (0 if given is None else given[0])
            query = dataclasses.replace(query, gap=opening - held)
        shape = query.q.shape[:3]
        done, carry = None, list(carry)
        for place, (stage, own) in enumerate(zip(self.stages, state)):
            if own is None:
                continue
            part, carry[place] = _attend(stage.attend, own, layer, query, carry[place])
            if part is not None:
                done = part if done is None else merge(done, part)
        done = Partial.identity(shape, query.q.shape[-1]) if done is None else done
        return done, tuple(carry)

    def commit(self, state: Any, kv: KV, context: Commit) -> Any:
        """Takes tokens (compact, ascending by position), keys rotated unless `unrotated`."""
        if kv.pos.shape[0] > 1:  # layers hold different rows: make them compact in each
            if self.rule is None or not self.rule.drops:
                raise ValueError(
                    f"new.kv.pos has shape {kv.pos.shape}: {self} has no rule by which layers hold "
                    "different rows; call forward with this cache"
                )
            kv = buffer.by_position(kv)
        columns = self._observing(0, not isinstance(state, Pending))
        if columns and context.seen is not None:
            k = context.rotated(kv, self.unrotated)
            fresh = {
                c.name: c.update(buffer.column(kv, c.name), k, kv.pos, context) for c in columns
            }
            kv = dataclasses.replace(kv, extra={**kv.extra, **fresh})
        context = dataclasses.replace(context, columns=kv.extra)
        if isinstance(state, Pending):
            return self._hold(state, kv, context)
        if columns and context.seen is not None:
            state = tuple(
                own if own is None else stage.observe(own, self._observing(place, True), context)
                for place, (stage, own) in enumerate(zip(self.stages, state))
            )
        return self._push(0, state, kv, context)

    def _hold(self, state: Pending, kv: KV, context: Commit) -> Pending:
        if context.phase != "prefill":
            raise ValueError(
                f"commit(phase={context.phase!r}): the prompt is not finished; this chain holds it "
                "exactly until finish(cache), because a stage needs all of it: "
                f"{', '.join(str(s) for s in self.stages if not s.streaming)}"
            )
        absent = [column.name for column in self.made if column.name not in kv.extra]
        if absent:
            raise ValueError(
                f"this chain needs the columns {absent} of a prompt's tokens: call "
                "forward(..., cache, phase='prefill') with the same cache, so that it makes them"
            )
        held = observe_slots(state.kv, self._observing(), context, self.unrotated)
        slot = state.seen[..., None] + jnp.arange(kv.size, dtype=jnp.int32)
        stats = state.stats
        if self.statistics:
            if context.seen is None:
                raise ValueError(
                    f"statistics {[s.name for s in self.statistics]} need attention statistics of "
                    "the rows: call forward with this cache, so that it computes them"
                )
            k = context.rotated(kv, self.unrotated)
            stats = {s.name: s.update(stats[s.name], k, context) for s in self.statistics}
        held = buffer.put(held, slot, kv, context.layout)
        return Pending(held, state.seen + kv.count, stats, state.spec, bool(self.replays))

    def _push(self, place: int, state: tuple, kv: KV, context: Commit) -> tuple:
        """Commits into the stages from `place` on; `state` is theirs."""
        if place == len(self.stages) or state[0] is None:
            return state
        stage = self.stages[place]
        last = place + 1 == len(self.stages) or state[1] is None
        own, over = stage.commit(state[0], kv, dataclasses.replace(context, last=last))
        leaves = False if last else stage.releases(state[0], kv)
        if leaves is False:
            return (own, *state[1:])

        def flow(rest: tuple) -> tuple:
            return self._push(place + 1, rest, over, context)

        if leaves is True or kv.size > buffer.FEW or context.phase == "prefill":
            return (own, *flow(state[1:]))  # a finished prompt passes every stage: some fit to it
        ends = place + 2 == len(self.stages) or state[2] is None
        if ends and self.stages[place + 1].light:
            return (own, *flow(state[1:]))
        # Most single tokens move nothing: branch once, outside of all layers and rows. A stage's
        # own state stays outside: what a branch both reads and writes would be copied.
        return (own, *jax.lax.cond(leaves, flow, lambda rest: rest, state[1:]))

    def finish(
        self, state: Any, context: Commit, stats: Mapping[str, Any] | None = None
    ) -> tuple[Any, ...]:
        """Once, after the last chunk of a prompt: lets the stages act on all of it."""
        if not isinstance(state, Pending):
            return state
        if state.due:
            raise ValueError(
                f"finish: this chain chooses by {[c.name for c in self.replays]}, for which the "
                "prompt is read again first: call kvjax.decode.replay (prefill does)"
            )
        ready = self._init_stages(state.spec)
        stats = {**state.stats, **(stats or {})}
        context = dataclasses.replace(context, phase="prefill", seen=None, stats=stats, whole=True)
        kv = buffer.by_position(state.kv)
        kv.extra.update({c.name: c.complete(kv.extra[c.name], kv.pos) for c in self.columns})
        return self._push(0, ready, kv, context)

    def held(self, state: Any) -> Array:
        """Tokens held, int32 [B]."""
        if isinstance(state, Pending):
            return most(state.seen)
        batch = [stage.held(own) for stage, own in zip(self.stages, state) if own is not None]
        return sum(batch[1:], batch[0])

    def tokens(self, state: Any) -> Array:
        """Tokens held, summed over layers, rows and key-value heads: int32 scalar."""
        if isinstance(state, Pending):
            return total(state.seen, state.spec)
        return sum(s.tokens(own) for s, own in zip(self.stages, state) if own is not None)

    def horizon(self, state: Any) -> Array:
        """How many tokens may be committed in one go so that each was computed from what plain
        decoding would have shown it, int32 [B], at least 1.

        Committing fewer than `horizon` tokens changes neither what is visible nor its form.
        """
        if isinstance(state, Pending):
            return jnp.full(state.seen.shape[1:2], FOREVER)
        if not self.stages:
            raise ValueError("an empty chain holds nothing and has no horizon")
        reach = FOREVER
        for stage, own in zip(self.stages, state):
            mine, final = stage.horizon(own)
            reach = jnp.minimum(reach, mine)
            if final:
                return reach
        return jnp.ones_like(reach)  # what leaves the last stage is forgotten at once


def _attend(attend: Any, state: Any, layer: Array, query: Query, carry: Any) -> Any:
    """`attend`, where slots are split over devices by each of them for its own."""
    if query.layout is None:
        return attend(state, layer, query, carry)
    return query.layout.attend(attend, state, layer, query, carry)


def _attend_pending(state: Pending, layer: Array, query: Query, carry: Any) -> tuple[Partial, Any]:
    used = jnp.max(state.seen)
    return attend_slots(state.kv, layer, query, used, state.spec.unrotated), carry


def _union(groups: Any) -> tuple:
    """Concatenates, keeping the first of equals."""
    return tuple(dict.fromkeys(item for group in groups for item in group))


def chain(*stages: Stage | Chain) -> Chain:
    """Stages in a row: each keeps some tokens and passes the rest on; the last forgets them.

    `chain` flattens, so it is associative, and `chain()` is its identity, by plain equality.

    >>> from kvjax.cache import first, recent
    >>> chain(chain(first(4)), recent(8)) == chain(first(4), chain(recent(8)), chain())
    True
    """
    flat: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Chain):
            flat.extend(stage.stages)
        elif isinstance(stage, Stage):
            flat.append(stage)
        else:
            raise ValueError(f"chain({stage!r}): expected stages or chains")
    return Chain(tuple(flat))
