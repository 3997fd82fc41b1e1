"""A finished prompt at two resolutions: which tokens each slot is the mean of. Pure functions."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.rules.groups import CONTENT, Grouped
from kvjax.cache.types import KV, pytree

POSITIONS = ("contiguous", "original", "centre")
NEVER = -1  # of no group


@pytree()
class Sources:
    """What stands in each slot of a mixed prompt.

    Attributes:
      index: int32 [B, M, s], the tokens of which slot m is the mean, -1: none.
      count: int32 [B, M], how many they are; 0: the slot is empty.
    """

    index: Array
    count: Array


def blocks_of(grouped: Grouped, each: int) -> Array:
    """The block of `each` groups that a token belongs to, int32 [B, T]; -1: none."""
    return jnp.where(grouped.inside, grouped.group // each, NEVER)


def _spread(values: Array, block: Array) -> Array:
    """Values of blocks [B, N] at their tokens [B, T]; those of no block have 0."""
    found = jnp.take_along_axis(values, jnp.clip(block, 0, values.shape[1] - 1), 1)
    return jnp.where(block >= 0, found, jnp.zeros((), values.dtype))


def _opens(grouped: Grouped, pooled: Array, stride: int) -> tuple[Array, Array]:
    """(tokens that stand in some slot, those that are the first of theirs), bool [B, T]."""
    whole = grouped.place // stride < grouped.size // stride
    stays = grouped.valid & (~pooled | whole)
    return stays, stays & (~pooled | (grouped.place % stride == 0))


def dense_blocks(
    grouped: Grouped, worth: Array, each: int, most: int, stride: int, room: int
) -> Array:
    """Which blocks of `each` groups are read densely, bool [B, N].

    The first and the last, and of the others the `most` of largest worth, those of -inf excepted;
    in this order, by worth, as long as the whole fits into `room` slots.

    Args:
      worth: float32 [B, N], of blocks; ties: the earlier one.
    """
    number = worth.shape[1]
    count = -(-grouped.count // each)
    block = jnp.arange(number)
    there = block < count[:, None]
    always = there & ((block == 0) | (block == count[:, None] - 1))
    others = jnp.where(there & ~always, worth, -jnp.inf)
    rank = lambda x: jnp.argsort(jnp.argsort(-x, axis=1, stable=True), axis=1)  # noqa: E731
    wanted = always | ((rank(others) < most) & (others > -jnp.inf))
    own, content = blocks_of(grouped, each), grouped.kind == CONTENT
    pooled = content & (own >= 0)
    _, first = _opens(grouped, pooled, stride)
    row = jnp.arange(own.shape[0])[:, None]
    more = jnp.zeros(worth.shape, jnp.int32)  # slots that a dense block takes beyond a pooled one
    more = more.at[row, jnp.where(pooled, own, number)].add((~first).astype(jnp.int32), mode="drop")
    order = jnp.lexsort((rank(worth), ~always, ~wanted))
    taken = jnp.cumsum(jnp.take_along_axis(jnp.where(wanted, more, 0), order, 1), 1)
    taken = jnp.take_along_axis(taken, jnp.argsort(order, axis=1), 1)
    return wanted & (taken <= (room - jnp.sum(first, 1))[:, None])


def sources(grouped: Grouped, dense: Array, each: int, stride: int, room: int) -> Sources:
    """Content tokens of blocks that are not dense in windows of `stride`, within their group; a
    window that is not full is left out. All other tokens for themselves. Where there is no room,
    the oldest windows are left out, then the oldest tokens.

    Args:
      dense: bool [B, N], of blocks of `each` groups. room: slots, M.
    """
    block = blocks_of(grouped, each)
    pooled = (grouped.kind == CONTENT) & (block >= 0) & ~_spread(dense, block)
    stays, first = _opens(grouped, pooled, stride)
    excess = jnp.maximum(jnp.sum(first, 1, keepdims=True) - room, 0)
    windows = first & pooled
    more = jnp.maximum(excess - jnp.sum(windows, 1, keepdims=True), 0)
    kept = windows & (jnp.cumsum(windows, 1) > excess)
    kept |= first & ~pooled & (jnp.cumsum(first & ~pooled, 1) > more)
    index = jnp.arange(block.shape[1], dtype=jnp.int32)
    opener = jnp.where(pooled, jax.lax.cummax(jnp.where(windows, index, -1), axis=1), index)
    opener = jnp.maximum(opener, 0)
    slot = jnp.where(kept, jnp.cumsum(kept, 1) - 1, room)
    slot = jnp.where(stays, jnp.take_along_axis(slot, opener, 1), room)
    which = jnp.where(pooled, grouped.place % stride, 0)
    row = jnp.arange(block.shape[0])[:, None]
    found = jnp.full((block.shape[0], room, stride), -1, jnp.int32)
    found = found.at[row, slot, which].set(jnp.broadcast_to(index, slot.shape), mode="drop")
    return Sources(found, jnp.sum(found >= 0, 2))


def mix(kv: KV, source: Sources, positions: str = "contiguous", bias: bool = False) -> KV:
    """The tokens that `source` says: means of keys before rotation, of values and of columns.

    Args:
      kv: a prompt, compact and ascending, keys before rotation, pos [1, B, 1, T].
      positions: "contiguous": one after the other, the newest where it was, so that what follows
        needs no other position; "original": of each slot's first token; "centre": of its middle
        one.
      bias: whether the column "bias" is the log of how many tokens a slot stands for.

    Returns:
      KV of M slots, compact and ascending.
    """
    width = source.index.shape[2]
    count = jnp.maximum(source.count, 1).astype(jnp.float32)[None, :, None]
    zeros = lambda x: jnp.zeros((*x.shape[:3], source.index.shape[1], *x.shape[4:]), jnp.float32)  # noqa: E731
    sums = jax.tree.map(zeros, (kv.k, kv.v, kv.extra))

    def add(j: Array, sums: tuple) -> tuple:
        got = buffer.take(kv, source.index[None, :, None, :, j])
        return jax.tree.map(lambda a, b: a + b, sums, (got.k, got.v, got.extra))

    sums = jax.lax.fori_loop(0, width, add, sums)

    def mean(a: Array, x: Array) -> Array:
        return (a / count.reshape(count.shape + (1,) * (x.ndim - 4))).astype(x.dtype)

    k, v, extra = jax.tree.map(mean, sums, (kv.k, kv.v, kv.extra))
    if bias:
        extra = {**extra, "bias": jnp.broadcast_to(jnp.log(count), k.shape[:4])}
    at = source.index[:, :, 0]
    if positions == "centre":
        middle = jnp.maximum(source.count - 1, 0) // 2
        at = jnp.take_along_axis(source.index, middle[..., None], 2)[..., 0]
    old = kv.pos[0, :, 0]
    pos = jnp.take_along_axis(old, jnp.maximum(at, 0), 1)
    if positions == "contiguous":
        held = jnp.sum(source.count > 0, 1)
        pos = (jnp.max(old, 1) + 1 - held)[:, None] + jnp.arange(pos.shape[1])
    pos = jnp.where(source.count > 0, pos, -1).astype(jnp.int32)[None, :, None]
    out = dataclasses.replace(kv, k=k, v=v, pos=pos, extra=extra)
    # Text inside a window may come before the window's middle.
    return buffer.by_position(out) if positions == "centre" else out
