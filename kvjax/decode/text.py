"""From text to text: prompts in, completions out, whole or as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import Chain, Stage, chain, store
from kvjax.decode.lists import token_lists
from kvjax.decode.loop import generate, prefill
from kvjax.decode.process import Processor
from kvjax.decode.replay import repeat_words
from kvjax.decode.sample import Sampler
from kvjax.models.llama import Model
from kvjax.models.tokenizer import Tokenizer

# Prompts are padded to a multiple of this, so that prompts of similar length compile once.
BUCKET = 64
# Tokens decoded between two looks at the text.
SEGMENT = 16


def pad(rows: Sequence[Sequence[int]], multiple: int = BUCKET) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists: (tokens int32 [B, T], lengths int32 [B])."""
    if not rows or any(len(row) == 0 for row in rows):
        raise ValueError("every prompt needs at least one token")
    time = -(-max(map(len, rows)) // multiple) * multiple
    tokens = np.zeros((len(rows), time), np.int32)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = ids
    return tokens, np.asarray([len(row) for row in rows], np.int32)


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[dict[str, str]]],
    method: Chain | Stage | None = None,
    *,
    new_tokens: int = 128,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    processor: Processor | None = None,
    chunk: int | None = None,
    exact_layers: tuple[int, ...] = (),
    kernels: str = "xla",
    segment: int = SEGMENT,
    callback: Callable[[list[str]], Any] | None = None,
) -> Iterator[list[str]]:
    """Completes prompts, yielding each row's new text every few tokens.

    Args:
      prompts: texts, or chats (lists of {"role", "content"}), which go through the model's own
        template.
      method: how the cache holds tokens; None: exactly.
      new_tokens: at most so many per row.
      sampler: None: greedy. seed: of its draws; the same seed gives the same text.
      stop: strings that end a row; they and what follows are cut off.
      processor: changes logits before sampling.
      chunk: prompt tokens per forward pass; None: all at once.
      exact_layers, kernels: see `kvjax.cache.init_cache`.
      segment: tokens between two yields.
      callback: called with what is yielded.

    Raises:
      ValueError: a prompt without a token, a stop string that is empty or no string.

    Yields:
      A list with the text that each row has gained since last time ("" where none).
    """
    if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
        raise ValueError(f"stop={stop!r}: expected a list of strings that are not empty")
    rows = [tokenizer.encode(p) if isinstance(p, str) else tokenizer.chat(p) for p in prompts]
    tokens, lengths = pad(rows)
    segment = min(segment, new_tokens)
    rounds = -(-new_tokens // segment)
    method = chain(store()) if method is None else chain(method)
    asking = repeat_words(tokenizer, not isinstance(prompts[0], str)) if method.replays else None
    logits, cache = prefill(
        model, tokens, method, lengths=jnp.asarray(lengths), new_tokens=rounds * segment,
        chunk=chunk, exact_layers=exact_layers, kernels=kernels, words=asking,
        constants=token_lists(tokenizer, method),
    )  # fmt: skip
    shown = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)
    streams = [tokenizer.stream() for _ in rows]
    texts, sent = ["" for _ in rows], [0 for _ in rows]
    done = np.zeros(len(rows), bool)
    run = None
    hold = max((len(s) for s in stop), default=1) - 1  # a stop string may still be growing
    for number in range(rounds):
        left = jnp.asarray(np.where(done, 0, min(segment, new_tokens - number * segment)))
        run = generate(
            model, cache, logits, segment, sampler=sampler,
            key=jax.random.key(seed), processor=processor,
            prompt=shown, limit=left, resume=run, donate=True,
        )  # fmt: skip
        cache, logits = run.cache, run.logits
        ended = np.asarray(run.stopped)
        ids = np.asarray(run.tokens)
        pieces = []
        for row, own in enumerate(ids):
            if not done[row]:
                fresh = [int(i) for i in own if i >= 0 and int(i) not in tokenizer.eos]
                texts[row] += "".join(streams[row].push(i) for i in fresh)
                last = ended[row] or number == rounds - 1
                if last:
                    texts[row] += streams[row].end()
                cut = min((at for s in stop if (at := texts[row].find(s)) >= 0), default=None)
                if cut is not None:
                    texts[row], last = texts[row][:cut], True
                done[row] = last
            ready = len(texts[row]) if done[row] else max(len(texts[row]) - hold, sent[row])
            pieces.append(texts[row][sent[row] : ready])
            sent[row] = ready
        if callback is not None:
            callback(pieces)
        yield pieces
        if done.all():
            return


def complete(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Any], *args: Any, **kwargs: Any
) -> list[str]:
    """The whole completions of prompts: `stream`, joined. Takes what `stream` takes."""
    rows = ["" for _ in prompts]
    for pieces in stream(model, tokenizer, prompts, *args, **kwargs):
        rows = [row + piece for row, piece in zip(rows, pieces)]
    return rows
