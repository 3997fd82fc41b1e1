"""One exact prefill per prompt, which every method that prefills exactly then compresses."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax import cache as kv
from kvjax.compress.vidkv import SALIENCE, salience
from kvjax.decode import positions_of, replay
from kvjax.models import forward
from kvjax.models.llama import flatten


@dataclasses.dataclass(frozen=True)
class Exact:
    """An exact prefill: what every method is given.

    Attributes:
      new: keys, values and statistics of all rows. logits: [B, V] of the last row.
      batch, time: its size. seconds: of the second run.
      tokens: int32 [B, T], the prompts; their positions are those of `new`.
    """

    new: Any
    logits: Array
    batch: int
    time: int
    seconds: float
    tokens: Array | None = None


@functools.partial(jax.jit, static_argnames=("marks", "rule"))
def _forward(
    model: Any, tokens: Array, positions: Array, marks: tuple = (), rule: Any = None,
    columns: Any = None,
) -> Any:  # fmt: skip
    logits, new = forward(
        model, tokens, positions, phase="prefill", logits="last", statistics=True, marks=marks,
        rule=rule, columns=columns,
    )  # fmt: skip
    return logits[:, 0], new


@jax.jit
def _commit(moving: Any, rest: Any, new: Any) -> Any:
    return kv.apart(kv.finish(kv.commit(kv.together(moving, rest), new, phase="prefill")))[0]


@jax.jit
def _hold(moving: Any, rest: Any, new: Any) -> Any:
    return kv.apart(kv.commit(kv.together(moving, rest), new, phase="prefill"))[0]


@jax.jit
def _finish(moving: Any, rest: Any) -> Any:
    return kv.apart(kv.finish(kv.together(moving, rest)))[0]


def _clocked(run: Callable[[], Any], timed: bool) -> tuple[Any, float]:
    """What it returns, and its seconds; those of a second run where `timed`: the first compiles."""
    for _ in range(2 if timed else 1):
        start = time.perf_counter()
        out = jax.block_until_ready(run())
        seconds = time.perf_counter() - start
    return out, seconds


def exact_prefill(
    model: Any, tokens: Array, timed: bool, marks: tuple = (), lengths: Array | None = None
) -> Exact:
    """Runs prompts [B, T], right-padded where `lengths` [B] says so."""
    positions = positions_of(tokens, lengths)
    (logits, new), seconds = _clocked(lambda: _forward(model, tokens, positions, marks), timed)
    return Exact(new, logits, *tokens.shape, seconds, tokens)


def under_rule(
    model: Any, exact: Exact, chain: Any, timed: bool = False, columns: Any = None
) -> Exact:
    """The same prompts as the chain wants them computed: again, where it has a rule for that."""
    if chain.rule is None:
        return exact
    given = (exact.tokens, jnp.max(exact.new.kv.pos, 0)[:, 0])
    (logits, new), seconds = _clocked(
        lambda: _forward(model, *given, chain.input_marks, chain.rule, columns), timed
    )
    return dataclasses.replace(exact, new=new, logits=logits, seconds=seconds)


def with_salience(model: Any, exact: Exact, text: int) -> Exact:
    """Its tokens with the column "salience" that VidKV reads: the last `text` of them are the
    question, the others are what a video would be, each worth its likeness to the question."""
    visual = jnp.broadcast_to(jnp.arange(exact.time) < exact.time - text, exact.tokens.shape)
    worth = salience(flatten(model)["embed"][exact.tokens], visual)
    return with_columns(exact, {SALIENCE.name: worth})


def with_columns(exact: Exact, columns: dict[str, Array]) -> Exact:
    """Its tokens with further columns, [B, T] by name."""
    if not columns:
        return exact
    rows = exact.new.kv
    wide = lambda x: jnp.broadcast_to(x[None, :, None], rows.k.shape[:4])  # noqa: E731
    extra = {**rows.extra, **{name: wide(x) for name, x in columns.items()}}
    new = dataclasses.replace(exact.new, kv=dataclasses.replace(rows, extra=extra))
    return dataclasses.replace(exact, new=new)


def compressed(
    model: Any, exact: Exact, chain: Any, room: int, dtype: Any, timed: bool = False,
    layout: Any = None, constants: Any = None, words: Any = None,
) -> tuple[Any, float]:  # fmt: skip
    """The cache of a method after an exact prefill; seconds that commit and finish took, and the
    replay where the method asks for one (`words`: see `kvjax.decode.replay`)."""
    cache = kv.init_cache(
        model.config, chain, exact.batch, exact.time + room, prompt=exact.time, dtype=dtype,
        constants=constants, layout=layout,
    )  # fmt: skip
    exact = with_columns(exact, kv.token_columns(cache, exact.tokens, exact.new.kv.pos[0, :, 0]))
    moving, rest = kv.apart(cache)

    def run() -> Any:
        if not chain.replays:
            return _commit(moving, rest, exact.new)
        held = kv.together(_hold(moving, rest, exact.new), rest)
        held = replay(model, held, exact.tokens, exact.new.kv.pos[0, :, 0], words)
        return _finish(*kv.apart(held))

    out, seconds = _clocked(run, timed)
    return kv.together(out, rest), seconds


def asked(
    model: Any, exact: Exact, question: Array, positions: Array, marks: tuple = (),
    layout: Any = None, dtype: Any = jnp.float32,
) -> Exact:  # fmt: skip
    """The same prompts with further tokens [B, T] at their ends, computed exactly after them."""
    cache = kv.init_cache(
        model.config, kv.chain(kv.store()), exact.batch, exact.time + question.shape[1],
        prompt=exact.time, dtype=dtype, layout=layout,
    )  # fmt: skip
    cache = kv.commit(cache, exact.new, phase="prefill")
    logits, new = _ask(model, question, positions, cache, marks)
    tokens = jnp.concatenate([exact.tokens, question], 1)
    return Exact(join(exact.new, new), logits[:, 0], *tokens.shape, exact.seconds, tokens)


@functools.partial(jax.jit, static_argnames="marks")
def _ask(model: Any, tokens: Array, positions: Array, cache: Any, marks: tuple) -> Any:
    return forward(
        model, tokens, positions, cache, logits="last", statistics=True, phase="append", marks=marks
    )


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
