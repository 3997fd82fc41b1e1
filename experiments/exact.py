"""One exact prefill per prompt, which every method that prefills exactly then compresses."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax import cache as kv
from kvjax.compress.vidkv import SALIENCE, salience
from kvjax.decode import positions_of
from kvjax.models import forward
from kvjax.models.llama import flatten


@dataclasses.dataclass(frozen=True)
class Exact:
    """An exact prefill: what every method is given.

    Attributes:
      new: keys, values and statistics of all rows. logits: [B, V] of the last row.
      batch, time: its size. seconds: of the second run.
      tokens: ids [B, T].
    """

    new: Any
    logits: Array
    batch: int
    time: int
    seconds: float
    tokens: Array


@functools.partial(jax.jit, static_argnames="marks")
def _forward(model: Any, tokens: Array, positions: Array, marks: tuple = ()) -> Any:
    logits, new = forward(
        model, tokens, positions, phase="prefill", logits="last", statistics=True, marks=marks
    )
    return logits[:, 0], new


@jax.jit
def _commit(moving: Any, rest: Any, new: Any) -> Any:
    return kv.apart(kv.finish(kv.commit(kv.together(moving, rest), new, phase="prefill")))[0]


def exact_prefill(model: Any, tokens: Array, timed: bool, marks: tuple = ()) -> Exact:
    positions = positions_of(tokens)
    seconds = 0.0
    for _ in range(2 if timed else 1):
        start = time.perf_counter()
        logits, new = jax.block_until_ready(_forward(model, tokens, positions, marks))
        seconds = time.perf_counter() - start
    return Exact(new, logits, *tokens.shape, seconds, tokens)


def with_salience(model: Any, exact: Exact, text: int) -> Exact:
    """Its tokens with the column "salience" that VidKV reads: the last `text` of them are the
    question, the others are what a video would be, each worth its likeness to the question."""
    visual = jnp.broadcast_to(jnp.arange(exact.time) < exact.time - text, exact.tokens.shape)
    worth = salience(flatten(model)["embed"][exact.tokens], visual)
    rows = exact.new.kv
    column = jnp.broadcast_to(worth[None, :, None], rows.k.shape[:4])
    rows = dataclasses.replace(rows, extra={**rows.extra, SALIENCE.name: column})
    return dataclasses.replace(exact, new=dataclasses.replace(exact.new, kv=rows))


def compressed(
    config: Any, exact: Exact, chain: Any, room: int, dtype: Any, timed: bool = False,
    layout: Any = None, constants: Any = None,
) -> tuple[Any, float]:  # fmt: skip
    """The cache of a method after an exact prefill; seconds that commit and finish took."""
    cache = kv.init_cache(
        config, chain, exact.batch, exact.time + room, prompt=exact.time, dtype=dtype,
        constants=constants, layout=layout,
    )  # fmt: skip
    moving, rest = kv.apart(cache)
    seconds = 0.0
    for _ in range(2 if timed else 1):  # the first call compiles
        start = time.perf_counter()
        out = jax.block_until_ready(_commit(moving, rest, exact.new))
        seconds = time.perf_counter() - start
    return kv.together(out, rest), seconds


def join(a: Any, b: Any) -> Any:
    """Two results of `forward`, the rows of the one after those of the other."""
    axis = lambda n: lambda x, y: jnp.concatenate([x, y], n)  # noqa: E731
    cat = axis(3)
    rows = jax.tree.map(cat, a.kv, b.kv)
    seen = kv.Observation(
        cat(a.seen.q, b.seen.q), cat(a.seen.max, b.seen.max), cat(a.seen.sum, b.seen.sum),
        axis(1)(a.seen.pos, b.seen.pos), a.seen.span,
    )  # fmt: skip
    return kv.New(rows, seen)
