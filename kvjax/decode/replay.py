"""Reading a prompt again before it is finished, for caches that choose by what that needs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import Cache, Replay, apart, replayed, together
from kvjax.models.decoder import forward
from kvjax.models.llama import Model
from kvjax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Words:
    """Token ids that ask a model to repeat: `first` before the first part of a prompt, `later`
    before the end of the part before, `after` between that and the part itself."""

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def repeat_words(tokenizer: Tokenizer, chat: bool = False) -> Words:
    """The words of KVzip (arXiv 2505.23416), which ask in English.

    Args:
      chat: the prompt stands in the model's chat template; they end the user's turn.
    """
    ids = lambda text: tuple(tokenizer.encode(text, special=False))  # noqa: E731
    after = "\n"
    if chat:
        mark = "<<prompt>>"
        after = tokenizer.chat_text([{"role": "user", "content": mark}]).split(mark)[1]
    return Words(
        ids("\n\nRepeat the previous context exactly."),
        ids("\n\nRepeat the part of the previous context exactly, starting with "),
        ids(after),
    )


@functools.partial(jax.jit, static_argnames=("column", "done"), donate_argnames=("moving",))
def _replay(
    model: Model, moving: Any, rest: Cache, tokens: Array | None, positions: Array, start: Array,
    stop: Array, embeddings: Array | None, *, column: Replay, done: bool,
) -> Any:  # fmt: skip
    cache = together(moving, rest)
    _, new = forward(
        model, tokens, positions, cache, phase="append", logits="none", statistics=True, marks=(),
        embeddings=embeddings,
    )  # fmt: skip
    return apart(replayed(cache, new, column, start, stop, done))[0]


def replay(
    model: Model,
    cache: Cache,
    tokens: Array | None,
    positions: Array,
    words: Words | None = None,
    embeddings: Array | None = None,
) -> Cache:
    """Reads a committed but unfinished prompt again, part by part, over the whole of it.

    Nothing is committed. Costs about another prefill; does nothing for a cache that does not ask.
    Donates the cache.

    Args:
      tokens, positions: int32 [B, T], the prompt as it was committed, -1: padding, anywhere.
      words: what is said before a part; None: nothing.
      embeddings: [B, T, D] in place of tokens; then without words.
    """
    words = Words() if words is None or embeddings is not None else words
    need: Replay
    for number, need in enumerate(cache.replays):
        last_need = number == len(cache.replays) - 1
        cache = _all_parts(model, cache, tokens, positions, words, embeddings, need, last_need)
    return cache


def _all_parts(
    model: Model, cache: Cache, tokens: Array | None, positions: Array, words: Words,
    embeddings: Array | None, need: Replay, last_need: bool,
) -> Cache:  # fmt: skip
    batch, time = positions.shape
    far = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(positions >= 0, positions, far), 1, stable=True)
    count = jnp.sum(positions >= 0, 1)
    place = jnp.take_along_axis(positions, order, 1)
    base = jnp.max(positions, 1) + 1
    moving, rest = apart(cache)
    for first in range(0, time, need.chunk):
        stop = min(first + need.chunk, time)
        # Rows of the prompt: the hint, then the part itself.
        hint = list(range(max(first - need.hint, 0), first))
        said = len(words.later if first else words.first)
        after = len(words.after)
        index = [-1] * said + hint + [-1] * after + list(range(first, stop))
        index = jnp.broadcast_to(jnp.asarray(index), (batch, len(index)))
        there = (index < count[:, None]) & (count > first)[:, None]
        source = jnp.take_along_axis(order, jnp.maximum(index, 0), 1)
        rows = None
        if embeddings is None:
            prompt = jnp.take_along_axis(tokens, source, 1)
            spoken = [*(words.later if first else words.first), *[0] * len(hint), *words.after]
            spoken = jnp.asarray(spoken + [0] * (stop - first), jnp.int32)
            rows = jnp.where(index >= 0, prompt, spoken)
        seen = None
        if embeddings is not None:
            seen = jnp.take_along_axis(embeddings, source[..., None], 1)
        pos = jnp.where(there, base[:, None] + jnp.cumsum(there, 1) - 1, -1).astype(jnp.int32)
        low = place[:, first]
        high = jnp.take_along_axis(place, jnp.clip(count - 1, 0, stop - 1)[:, None], 1)[:, 0] + 1
        moving = _replay(
            model, moving, rest, rows, pos, low, jnp.where(count > first, high, low), seen,
            column=need, done=last_need and stop == time,
        )  # fmt: skip
    return together(moving, rest)
