"""`store`: everything that comes, coded. Keys and values may change form at different times."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.attention import dot_keys, dot_rotated, dot_values, visible
from kvjax.cache.kernels import attend_stored
from kvjax.cache.paging import Pool, Rectangle, check_heads, per_layer
from kvjax.cache.readers.ahead import fetch_ahead, nothing_fetched
from kvjax.cache.readers.reader import Reader, each_row_with
from kvjax.cache.readers.reading import attend_read, check_reader, note, reader_horizon, watch
from kvjax.cache.ring import Window
from kvjax.cache.stage import (
    FOREVER,
    Column,
    Commit,
    Stage,
    Statistic,
    exact,
    least,
    most,
    room_of,
    total,
)
from kvjax.cache.stages.fit import Fit
from kvjax.cache.stages.stored import Stored
from kvjax.cache.types import KV, Partial, Query, Spec, merge, partial_attention, rotate
from kvjax.codecs import Codec, PerKV, as_pair, dense


@dataclasses.dataclass(frozen=True)
class Store(Stage):
    """See `store`."""

    codec: PerKV
    keys: Window
    values: Window
    rope: str = "after"
    fit: Fit | None = None
    reader: Reader | None = None
    reach: int | None = None
    host: bool = False

    def __post_init__(self) -> None:
        for name, codec, window in (
            ("keys", self.codec.k, self.keys),
            ("values", self.codec.v, self.values),
        ):
            if window.release % codec.block:
                raise ValueError(
                    f"store({name}={window}): the codec of {name}, {codec}, codes {codec.block} "
                    f"tokens together, so release must be a multiple of {codec.block}"
                )
        if self.rope not in ("before", "after"):
            raise ValueError(f"store(rope={self.rope!r}): expected 'before' or 'after'")
        newest = min(self.keys.n, self.values.n)
        if self.reach is not None and not (self.rope == "before" and 0 <= self.reach <= newest):
            raise ValueError(
                f"store(reach={self.reach}, rope={self.rope!r}): expected rope='before' and at "
                f"least so many exact tokens, not {self.keys} and {self.values}"
            )
        if self.reader is not None:
            self._check_reader(newest)

    def _check_reader(self, newest: int) -> None:
        page, same = self.reader.page, self.keys == self.values
        whole = same and self.unrotated and self.keys.release % page == 0
        if newest < self.reader.window or (self.reader.watches and not whole):
            raise ValueError(
                f"store(reader={self.reader}): expected rope='before' and keys and values = "
                f"Window({self.reader.window}, {page}), not {self.rope!r}, {self.keys} and "
                f"{self.values}"
            )

    @property
    def streaming(self) -> bool:
        return self.fit is None

    @property
    def by_arrival(self) -> bool:
        at_once = self.keys == self.values == Window(0, 1)
        return not (at_once and self.reader is None)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return () if self.fit is None else self.fit.statistics

    @property
    def columns(self) -> tuple[Column, ...]:
        return () if self.reader is None else self.reader.columns

    @property
    def observes(self) -> bool:
        return self.reader is not None and self.reader.observes

    @property
    def looks_ahead(self) -> bool:
        return self.reader is not None and self.reader.looks_ahead

    @property
    def light(self) -> bool:
        # A reader that watches every commit reads all of its index anyway; asking first, whether a
        # token comes, would put everything held through one more branch.
        return self.reader is not None and self.reader.watches

    @property
    def unrotated(self) -> bool:
        return self.rope == "before"

    @property
    def unit(self) -> int:
        page = 1 if self.reader is None else self.reader.page
        return math.lcm(self.codec.k.block, self.codec.v.block, page)

    def constants(self, width: int) -> tuple[str, ...]:
        found = set() if self.fit is None else set(self.fit.names)
        asked = {**self.codec.k.constants_spec(width), **self.codec.v.constants_spec(width)}
        read = () if self.reader is None else self.reader.constants
        return (*(name for name in asked if name not in found), *read)

    def init(self, spec: Spec, whole: bool = False) -> Stored:
        """`whole`: tokens will come once and in whole units, so no exact slots are needed."""
        self.codec.k.check(spec.width)
        self.codec.v.check(spec.width)
        check_heads(self.codec, spec)
        if self.reader is not None:
            check_reader(self, spec)
        if self.host and spec.totals is not None:
            raise ValueError("store(host=True) needs heads of equal budget, not a ragged one")
        length = spec.max_length
        room = [max(length - w.n, 0) // w.release * w.release for w in (self.keys, self.values)]
        if spec.totals is not None:
            if any(c.constants_spec(spec.width) for c in (self.codec.k, self.codec.v)):
                raise ValueError(
                    f"store(codec={self.codec}): a codec with constants needs heads of equal "
                    "budget, not a ragged one"
                )
            place: Rectangle | Pool = Pool.init(spec, length, self.unit)
            slots = [place.slots, place.slots]
            tokens = place.slots
        else:
            place = Rectangle.init(spec, min(room), self.unit)
            slots = [max(-(-r // self.unit) * self.unit, place.slots) for r in room]
            tokens = max(length, place.slots)
            if spec.shards > 1:  # one split for all: a token's parts lie on one device
                tokens = spec.slots(tokens, self.unit)
                slots = [tokens if n else 0 for n in slots]
                place = dataclasses.replace(place, slots=tokens if place.slots else 0)
        lead = place.lead(spec)
        k, v = (
            c.empty(lead, n, spec.width, spec.dtype) if n else ()
            for c, n in zip((self.codec.k, self.codec.v), slots)
        )
        head = (spec.layers, spec.batch, spec.kv_heads)
        rings = (
            jnp.zeros((*head, 0 if whole else min(w.capacity, length), spec.width), spec.dtype)
            for w in (self.keys, self.values)
        )
        seen = head if spec.totals is not None else spec.lead
        index = None
        if self.reader is not None:
            index = self.reader.init(spec, place.slots // self.reader.page)
        return Stored(
            jnp.zeros(seen, jnp.int32),
            jnp.full((*place.pos_lead(spec), tokens), -1, jnp.int32),
            {name: jnp.zeros((*lead, tokens), jnp.float32) for name in spec.columns
             if name not in {column.name for column in self.columns}},
            k, v, *rings, place,
            {} if self.fit is None else self.fit.init(spec),
            index, spec, self.host,
        ).settled()  # fmt: skip

    def downstream(self, spec: Spec) -> None:
        return None

    def releases(self, state: Stored, kv: KV) -> bool:
        return False

    # --- writing ---

    def commit(self, state: Stored, kv: KV, context: Commit) -> tuple[Stored, None]:
        spec, place = state.spec, state.place
        if context.phase == "prefill" and self.fit is not None and context.stats:
            state = state.replace(fitted=self.fit(context))
        if context.phase == "prefill" and isinstance(place, Pool):
            growth = spec.max_length - spec.prompt
            place = place.allocate(jnp.broadcast_to(kv.count + growth, state.seen.shape))
            state = state.replace(place=place)
        if self.reader is not None and self.reader.watches:
            index = watch(self, state, kv, context)
            seen = buffer.after(state.seen, *jax.tree.leaves(index))
            state = state.replace(seen=seen, index=index)
        seen = state.seen
        arrived = jnp.broadcast_to(kv.count, seen.shape)
        after = seen + arrived
        number = seen[..., None] + jnp.arange(kv.size, dtype=jnp.int32)
        number = jnp.where(number < after[..., None], number, -1)
        pos = jnp.broadcast_to(kv.pos, (*seen.shape, kv.size))
        extra = {
            name: place.write(x, number, buffer.column(kv, name), layout=context.layout)
            for name, x in state.extra.items()
        }
        k, k_ring = self._code(
            state, self.codec.k, self.keys, state.k, state.k_ring, kv.k, arrived, context
        )
        v, v_ring = self._code(
            state, self.codec.v, self.values, state.v, state.v_ring, kv.v, arrived, context
        )
        state = state.replace(
            seen=after, pos=place.write(state.pos, number, pos, layout=context.layout),
            extra=extra, k=k, v=v, k_ring=k_ring, v_ring=v_ring,
        )  # fmt: skip
        if self.reader is not None:
            state = state.replace(index=note(self, state, seen, kv, context))
        return state, None

    def _code(
        self, state: Stored, codec: Codec, window: Window, code: Any, ring: Array, rows: Array,
        arrived: Array, context: Commit,
    ) -> tuple[Any, Array]:  # fmt: skip
        """Codes what leaves the exact window of one side, and takes the new rows into it."""
        seen, place = state.seen, state.place
        rows = rows.astype(state.spec.dtype)
        window = window.fitting(ring)
        if jax.tree.leaves(code):
            old, new = window.left(seen), window.left(seen + arrived)
            count = window.leaving(rows.shape[3])
            constants = self._constants(codec, state, context.constants)

            def encode(code: Any) -> Any:
                number = old[..., None] + jnp.arange(count, dtype=jnp.int32)
                valid = number < new[..., None]
                x = window.gather(ring, rows, seen, jnp.where(valid, number, 0))
                shape = (*x.shape[:3], count)
                units = codec.encode(x, jnp.broadcast_to(valid, shape), None, constants)
                # Only whole units leave a window, so a unit's first token speaks for it.
                at = jnp.where(valid, number // codec.block, -1)[..., :: codec.block]
                return jax.tree.map(
                    lambda a, b: place.write(a, at, b, codec.block, context.layout), code, units
                )

            if window.release > 1 and rows.shape[3] <= buffer.FEW:
                code = jax.lax.cond(jnp.any(new > old), encode, lambda code: code, code)
            else:
                code = encode(code)
        seen = buffer.after(seen, *jax.tree.leaves(code))
        return code, window.write(ring, rows, seen, arrived)

    def _constants(self, codec: Codec, state: Stored, given: Any) -> dict[str, Array] | None:
        return codec.pick({**(given or {}), **state.fitted}, state.spec.width)

    def _coded(self, seen: Array) -> Array:
        """Tokens of which both key and value are coded."""
        return jnp.minimum(self.keys.left(seen), self.values.left(seen))

    # --- reading ---

    def start(self, state: Stored, pos: Array) -> Any:
        if self.looks_ahead:
            return nothing_fetched(self, state, pos)
        return () if self.reader is None else self.reader.start(state.index, pos)

    def attend(self, state: Stored, layer: Array, query: Query, carry: Any) -> tuple[Partial, Any]:
        seen = per_layer(state.seen, layer)
        coded = self._coded(seen)
        done = None
        if jax.tree.leaves(state.k) and jax.tree.leaves(state.v) and state.place.slots:
            done = attend_stored(query, self, state, layer, coded)
            if done is None:
                done, carry = self._attend_coded(state, layer, query, carry, coded)
        q = query.grouped(query.q, state.spec.kv_heads)
        if state.k_ring.shape[3] or state.v_ring.shape[3]:
            tail = self._attend_tail(state, layer, query, q, seen, coded)
            done = tail if done is None else merge(done, tail)
        return query.ungroup(done), carry

    def _of_layer(self, codec: Codec, state: Stored, layer: Array, query: Query) -> Any:
        constants = self._constants(codec, state, query.constants)
        return jax.tree.map(lambda x: per_layer(x, layer), constants)

    def _attend_coded(
        self, state: Stored, layer: Array, query: Query, carry: Any, coded: Array
    ) -> tuple[Partial, Any]:
        ck, cv = self.codec.k, self.codec.v
        kc, vc = (self._of_layer(c, state, layer, query) for c in (ck, cv))
        if self.reach is not None:  # so far back are all of them
            query = query.far(self.reach)
        q = query.grouped(query.q, state.spec.kv_heads)

        def part(read: Any, mask: Array, q: Array, rows: Array) -> Partial:
            pos = read(state.pos, 1)
            code = jax.tree.map(lambda x: read(x, ck.block), state.k)
            if state.spec.unrotated and self.reach is None:
                k = ck.decode(code, query.q.dtype, kc)
                logits = dot_keys(q, rotate(k, pos, query.rope))
            else:
                logits = ck.scores(q, code, kc)
            logits = query.cap(logits)
            if "bias" in state.extra:
                logits = logits + read(state.extra["bias"], 1)[..., None, :]
            seen = visible(query, pos, rows) & mask[..., None, :]
            code = jax.tree.map(lambda x: read(x, cv.block), state.v)
            return partial_attention(logits, seen, lambda p: cv.mix(p, code, vc))

        rows, count, reader = query.rows(q), query.pos.shape[1], self.reader

        def everything(query: Query = query, q: Array = q, rows: Array = rows) -> Partial:
            base = query.base(slots := state.pos.shape[-1])
            slots = min(slots, state.place.slots)
            here = coded if query.shard is None else jnp.clip(coded - base, 0, slots)
            plain = all(exact(codec, state.spec.dtype) for codec in (ck, cv))
            most = 1024 if plain else 2048
            return state.place.fold(layer, query, q, rows, here, slots, part, most)

        def chosen() -> tuple[Partial, Any]:
            read = lambda *row: attend_read(  # noqa: E731
                self, state, layer, *row, coded, part, everything
            )
            if count > buffer.FEW:  # one choice for all rows
                return read(query, q, rows, carry)
            return each_row_with(query, q, read, carry)

        if reader is None or (count > buffer.FEW and not reader.together):
            return everything(), carry
        following = carry
        if reader.looks_ahead and query.ahead is not None:
            following = fetch_ahead(self, state, layer, query)
        if reader.whole:
            every = lambda: (everything(), carry)  # noqa: E731
            done, carry = jax.lax.cond(layer < reader.whole, every, chosen)
        else:
            done, carry = chosen()
        return done, following if reader.looks_ahead else carry

    def _attend_tail(
        self, state: Stored, layer: Array, query: Query, q: Array, seen: Array, coded: Array
    ) -> Partial:
        """Tokens of which the key or the value is still exact."""
        length = max(state.k_ring.shape[3], state.v_ring.shape[3])
        number = coded[..., None] + jnp.arange(length, dtype=jnp.int32)
        base = query.base(slots := state.pos.shape[-1])
        mask = query.at_hand(number < seen[..., None], number, slots)
        pos = state.place.gather(state.pos, layer, number - base)
        k = self._side(
            state, self.codec.k, self.keys, state.k, state.k_ring, layer, query, seen, number
        )
        v = self._side(
            state, self.codec.v, self.values, state.v, state.v_ring, layer, query, seen, number
        )
        if state.spec.unrotated:
            logits = query.cap(dot_rotated(query, k, pos, self.reach, q))
        else:
            logits = query.cap(dot_keys(q, k))
        if "bias" in state.extra:
            bias = state.place.gather(state.extra["bias"], layer, number - base)
            logits = logits + bias[:, :, None]
        seen_mask = visible(query, pos, query.rows(q)) & mask[..., None, :]
        return partial_attention(logits, seen_mask, lambda p: dot_values(p, v))

    def _side(
        self, state: Stored, codec: Codec, window: Window, code: Any, ring: Array, layer: Array,
        query: Query, seen: Array, number: Array,
    ) -> Array:  # fmt: skip
        """Exact or decoded values of arrivals `number` [B, H or 1, M] of one layer."""
        other = self.values if window is self.keys else self.keys
        window = window.fitting(ring)
        exact, held = None, number >= window.left(seen)[..., None]
        if window.capacity:
            own = per_layer(ring, layer)
            exact = jnp.take_along_axis(own, (number % window.capacity)[..., None], 2)
            if not jax.tree.leaves(code) or window == other:
                return exact
        block = codec.block
        number = number - query.base(state.pos.shape[-1])
        first = number[..., :1] // block
        count = -(-number.shape[-1] // block) + (1 if block > 1 else 0)
        units = first + jnp.arange(count)
        got = jax.tree.map(lambda x: state.place.gather(x, layer, units, block), code)
        constants = self._of_layer(codec, state, layer, query)
        decoded = codec.decode(got, state.spec.dtype, constants)
        decoded = jnp.take_along_axis(decoded, (number - first * block)[..., None], 2)
        if exact is None:
            return decoded
        return jnp.where(held[..., None], exact, decoded)

    def held(self, state: Stored) -> Array:
        return most(state.seen)

    def tokens(self, state: Stored) -> Array:
        return total(state.seen, state.spec)

    def slots(self, state: Stored) -> int:
        pool = isinstance(state.place, Pool)
        return state.pos.size if pool else room_of(state.pos, state.spec)

    def horizon(self, state: Stored) -> tuple[Array, bool]:
        reach = jnp.full(state.seen.shape[1:2], FOREVER)
        for codec, window, code in (
            (self.codec.k, self.keys, state.k),
            (self.codec.v, self.values, state.v),
        ):
            if jax.tree.leaves(code) and not exact(codec, state.spec.dtype):
                reach = jnp.minimum(reach, least(window.horizon(state.seen)))
        if self.reader is not None:
            reach = jnp.minimum(reach, reader_horizon(self, state))
        return reach, True


def store(
    codec: Codec | PerKV | None = None,
    *,
    keys: Window | None = None,
    values: Window | None = None,
    rope: str = "after",
    fit: Fit | None = None,
    reader: Reader | None = None,
    reach: int | None = None,
    host: bool = False,
) -> Store:
    """Holds everything that comes, coded; the end of a chain.

    Args:
      codec: how tokens are stored, one codec or `per_kv(k=..., v=...)`; None: exactly.
      keys, values: which of the newest keys (values) are still exact: `Window(n, release)` holds
        at least n and codes `release` at a time. None: a codec of single tokens codes at once, one
        that codes tokens together waits until there are enough.
      rope: whether keys are coded "before" or "after" rotary rotation.
      fit: finds the codec's constants from the prompt.
      reader: chooses what each query reads; None: everything.
      reach: keys further back are read as if they stood `reach` positions back (rope="before"; at
        least so many tokens are exact); None: all keys are read where they stand.
      host: coded units lie in host memory, where the platform has it, and what is read of them is
        copied to the device; positions, exact tokens and the reader's index stay there.
    """
    pair = as_pair(dense() if codec is None else codec)
    keys = Window(0, pair.k.block) if keys is None else keys
    values = Window(0, pair.v.block) if values is None else values
    return Store(pair, keys, values, rope, fit, reader, reach, host)
