"""Sparse attention among new rows: bands of neighbouring parts, and rows and keys open to all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import add_keys, divided, dot_keys, from_blocks
from kvjax.cache.types import Partial, Query, pytree

FAR = jnp.iinfo(jnp.int32).max
# Rows and keys computed together. Smaller blocks waste less around what is allowed: of 4,096 rows
# in groups of 40, one group a chunk, one chunk before (26 % of the pairs), attention took 133, 149
# and 207 ms on one core with blocks of 64, 128 and 256 (causal attention at that time: 315 ms).
BLOCK = 64


@pytree("reach", "block")
class Bands:
    """Which rows see which keys, at or before them:

        row i sees key j  <=>  pos_j <= pos_i  and  (rows_i or keys_j or part_i - part_j <= reach)

    Made by `bands`, in an order in which open tokens come first: the pairs that are allowed then
    lie close together, and most blocks of pairs are empty.

    Attributes:
      order: int32 [B, N], where each stands among the rows; N a multiple of `block`.
      pos: int32 [B, N], -1: none. part: int32 [B, N]. rows, keys: bool [B, N].
      needed: bool [N / block, N / block] (row, key), whether a block may have allowed pairs.
    """

    order: Array
    pos: Array
    part: Array
    rows: Array
    keys: Array
    needed: Array
    reach: int
    block: int

    def allowed(self, i: Any, j: Any, ni: int, nj: int) -> Array:
        """bool [B, ni, nj] of the pairs of rows [i, i + ni) and keys [j, j + nj)."""
        cut = lambda x, at, n: jax.lax.dynamic_slice_in_dim(x, at, n, 1)  # noqa: E731
        row, key = cut(self.pos, i, ni)[:, :, None], cut(self.pos, j, nj)[:, None, :]
        apart = cut(self.part, i, ni)[:, :, None] - cut(self.part, j, nj)[:, None, :]
        open_ = cut(self.rows, i, ni)[:, :, None] | cut(self.keys, j, nj)[:, None, :]
        return (key >= 0) & (key <= row) & (open_ | (apart <= self.reach))

    def shares(self) -> tuple[Array, Array]:
        """(allowed pairs, pairs in blocks that are computed), both over the pairs of causal
        attention: float32 scalars. What is computed there is about 1 for causal attention."""
        size = self.pos.shape[1]
        rows = jnp.arange(0, size, self.block)

        def count(i: Array) -> Array:
            return jnp.sum(self.allowed(i, 0, self.block, size), dtype=jnp.float32)

        length = jnp.sum(self.pos >= 0, 1).astype(jnp.float32)
        causal = jnp.sum(length * (length + 1) / 2)
        allowed = jnp.sum(jax.lax.map(count, rows))
        computed = self.pos.shape[0] * self.block**2 * jnp.sum(self.needed)
        return allowed / causal, computed / causal


def bands(
    pos: Array, part: Array, rows: Array, keys: Array, reach: int, block: int = BLOCK
) -> Bands:
    """Prepares `attend_bands`, once for all layers.

    Args:
      pos: int32 [B, T], -1: padding, anywhere.
      part: int32 [B, T], which part of the sequence each belongs to.
      rows: bool [B, T], rows that see all before them. keys: those that all later rows see.
      reach: how many parts back the others see, at least 0 (their own part).
      block: rows and keys that are computed together.
    """
    if reach < 0:
        raise ValueError(f"bands(reach={reach}): expected at least 0, the own part")
    valid = pos >= 0
    rows, keys = rows & valid, keys & valid
    # Open tokens first, then the others by position, padding last.
    far = jnp.where(valid, pos, FAR)
    order = jnp.lexsort((far, ~(rows | keys) | ~valid)).astype(jnp.int32)
    time = pos.shape[1]
    block = min(block, time)
    more = -time % block

    def put(x: Array, empty: Any) -> Array:
        x = jnp.take_along_axis(x, order, 1)
        return jnp.pad(x, ((0, 0), (0, more)), constant_values=empty)

    pos, part, rows, keys = put(pos, -1), put(part, 0), put(rows, False), put(keys, False)
    needed = _needed(pos, part, rows, keys, reach, block)
    order = jnp.pad(order, ((0, 0), (0, more)))
    return Bands(order, pos, part, rows, keys, needed, reach, block)


def _needed(pos: Array, part: Array, rows: Array, keys: Array, reach: int, block: int) -> Array:
    """Blocks that may have allowed pairs, from each block's extremes."""
    cut = lambda x: x.reshape(x.shape[0], -1, block)  # noqa: E731
    pos, part, rows, keys = cut(pos), cut(part), cut(rows), cut(keys)
    there = pos >= 0
    least = lambda x, ok: jnp.min(jnp.where(ok, x, FAR // 2), 2)  # noqa: E731
    most = lambda x, ok: jnp.max(jnp.where(ok, x, -(FAR // 2)), 2)  # noqa: E731

    def pairs(row: Array, key: Array) -> Array:
        """Whether some of these keys stands at or before some of these rows: [B, rows, keys]."""
        order = least(pos, key)[:, None, :] <= most(pos, row)[:, :, None]
        return order & jnp.any(row, 2)[:, :, None] & jnp.any(key, 2)[:, None, :]

    near = least(part, there)[:, :, None] - most(part, there)[:, None, :] <= reach
    found = pairs(there & rows, there) | pairs(there, there & keys) | (pairs(there, there) & near)
    return jnp.any(found, 0)


def attend_bands(query: Query, k: Array, v: Array, seen: Bands) -> Partial:
    """Attention of new rows among themselves as `seen` says; empty blocks are not computed.

    Args:
      k, v: [B, H, T, D] of the new rows, keys rotated.

    Returns:
      Partial over [B, Hq, T].
    """
    heads, time = k.shape[1], k.shape[2]
    size, count = seen.block, seen.needed.shape[0]
    groups = query.q.shape[1] // heads
    at = seen.order[:, None, :, None]
    q, k, v = (jnp.take_along_axis(x, at, 2) for x in (query.q, k, v))

    def add(done: Partial, q: Array, i: Any, j: Any) -> Partial:
        """`add_keys` of those from j on."""
        kj, vj = (jax.lax.dynamic_slice_in_dim(x, j, size, 2) for x in (k, v))
        ok = seen.allowed(i, j, size, size)
        if query.window:
            row, key = (jax.lax.dynamic_slice_in_dim(seen.pos, n, size, 1) for n in (i, j))
            ok &= row[:, :, None] - key[:, None, :] < query.span
        ok = jnp.tile(ok[:, None], (1, 1, groups, 1))
        logits = jnp.where(ok, query.cap(dot_keys(q, kj)), -jnp.inf)
        return add_keys(done, logits, vj)

    def row_block(i: Array) -> Partial:
        own = query.grouped(jax.lax.dynamic_slice_in_dim(q, i * size, size, 2), heads)
        done = Partial.identity((q.shape[0], heads, groups * size), v.shape[-1])
        needed = seen.needed[i]
        first = jnp.argsort(~needed, stable=True)  # the blocks that are needed
        step = lambda n, done: add(done, own, i * size, first[n] * size)  # noqa: E731
        if query.differentiable:
            done = jax.lax.scan(lambda c, n: (step(n, c), None), done, jnp.arange(count))[0]
        else:
            done = jax.lax.fori_loop(0, jnp.sum(needed), step, done)
        return divided(done)

    done = jax.lax.map(row_block, jnp.arange(count))
    # Back to the rows' own order; padding at the end of the order is dropped.
    place = jnp.argsort(seen.order[:, :time], axis=1)[:, None]

    def rows(x: Array) -> Array:
        x = from_blocks(x, groups)
        return jnp.take_along_axis(x, place.reshape(place.shape + (1,) * (x.ndim - 3)), 2)

    return jax.tree.map(rows, done)
