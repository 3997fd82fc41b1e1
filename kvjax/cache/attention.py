"""Attention over held slots and over new rows, as folds of `Partial`; and what keys received."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import memory
from kvjax.cache.kernels import attend_exact
from kvjax.cache.types import KV, Observation, Partial, Query, merge, partial_attention, rotate

# Numbers of keys (values) read per step of the loop over a buffer, at most: a step should fit the
# caches of two CPU cores, and be long enough to outweigh what a step costs.
NUMBERS = 3 * 2**17
ROWS = 256  # new rows attended to at a time


def dot_keys(q: Array, k: Array) -> Array:
    """q [..., R, D] . k [..., N, D] -> float32 [..., R, N]."""
    return jnp.einsum("...rd,...nd->...rn", q, k, preferred_element_type=jnp.float32)


def dot_values(p: Array, v: Array) -> Array:
    """Weights [..., R, N] and values [..., N, D] -> float32 [..., R, D]."""
    return jnp.einsum(
        "...rn,...nd->...rd", p.astype(v.dtype), v, preferred_element_type=jnp.float32
    )


def visible(query: Query, pos: Array, rows: Array) -> Array:
    """bool [..., R or 1, N]: which tokens at pos [..., N] each row at rows [..., R] may see."""
    there = (pos >= 0)[..., None, :]
    if not query.window:
        return there
    return there & (rows[..., :, None] - pos[..., None, :] < query.span)


def dot_rotated(
    query: Query, k: Array, pos: Array, reach: int | None = None, q: Array | None = None
) -> Array:
    """Logits of keys that are held before rotation, float32 [B, H, G * T, N].

        q_i R(min(i - j, reach)) k_j

    Args:
      k: [B, H, N, D]. pos: int32 [B, H or 1, N].
      reach: keys further back are read as if they stood `reach` positions back; None: all are read
        where they stand.
      q: grouped queries [B, H, G * T, D] in place of `query.q`.
    """
    heads = k.shape[1]
    q = query.grouped(query.q, heads) if q is None else q
    near = dot_keys(q, rotate(k, pos, query.rope))
    if reach is None:
        return near
    far = dot_keys(query.grouped(query.far(reach).q, heads), k)
    distance = query.rows(q)[..., :, None] - pos[..., None, :]
    return jnp.where(distance < reach, near, far)


def layer_of(x: Array, layer: Array, start: Array | int = 0, size: int | None = None) -> Array:
    """One layer of a stacked buffer, slots [start, start + size) of its axis 3, by one slice."""
    size = x.shape[3] if size is None else size
    index = layer if x.shape[0] > 1 else 0

    def cut(x: Array, index: Array | int, start: Array | int) -> Array:
        starts = (index, 0, 0, start, *(0,) * (x.ndim - 4))
        return jax.lax.dynamic_slice(x, starts, (1, *x.shape[1:3], size, *x.shape[4:]))[0]

    return memory.read(cut, x, index, start)


def block_size(row: int, unit: int = 1, most: int = 1024) -> int:
    """Slots read per step, a multiple of `unit`: 128 to `most`, fewer where each has more numbers.

    Args:
      row: numbers per slot, batch * heads * width.
      unit: slots that cannot be read apart.
      most: a power of two. Coded slots are fewer bytes and more work: twice as many at a time.
    """
    size = most
    while size > 128 and size * row > NUMBERS:
        size //= 2
    return max(size // unit, 1) * unit


def blockwise(
    query: Query,
    slots: int,
    used: Array | None,
    part: Callable[[Any, int, Any], Partial],
    block: int,
    unit: int = 1,
) -> Partial:
    """Folds partials over blocks of a buffer, reading little more than the slots in use.

    Args:
      slots: capacity, static, a multiple of `unit`.
      used: int32 scalar, slots [used, slots) are known to be empty; None: read all.
      part: (start, size, first) -> Partial over slots [start, start + size) that are at least
        `first`; a block that would leave the buffer starts earlier and skips what was read before.
      block, unit: see `block_size`.
    """
    if slots <= block:
        return part(0, slots, 0)
    # Blocks of equal size, so that the last one reads little again.
    count = -(-slots // block)
    block = -(-slots // (count * unit)) * unit

    def read(first: Any) -> Partial:
        return part(jnp.minimum(first, slots - block), block, first)

    few = max(block // 4 // unit, 1) * unit
    none = jax.eval_shape(lambda: part(0, few, 0))
    none = Partial.identity(none.max.shape, none.out.shape[-1])
    if query.differentiable or used is None:
        starts = jnp.arange(-(-slots // block)) * block
        return jax.lax.scan(lambda done, i: (merge(done, read(i)), None), none, starts)[0]

    def several() -> Partial:
        step = lambda i, done: merge(done, read(i * block))  # noqa: E731
        return jax.lax.fori_loop(0, (used + block - 1) // block, step, none)

    # Buffers that hold little are read by one short step, without the loop.
    return jax.lax.cond(used <= few, lambda: part(0, few, 0), several)


def attend_slots(
    kv: KV,
    layer: Array,
    query: Query,
    used: Array | None = None,
    unrotated: bool = False,
    q: Array | None = None,
    hidden: Array | None = None,
    pair: Any = None,
    reach: int | None = None,
) -> Partial:
    """Attention of the query rows over one layer of an exact buffer, by a kernel where
    `query.kernels` says so and one applies (see `kvjax.cache.kernels`).

    Args:
      kv: k, v [L, B, H, N, D]. A column named "bias" is added to the logits.
      layer: int32 scalar.
      used: int32 scalar or [B] (of each row), slots of the whole buffer from there on are known to
        be empty.
      unrotated: keys are stored before rotation: rotate them at their positions here.
      q: use these queries [B, Hq, T, D] in place of `query.q`.
      hidden: bool [B, N], slots at hand that must not be read (superseded by new rows).
      pair: codecs of keys and values (`.k`, `.v`); None: the buffer is exact.
      reach: unrotated keys further back are read as if so many positions back; None: no limit.

    Returns:
      Partial over [B, Hq, T].
    """
    heads, slots = kv.lead[2], kv.size
    q = query.q if q is None else q
    if used is not None:
        used = jnp.clip(used - query.base(slots), 0, slots)
    if pair is None and not unrotated:
        held = kv
        if hidden is not None:
            held = dataclasses.replace(kv, pos=jnp.where(hidden[None, :, None], -1, kv.pos))
        done = attend_exact(query, q, held, layer, used)
        if done is not None:
            return done
    used = None if used is None else jnp.max(used)
    grouped = query.grouped(q, heads)

    def part(start: Any, size: int, first: Any) -> Partial:
        read = lambda x: layer_of(x, layer, start, size)  # noqa: E731
        k, v, pos = jax.tree.map(read, (kv.k, kv.v, kv.pos))
        if pair is not None and unrotated:
            k = pair.k.decode(k, query.q.dtype)
        if unrotated:
            logits = dot_rotated(query, k, pos, reach, grouped)
        else:
            logits = dot_keys(grouped, k) if pair is None else pair.k.scores(grouped, k)
        logits = query.cap(logits)
        if "bias" in kv.extra:
            logits = logits + read(kv.extra["bias"])[:, :, None, :]
        mask = query.sees(pos, heads)
        if size < slots:
            mask &= start + jnp.arange(size) >= first
        if hidden is not None:
            mask &= ~jax.lax.dynamic_slice_in_dim(hidden, start, size, 1)[:, None, None, :]
        mix = (lambda p: dot_values(p, v)) if pair is None else (lambda p: pair.v.mix(p, v))
        return partial_attention(logits, mask, mix)

    block = block_size(query.q.shape[0] * heads * query.q.shape[3])
    return query.ungroup(blockwise(query, slots, used, part, block))


def attend_new(
    query: Query, k: Array, v: Array, mask: Array | str, causal_order: bool = True
) -> Partial:
    """Attention of new rows among themselves, each key once.

    Args:
      k, v: [B, H, T, D] of the new rows, keys rotated.
      mask: "causal" (a row sees rows at its position and before), "full", or bool [B or 1, T, T]
        (row, key), as for trees; padding rows (position -1) are never seen.
      causal_order: rows stand in ascending order of position (padding anywhere), so that blocks
        above the diagonal need not be computed.

    Returns:
      Partial over [B, Hq, T].
    """
    heads, rows = k.shape[1], k.shape[2]
    groups = query.q.shape[1] // heads
    pos = query.pos

    def allowed(i: Any, ni: int, j: Any, nj: int) -> Array:
        """bool [B, 1, ni, nj]."""
        key = jax.lax.dynamic_slice_in_dim(pos, j, nj, 1)[:, None, None, :]
        row = jax.lax.dynamic_slice_in_dim(pos, i, ni, 1)[:, None, :, None]
        ok = jnp.broadcast_to(key >= 0, (*key.shape[:2], ni, nj))
        if not isinstance(mask, str):
            ok &= jax.lax.dynamic_slice(mask, (0, i, j), (mask.shape[0], ni, nj))[:, None]
        elif mask == "causal":
            ok &= key <= row
        if query.window:
            ok &= row - key < query.span
        return ok

    def add(done: Partial, q: Array, i: Any, ni: int, j: Any, nj: int, masked: bool) -> Partial:
        """`add_keys` of those from j to j + nj."""
        kj = jax.lax.dynamic_slice_in_dim(k, j, nj, 2)
        vj = jax.lax.dynamic_slice_in_dim(v, j, nj, 2)
        logits = query.cap(dot_keys(q, kj))
        if masked:
            ok = jnp.tile(allowed(i, ni, j, nj), (1, 1, groups, 1))
            logits = jnp.where(ok, logits, -jnp.inf)
        return add_keys(done, logits, vj)

    def nothing(ni: int) -> Partial:
        return Partial.identity((query.q.shape[0], heads, groups * ni), v.shape[-1])

    if rows == 1 and isinstance(mask, str):
        # One row sees itself: no softmax.
        logit = query.cap(jnp.sum(query.grouped(query.q, heads).astype(jnp.float32) * k, -1))
        seen = pos[:, :, None] >= 0
        value = jnp.broadcast_to(v.astype(jnp.float32), (*logit.shape, v.shape[-1]))
        return query.ungroup(
            Partial(
                jnp.where(seen[..., None], value, 0.0),
                jnp.where(seen, jax.lax.stop_gradient(logit), -jnp.inf),
                jnp.where(seen, jnp.exp(logit - jax.lax.stop_gradient(logit)), 0.0),
            )
        )
    if rows <= ROWS:
        q = query.grouped(query.q, heads)
        return query.ungroup(divided(add(nothing(rows), q, 0, rows, 0, rows, True)))

    padded = -(-rows // ROWS) * ROWS
    if padded > rows:
        more = padded - rows
        pad = lambda x, axis, value=0: jnp.pad(  # noqa: E731
            x, [(0, more if a == axis else 0) for a in range(x.ndim)], constant_values=value
        )
        if not isinstance(mask, str):
            mask = pad(pad(mask, 1, False), 2, False)
        big = dataclasses.replace(query, q=pad(query.q, 2), pos=pad(query.pos, 1, -1))
        done = attend_new(big, pad(k, 2), pad(v, 2), mask, causal_order)
        return jax.tree.map(lambda x: x[:, :, :rows], done)

    blocks = padded // ROWS
    skip = causal_order and isinstance(mask, str) and mask == "causal" and not query.differentiable
    keys = ROWS * (2 if skip or blocks % 2 == 0 else 1)
    free = _free(query, mask) if isinstance(mask, str) and not query.differentiable else None

    def row_block(i: Array) -> Partial:
        start = i * ROWS
        q = query.grouped(jax.lax.dynamic_slice_in_dim(query.q, start, ROWS, 2), heads)

        def step(j: Any, done: Partial) -> Partial:
            at = (start, ROWS, j * keys, keys)
            if free is None:
                return add(done, q, *at, True)
            # Most blocks need no mask: 0.93 of the time on CPU.
            plain, masked = (lambda done, m=m: add(done, q, *at, m) for m in (False, True))
            each = keys // ROWS
            all_free = jnp.all(jax.lax.dynamic_slice_in_dim(free[i], j * each, each))
            return jax.lax.cond(all_free, plain, masked, done)

        if query.differentiable:
            steps = jnp.arange(padded // keys)
            done = jax.lax.scan(lambda c, j: (step(j, c), None), nothing(ROWS), steps)[0]
            return divided(done)
        done = jax.lax.fori_loop(0, start // keys if skip else padded // keys, step, nothing(ROWS))
        if skip:  # up to the diagonal one block of keys is left, or two
            one = lambda done: add(done, q, start, ROWS, start, ROWS, True)  # noqa: E731
            two = lambda done: add(done, q, start, ROWS, start - ROWS, keys, True)  # noqa: E731
            done = jax.lax.cond(i % 2 == 0, one, two, done)
        return divided(done)

    done = jax.lax.map(row_block, jnp.arange(blocks))
    return jax.tree.map(lambda x: from_blocks(x, groups), done)


def add_keys(done: Partial, logits: Array, values: Array) -> Partial:
    """`merge` with the attention to further keys; `out` is not divided by `sum` yet: `divided`.

    Args:
      done: over [..., R], so far. logits: float32 [..., R, N], -inf where a key is not seen.
      values: [..., N, D].
    """
    top = jnp.maximum(done.max, jax.lax.stop_gradient(jnp.max(logits, -1)))
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weights, kept = jnp.exp(logits - safe[..., None]), jnp.exp(done.max - safe)
    out = done.out * kept[..., None] + dot_values(weights, values)
    return Partial(out, top, done.sum * kept + jnp.sum(weights, -1))


def divided(done: Partial) -> Partial:
    """The end of a fold of `add_keys`."""
    whole = jnp.where(done.sum > 0, done.sum, 1.0)
    return Partial(done.out / whole[..., None], done.max, done.sum)


def from_blocks(x: Array, groups: int) -> Array:
    """Grouped rows in blocks, [blocks, B, H, G * rows, ...] -> [B, H * G, blocks * rows, ...]."""
    blocks, batch, heads, rows = x.shape[:4]
    x = x.reshape(blocks, batch, heads, groups, rows // groups, *x.shape[4:])
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(batch, heads * groups, blocks * rows // groups, *x.shape[5:])


def _free(query: Query, mask: str) -> Array:
    """Blocks of `ROWS` in which each row is there and sees each key: bool [T / ROWS, T / ROWS]."""
    pos = query.pos.reshape(query.pos.shape[0], -1, ROWS)
    first, last = jnp.min(pos, -1), jnp.max(pos, -1)
    row, key = (first[:, :, None], last[:, :, None]), (first[:, None], last[:, None])
    ok = (row[0] >= 0) & (key[0] >= 0)
    if mask == "causal":
        ok &= key[1] <= row[0]
    if query.window:
        ok &= row[1] - key[0] < query.span
    return jnp.all(ok, 0)


def received(
    k: Array, pos: Array, seen: Observation, weight: Array, softcap: float | None = None
) -> Array:
    """Attention that keys received from rows, mean over the query heads of each group.

        r_j = mean_g sum_i weight_i exp(q_gi . k_j - lse_gi),  rows i at or after key j

    Args:
      k: [L, B, H, N, D], rotated. pos: int32 [L or 1, B, H or 1, N]; empty slots receive 0.
      seen: the rows.
      weight: float32 [B, T], of each row; 0 for padding.

    Returns:
      float32 [L, B, H, N].
    """
    layers, batch, heads, slots = k.shape[:4]
    rows = seen.q.shape[3]
    groups = seen.q.shape[2] // heads
    split = lambda x: x.reshape(layers, batch, heads, groups, rows, *x.shape[4:])  # noqa: E731
    q, top, total = split(seen.q), split(seen.max), split(seen.sum)

    def one(
        k: Array, pos: Array, q: Array, top: Array, total: Array, span: Array, row: Array, w: Array
    ) -> Array:
        # One matrix product per head as in attention: other forms transpose, so copy, the buffer.
        flat = q.reshape(*q.shape[:-3], -1, q.shape[-1])
        logits = dot_keys(flat, k).reshape(*q.shape[:-1], k.shape[-2])
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        safe = jnp.where(jnp.isneginf(top), 0.0, top)
        p = jnp.exp(logits - safe[..., None]) / jnp.where(total > 0, total, 1.0)[..., None]
        key, at = pos[..., :, None, None, :], row[:, None, None, :, None]
        ok = (key >= 0) & (key <= at) & (at - key < span)
        ok &= (total > 0)[..., None]  # rows that attended to nothing
        p = jnp.where(ok & (w > 0)[:, None, None, :, None], p, 0.0)
        return jnp.einsum("...bhgtn,bt->...bhn", p, w) / groups

    if rows <= 8:
        span = seen.span.reshape(-1, 1, 1, 1, 1, 1)
        return one(k, pos, q, top, total, span, seen.pos, weight)
    # Long bulks: one layer and one block of rows at a time, so that nothing [T, N] is stored.
    pos = jnp.broadcast_to(pos, (layers, *pos.shape[1:]))
    size = min(ROWS, rows)
    blocks = -(-rows // size)

    def layer(args: tuple[Array, ...]) -> Array:
        k, pos, q, top, total, span = args

        def step(done: Array, i: Array) -> tuple[Array, None]:
            first = i * size
            start = jnp.minimum(first, rows - size)
            cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis)  # noqa: E731
            fresh = start + jnp.arange(size) >= first
            more = one(
                k, pos, cut(q, 3), cut(top, 3), cut(total, 3), span, cut(seen.pos, 1),
                cut(weight, 1) * fresh,
            )  # fmt: skip
            return done + more, None

        zero = jnp.zeros((batch, heads, slots), jnp.float32)
        return jax.lax.scan(step, zero, jnp.arange(blocks))[0]

    return jax.lax.map(layer, (k, pos, q, top, total, seen.span))
