"""Looking ahead: what a layer reads is chosen, and fetched, while the layer before is computed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.paging import per_layer
from kvjax.cache.stages.stored import Stored
from kvjax.cache.types import Query, pytree


@pytree()
class Fetched:
    """What the rows of a query read of one layer: tokens int32 [B, T, Hq, n], -1 for none, and
    their units, leaves [B, T, Hq, n, ...] of keys, then of values."""

    tokens: Array
    rows: list[Array]


def of_layer(store: Any, state: Stored, layer: Array, query: Query) -> tuple[Any, dict[str, Array]]:
    """What a reader chooses by: its index and its constants, of one layer."""
    index = jax.tree.map(lambda x: per_layer(x, layer), state.index)
    return index, {n: per_layer(query.constants[n], layer) for n in store.reader.constants}


def fetch(state: Stored, layer: Array, tokens: Array) -> Fetched:
    """Units of `tokens` [B, T, Hq, n] of one layer."""
    batch, count, own, each = tokens.shape
    heads = state.spec.kv_heads
    unit = jnp.moveaxis(tokens, 1, 2).reshape(batch, heads, -1)

    def rows(x: Array) -> Array:
        got = state.place.gather(x, layer, unit)
        return jnp.moveaxis(got.reshape(batch, own, count, each, *got.shape[3:]), 2, 1)

    return Fetched(tokens, [rows(x) for x in jax.tree.leaves((state.k, state.v))])


def nothing_fetched(store: Any, state: Stored, pos: Array) -> Fetched:
    """Before the first layer, for rows at pos [B, T]; many rows do not choose apart."""
    batch, count = pos.shape
    each = min(store.reader.pages, state.place.slots)
    tokens = jnp.zeros(
        (batch, count if count <= buffer.FEW else 1, state.spec.heads, each), jnp.int32
    )
    return fetch(state, jnp.int32(0), tokens)


def fetch_ahead(store: Any, state: Stored, layer: Array, query: Query) -> Fetched:
    """What the next layer will read, by what its queries would be for the input of this one."""
    after = jnp.minimum(layer + 1, state.spec.layers - 1)
    index, given = of_layer(store, state, after, query)
    coded = store._coded(per_layer(state.seen, after))

    def row(ahead: Array) -> Array:
        q = query.grouped(ahead[:, :, None], state.spec.kv_heads)
        return store.reader.select(index, query, q, coded, constants=given)

    return fetch(state, after, jax.vmap(row, 2, 1)(query.ahead))
