"""What a reader does in a store: it is shown what comes, and chooses what a query reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.readers.ahead import Fetched, fetch, of_layer
from kvjax.cache.stage import FOREVER, Commit, least
from kvjax.cache.stages.stored import Stored
from kvjax.cache.types import KV, Partial, Query, Spec, merge, rotate
from kvjax.codecs import joins_heads


def check_reader(store: Any, spec: Spec) -> None:
    """Raises ValueError where a store of such tokens cannot have its reader."""
    reader = store.reader
    if spec.totals is not None:
        raise ValueError("store(reader=...) needs heads of equal budget, not a ragged one")
    if reader.looks_ahead and spec.shards > 1:
        raise ValueError(f"{reader}: looking ahead needs slots of one device, not split")
    for codec in (store.codec.k, store.codec.v) if reader.apart else ():
        if joins_heads(codec) or codec.constants_spec(spec.width):
            raise ValueError(
                f"store(codec={codec}, reader={reader}): query heads choose apart, so a token must "
                "be coded for each head alone and without constants"
            )


def reader_horizon(store: Any, state: Stored) -> Array:
    """`Stage.horizon` as far as the reader is concerned, int32 [B]."""
    page = store.reader.page
    reach = jnp.full(state.seen.shape[1:2], FOREVER)
    if store.reader.pages * page < state.place.slots:
        # A page that is complete may no longer be read.
        coded = store._coded(state.seen)
        more = jnp.arange(1, page + max(store.keys.release, store.values.release) + 1)
        turns = store._coded(state.seen[..., None] + more) // page > coded[..., None] // page
        first = jnp.where(jnp.any(turns, -1), jnp.argmax(turns, -1) + 1, more[-1])
        reach = least(first)
    own = store.reader.horizon(state.index)
    return reach if own is None else jnp.minimum(reach, own)


def note(store: Any, state: Stored, seen: Array, kv: KV, context: Commit) -> Any:
    """Shows the reader every page that these rows completed, or the rows themselves."""
    if store.reader.watches:
        return state.index
    if not store.reader.by_page:
        return store.reader.note(state.index, kv, seen, context, state.spec.unrotated)
    page, spec = store.reader.page, state.spec
    coded = store._coded(state.seen)
    was = store._coded(seen)
    first, last = was // page, coded // page
    span = (kv.size + max(store.keys.release, store.values.release, page)) // page + 1
    number = first[..., None] + jnp.arange(span, dtype=jnp.int32)
    number = jnp.where(number < last[..., None], number, -1)

    def write(index: Any) -> Any:
        token = jnp.maximum(number, 0)[..., None] * page + jnp.arange(page)
        token = token.reshape(*number.shape[:3], -1)
        constants = store._constants(store.codec.k, state, context.constants)
        units = token[..., :: store.codec.k.block] // store.codec.k.block
        at = lambda x: buffer.along(x, units)  # noqa: E731
        k = store.codec.k.decode(jax.tree.map(at, state.k), jnp.float32, constants)
        pos = jnp.take_along_axis(state.pos, token, 3)
        if spec.unrotated:
            k = rotate(k, pos, context.rope)
        k = k.reshape(*k.shape[:3], span, page, k.shape[-1])
        valid = (pos >= 0).reshape(*pos.shape[:3], span, page)
        given = {name: context.constants[name] for name in store.reader.constants}
        return store.reader.write(index, number, k, valid, given)

    if page == 1:  # with every token
        return write(state.index)
    return jax.lax.cond(jnp.any(last > first), write, lambda index: index, state.index)


def watch(store: Any, state: Stored, kv: KV, context: Commit) -> Any:
    """Shows the reader these rows and the exact window to which they will come."""
    window = store.keys.fitting(state.k_ring)
    number = window.held(state.seen)
    pos = jnp.take_along_axis(state.pos, jnp.maximum(number, 0), 3)
    held = KV(state.k_ring, (), jnp.where(number >= 0, pos, -1))
    return store.reader.watch(state.index, held, kv, window, state.seen, context)


def attend_read(
    store: Any, state: Stored, layer: Array, query: Query, q: Array, rows: Array, carry: Any,
    coded: Array, part: Any, everything: Any,
) -> tuple[Partial, Any]:  # fmt: skip
    """Attention of one row per sequence, or of all rows of a window: over what its reader chooses,
    or over everything where the reader says so at this step; everything(query, q, rows) ->
    Partial. With what the reader carries from layer to layer."""
    index, given = of_layer(store, state, layer, query)
    whole = store.reader.reads_whole(index, query)
    chosen = lambda: _attend_chosen(  # noqa: E731
        store, state, index, given, layer, query, q, rows, carry, coded, part
    )
    if whole is None:
        return chosen()

    def apart() -> tuple[Partial, Any]:
        pick = lambda x, y: jnp.where(whole.reshape(-1, *[1] * (x.ndim - 1)), x, y)  # noqa: E731
        done, after = chosen()
        return jax.tree.map(pick, everything(query, q, rows), done), after

    return jax.lax.cond(jnp.any(whole), apart, chosen)


def _attend_chosen(
    store: Any, state: Stored, index: Any, given: dict[str, Array], layer: Array, query: Query,
    q: Array, rows: Array, carry: Any, coded: Array, part: Any,
) -> tuple[Partial, Any]:  # fmt: skip
    """In two phases: the reader names pages, and only those are gathered and decoded."""
    page = store.reader.page
    base = query.base(slots := state.pos.shape[-1])
    batch, heads, group = q.shape[:3]
    fetched: dict[int, Array] = {}
    if store.reader.looks_ahead and query.ahead is not None:

        def now() -> Fetched:
            tokens = store.reader.select(index, query, q, coded, constants=given)
            return fetch(state, layer, tokens[:, None])

        ends = (layer == 0) | (layer == state.spec.layers - 1)
        found = jax.lax.cond(ends, now, lambda: carry)
        chosen = found.tokens[:, 0]
        fetched = {
            id(x): rows[:, 0] for x, rows in zip(jax.tree.leaves((state.k, state.v)), found.rows)
        }
    else:
        chosen, carry = store.reader.choose(index, layer, query, q, coded // page, carry, given)
    own = heads * group if store.reader.apart else heads  # that choose
    chosen = jnp.broadcast_to(chosen, (batch, own, chosen.shape[-1]))

    def read(x: Array, block: int) -> Array:
        if id(x) in fetched:
            return fetched[id(x)]
        each = page // block
        unit = (chosen * page - base)[..., None] // block + jnp.arange(each)
        got = state.place.gather(x, layer, unit.reshape(batch, heads, -1), block)
        return got.reshape(batch, own, -1, *got.shape[3:])

    # Pages whose slots are elsewhere are read there.
    there = jnp.repeat(query.at_hand(chosen >= 0, chosen * page, slots), page, -1)
    alone = q.reshape(batch, own, -1, q.shape[-1]), rows.reshape(batch, own, -1)
    picked = part(read, there, *alone)
    picked = jax.tree.map(lambda x: x.reshape(batch, heads, group, *x.shape[3:]), picked)
    if page == 1:
        return picked, carry
    # The last, incomplete page is always read.
    token = (coded // page * page)[..., None] + jnp.arange(page)
    rest = lambda x, block: state.place.gather(  # noqa: E731
        x, layer, (token[..., ::block] - base) // block, block
    )
    mask = query.at_hand(token < coded[..., None], token, slots)
    return merge(picked, part(rest, mask, q, rows)), carry
