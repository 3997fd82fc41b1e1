"""Operations on KV buffers: allocate, gather, scatter, compact. Every move carries all columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import memory
from kvjax.cache.types import KV, Spec

# Up to this many rows are scattered into a buffer in place; more are merged by one gather, which
# rewrites it: 11 rows into 4,096 slots of 30 layers take 0.8 ms, by gather 540 ms. Enough for the
# accepted path of a draft.
FEW = 16


def empty(spec: Spec, slots: int, columns: tuple[str, ...] | None = None) -> KV:
    """A buffer of `slots` empty slots per row and head."""
    shape = (spec.layers, spec.batch, spec.kv_heads, slots)
    names = spec.columns if columns is None else columns
    return KV(
        k=jnp.zeros((*shape, spec.width), spec.dtype),
        v=jnp.zeros((*shape, spec.width), spec.dtype),
        pos=jnp.full((*spec.lead, slots), -1, jnp.int32),
        extra={name: jnp.zeros(shape, jnp.float32) for name in names},
    )


def after(index: Array, *reads: Array) -> Array:
    """`index` (integers) unchanged, but known to the compiler only once `reads` are.

    A buffer is written in place only if all that reads it must come first; XLA knows no order but
    that of data, and copies the whole buffer where a write does not depend on a read.
    """
    for x in reads:
        if x.size and not memory.in_host(x):  # the host does what is asked in order
            bits = x[(0,) * x.ndim].astype(jnp.float32).view(jnp.int32)
            index += jnp.minimum(bits & 0x7FFFFFFF, 0).astype(index.dtype)  # always 0
    return index


def read_if(needed: Array, rows: int, read: Callable[[Any], KV], held: Any) -> KV:
    """`read(held)` where `needed`, otherwise no tokens; decided at run time for a few rows."""
    if rows > FEW:
        return read(held)

    def nothing(held: Any) -> KV:
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read, held))
        return dataclasses.replace(none, pos=none.pos - 1)

    return jax.lax.cond(needed, read, nothing, held)


def along(x: Array, index: Array) -> Array:
    """take_along_axis over the slot axis; `index` [L or 1, B, H or 1, K] broadcasts."""
    if memory.in_host(x):
        return memory.take(x, index)
    index = index.reshape(index.shape + (1,) * (x.ndim - 4))
    return jnp.take_along_axis(x, index, axis=3, mode="clip")


def take(kv: KV, index: Array) -> KV:
    """Tokens at `index` [L or 1, B, H or 1, K]; where it is negative or too large, no token.

    Rows without a token are zero, so that nothing that stands in unused slots can spread.
    """
    index = index.astype(jnp.int32)
    inside = (index >= 0) & (index < kv.size)
    pos = jnp.where(inside, along(*_match(kv.pos, index)), -1)
    there = pos >= 0

    def rows(x: Array) -> Array:
        got = along(x, index)
        return jnp.where(
            there.reshape(there.shape + (1,) * (x.ndim - 4)), got, jnp.zeros((), x.dtype)
        )

    return KV(*jax.tree.map(rows, (kv.k, kv.v)), pos, jax.tree.map(rows, kv.extra))


def _match(pos: Array, index: Array) -> tuple[Array, Array]:
    """Broadcasts the leading axes of positions and index against each other."""
    lead = jnp.broadcast_shapes(pos.shape[:3], index.shape[:3])
    return (
        jnp.broadcast_to(pos, (*lead, pos.shape[3])),
        jnp.broadcast_to(index, (*lead, index.shape[3])),
    )


def put_rows(x: Array, slot: Array, rows: Array, layout: Any = None) -> Array:
    """Writes rows [L, B, H, T, ...] into x [L, B, H, N, ...] at `slot` [L or 1, B, H or 1, T].

    A slot outside [0, N) drops its row. Slots of one row of the batch must differ. With a layout
    that splits slots over devices, each writes the rows whose slots it holds.
    """
    if layout is not None:
        return layout.write(put_rows, x, slot, rows)
    if memory.in_host(x):
        return memory.put(x, jnp.broadcast_to(slot, rows.shape[:4]), rows)
    size = x.shape[3]
    slot = jnp.where((slot >= 0) & (slot < size), slot, size)
    if rows.shape[3] > FEW:
        return _put_many(x, slot, rows)
    layers, batch, heads, _ = slot.shape
    # Index only the axes along which slots differ: the others are copied as one window.
    if layers > 1 or heads > 1:
        grid = jnp.ogrid[: x.shape[0], : x.shape[1], : x.shape[2], :1]
        slot = jnp.broadcast_to(slot, (*x.shape[:3], slot.shape[3]))
        return x.at[(*grid[:3], slot)].set(rows.astype(x.dtype), mode="drop")
    row = jnp.arange(batch)[:, None]
    # Advanced indices split by a slice put their axes first: [B, T, L, H, ...].
    moved = jnp.moveaxis(rows, (1, 3), (0, 1)).astype(x.dtype)
    return x.at[:, row, :, slot[0, :, 0]].set(moved, mode="drop")


def _put_many(x: Array, slot: Array, rows: Array) -> Array:
    """The bulk form of `put_rows`: every slot looks up the row that goes there, if any."""
    size, count = x.shape[3], rows.shape[3]
    lead = slot.shape[:3]
    grid = jnp.ogrid[: lead[0], : lead[1], : lead[2], :1]
    source = jnp.full((*lead, size), -1, jnp.int32)
    number = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), slot.shape)
    source = source.at[(*grid[:3], slot)].set(number, mode="drop")
    fresh = source >= 0
    got = along(rows, source)
    return jnp.where(fresh.reshape(fresh.shape + (1,) * (x.ndim - 4)), got.astype(x.dtype), x)


def put(buffer: KV, slot: Array, rows: KV, layout: Any = None) -> KV:
    """Writes tokens at `slot` [L or 1, B, H or 1, T]; outside the buffer or empty: dropped.

    Columns that the rows lack become 0. `layout`: see `put_rows`.
    """
    lead = buffer.pos.shape[:3]
    pos = jnp.broadcast_to(rows.pos, (*lead, rows.size))
    slot = jnp.where(pos >= 0, jnp.broadcast_to(slot, pos.shape), buffer.size)

    def write(x: Array, new: Array) -> Array:
        return put_rows(x, slot, new, layout)

    return KV(
        *jax.tree.map(write, (buffer.k, buffer.v), (rows.k, rows.v)),
        write(buffer.pos, pos),
        {name: write(x, column(rows, name)) for name, x in buffer.extra.items()},
    )


def column(kv: KV, name: str) -> Array:
    """A column, or zeros where the tokens do not carry it."""
    found = kv.extra.get(name)
    return jnp.zeros((*kv.lead, kv.size), jnp.float32) if found is None else found


def compact(kv: KV, keep: Array) -> tuple[KV, Array]:
    """Moves the tokens where `keep` [L or 1, B, H or 1, T] holds to the front, order preserved.

    Returns:
      (kv, index [.., T]: where each came from, -1 past the kept ones).
    """
    order = jnp.argsort(~keep, axis=-1, stable=True).astype(jnp.int32)
    number = jnp.sum(keep, -1, keepdims=True)
    index = jnp.where(jnp.arange(keep.shape[-1]) < number, order, -1)
    return take(kv, index), index


def drop_first(kv: KV, number: Array) -> KV:
    """Removes the first `number` [L or 1, B, H or 1] tokens of a compact KV."""
    return take(kv, jnp.arange(kv.size, dtype=jnp.int32) + number[..., None])


def head(kv: KV, slots: int) -> KV:
    """The first `slots` slots (padded with empty ones); rows without a token become zero."""
    return take(kv, jnp.arange(slots, dtype=jnp.int32).reshape(1, 1, 1, -1))


def concat(a: KV, b: KV) -> KV:
    """All tokens of both, along the slot axis; columns that only one has are zero in the other."""
    lead = jnp.broadcast_shapes(a.pos.shape[:3], b.pos.shape[:3])
    names = sorted(a.extra.keys() | b.extra.keys())
    join = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], 3)  # noqa: E731
    return KV(
        *jax.tree.map(join, (a.k, a.v), (b.k, b.v)),
        jnp.concatenate([jnp.broadcast_to(x.pos, (*lead, x.size)) for x in (a, b)], 3),
        {name: join(column(a, name), column(b, name)) for name in names},
    )


def by_position(kv: KV) -> KV:
    """Compacts and sorts by position: the order of tokens in flight."""
    far = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(kv.pos >= 0, kv.pos, far), axis=-1, stable=True)
    return take(kv, order.astype(jnp.int32))
