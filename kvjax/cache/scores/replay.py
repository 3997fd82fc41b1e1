"""Replay: a finished prompt is read a second time, over the whole of it, to see what that needs.

A chain asks for it through a column of its own (`Replay`). Who runs the model, as
`kvjax.decode.replay` does, passes rows that repeat a part of the prompt through `forward`; what it
returns is never committed but goes to `replayed`, and the column then says what each token
received. All of it before `finish`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.attention import dot_keys
from kvjax.cache.cache import Cache
from kvjax.cache.chain import Pending
from kvjax.cache.scores.score import Score
from kvjax.cache.stage import Column, Replay
from kvjax.cache.types import KV, New, rotate

ROWS = 128  # rows of a replay at a time: nothing [T, T] is stored


@dataclasses.dataclass(frozen=True)
class ReplayedAttention(Score):
    """See `replayed_attention`."""

    column: Replay

    @property
    def always(self) -> int:
        return self.column.sinks

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.column,)

    def __call__(self, kv: KV, context: object, unrotated: bool) -> Array:
        return jnp.where(kv.pos < self.column.sinks, jnp.inf, kv.extra[self.column.name])


def replayed_attention(chunk: int = 2000, hint: int = 8, sinks: int = 4) -> Score:
    """The most attention that a token receives while the model repeats its part of the prompt.

        s_j = max_{i, g} softmax(q_gi . [sinks, chunk of j, rows of the replay up to i])_j

    Args:
      chunk: tokens that are repeated at a time.
      hint: tokens before a chunk that are shown first, so that the model knows where to go on.
      sinks: first tokens, that always stay, and to which every replay attends.
    """
    if chunk < 1 or hint < 0 or sinks < 0:
        raise ValueError(
            f"chunk={chunk}, hint={hint}, sinks={sinks}: expected a chunk of at least 1 token, and "
            "no negative number"
        )
    return ReplayedAttention(Replay(chunk=chunk, hint=hint, sinks=sinks))


def replayed(
    cache: Cache, new: New, column: Replay, start: Array, stop: Array, done: bool = True
) -> Cache:
    """The cache, knowing what rows that repeat a part of its unfinished prompt attended to.

    Args:
      new: from `forward(..., cache, statistics=True)`, for rows at positions after the prompt.
      column: one of `cache.replays`, for which they were read.
      start, stop: int32 [B], the positions that they repeat, [start, stop).
      done: whether this was the last part of the prompt, for the last of the columns.

    Returns:
      The same tokens; the column is the larger of what it was and what was received.
    """
    states = list(cache.state)
    for n in cache.chains:
        state = states[n]
        if column not in cache.transforms[n].replays or not isinstance(state, Pending):
            continue
        layers = np.asarray(cache.groups[n])
        rope, held, seen = cache.constants["rope"][layers], state.kv, new.seen
        keys = rotate(new.kv.k[layers], new.kv.pos, rope)
        best = _received(
            held, state.spec.unrotated, rope, seen.q[layers], seen.pos, keys, seen.span[layers],
            column.sinks, start, stop, cache.softcap,
        )  # fmt: skip
        extra = {**held.extra, column.name: jnp.maximum(held.extra[column.name], best)}
        held = dataclasses.replace(held, extra=extra)
        states[n] = dataclasses.replace(state, kv=held, due=state.due and not done)
    return cache.replace(state=tuple(states))


def _received(
    held: KV, unrotated: bool, rope: object, q: Array, row: Array, keys: Array, span: Array,
    sinks: int, start: Array, stop: Array, softcap: float | None,
) -> Array:  # fmt: skip
    """The most attention from any row, float32 [L, B, H, N]; 0 outside of [start, stop).

    Each row's softmax runs over the sinks, the part that is repeated and the rows up to it.
    """
    heads, slots = held.k.shape[2:4]
    batch, count = row.shape
    groups = q.shape[2] // heads
    size = min(ROWS, count)
    blocks = -(-count // size)
    more = blocks * size - count
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))
    at = jnp.pad(row, ((0, 0), (0, more)), constant_values=-1)

    def layer(args: tuple) -> Array:
        k, pos, rope, q, keys, span = args
        if unrotated:
            k = rotate(k, pos, rope)
        first = jnp.minimum(sinks, start)[:, None, None]
        inside = (pos >= start[:, None, None]) & (pos < stop[:, None, None])
        read = (pos >= 0) & (inside | (pos < first))
        both = jnp.concatenate([k.astype(keys.dtype), keys], 2)
        own = jnp.broadcast_to(row[:, None], (batch, pos.shape[1], count))
        where = jnp.concatenate([jnp.where(read, pos, -1), own], 2)

        def step(done: Array, i: Array) -> tuple[Array, None]:
            cut = jax.lax.dynamic_slice_in_dim(q, i * size, size, 2)
            mine = jax.lax.dynamic_slice_in_dim(at, i * size, size, 1)[:, None, None, :, None]
            logits = dot_keys(cut.reshape(batch, heads, groups * size, -1), both)
            logits = logits.reshape(batch, heads, groups, size, slots + count)
            if softcap is not None:
                logits = softcap * jnp.tanh(logits / softcap)
            key = where[:, :, None, None, :]
            ok = (key >= 0) & (key <= mine) & (mine - key < span)
            logits = jnp.where(ok, logits, -jnp.inf)
            top = jnp.max(logits, -1, keepdims=True)
            p = jnp.exp(logits - jnp.where(jnp.isneginf(top), 0.0, top))
            total = jnp.sum(p, -1, keepdims=True)
            got = p[..., :slots] / jnp.where(total > 0, total, 1.0)
            return jnp.maximum(done, jnp.max(got, (2, 3))), None

        none = jnp.zeros((batch, heads, slots), jnp.float32)
        best = jax.lax.scan(step, none, jnp.arange(blocks))[0]
        return jnp.where(inside & (pos >= 0), best, 0.0)

    pos = jnp.broadcast_to(held.pos, (held.k.shape[0], *held.pos.shape[1:]))
    return jax.lax.map(layer, (held.k, pos, rope, q, keys, span))
