"""Prefill, generate, score: the jitted loops. Pure: they return a new cache."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import Cache, Chain, Stage, apart, commit, finish, init_cache, together
from kvjax.cache.types import pytree
from kvjax.decode.process import Processor, processors
from kvjax.decode.replay import Words, replay
from kvjax.decode.sample import Sampler
from kvjax.models.decoder import forward
from kvjax.models.llama import Model


def positions_of(tokens: Array, lengths: Array | None = None) -> Array:
    """Positions of right-padded prompts: int32 [B, T], -1 from each row's length on."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return index if lengths is None else jnp.where(index < lengths[:, None], index, -1)


@functools.partial(
    jax.jit, static_argnames=("phase", "fold", "read", "logits"), donate_argnames=("moving",)
)
def _extend(
    model: Model,
    moving: Any,
    rest: Cache,
    tokens: Array,
    positions: Array,
    columns: Any = None,
    *,
    phase: str,
    fold: bool,
    read: bool,
    logits: str,
) -> tuple[Array | None, Any]:
    cache = together(moving, rest)
    out, new = forward(
        model, tokens, positions, cache, phase=phase, fold=fold, read=read, logits=logits,
        columns=columns,
    )  # fmt: skip
    cache = new if fold else commit(cache, new, phase=phase)
    return out, apart(cache)[0]


@jax.jit
def _finish(moving: Any, rest: Cache) -> Any:
    return apart(finish(together(moving, rest)))[0]


def prefill(
    model: Model,
    tokens: Array,
    transform: Chain | Stage,
    *,
    lengths: Array | None = None,
    positions: Array | None = None,
    max_length: int | None = None,
    new_tokens: int | None = None,
    chunk: int | None = None,
    dtype: Any = None,
    exact_layers: tuple[int, ...] = (),
    constants: Any = None,
    kernels: str = "xla",
    layout: Any = None,
    words: Words | None = None,
    columns: Mapping[str, Array] | None = None,
    hold: bool = False,
) -> tuple[Array, Cache]:
    """Runs prompts into a fresh cache.

    Chains that stream are committed layer by layer inside the forward pass: at no time are there
    more exact keys than those of one layer. The others hold the exact prompt until its end.

    Args:
      tokens: int32 [B, T].
      transform: how the cache holds tokens.
      lengths: int32 [B], tokens of each right-padded row; None: all T.
      positions: int32 [B, T] in place of lengths (-1: padding, anywhere). None: one after the
        other, from the end of the shared prefix on where one is given.
      max_length: room per row, prompt and shared prefix included. new_tokens: in its place, room
        beyond them.
      chunk: tokens per forward pass; None: all at once.
      dtype: of exact keys and values; None: that of the embedding.
      exact_layers, constants, kernels, layout: see `init_cache`.
      words: for chains that have the prompt replayed (`kvjax.decode.replay`): what asks for it.
      columns: what the tokens bring by name, such as their type, float32 [B, T].
      hold: do not finish the prompt: a chain that needs all of it then still holds it exactly, and
        `finish` may be called when more is known.

    Returns:
      (logits float32 [B, V] of the last token of each row, cache ready to decode).
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}: expected [batch, time]")
    batch, time = tokens.shape
    given = None
    if isinstance(transform, Chain):
        given = transform.given(constants or {}, batch)
    if positions is None:
        positions = positions_of(tokens, lengths)
        if given is not None:
            positions = jnp.where(positions >= 0, positions + given[0][:, None], -1)
    if (max_length is None) == (new_tokens is None):
        raise ValueError(
            f"max_length={max_length}, new_tokens={new_tokens}: give exactly one of the two"
        )
    if max_length is None:
        max_length = time + new_tokens + (0 if given is None else given[1])
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}: at least 1 token per forward pass")
    cache = init_cache(
        model.config,
        transform,
        batch,
        max_length,
        prompt=time,
        dtype=model.embed.dtype if dtype is None else dtype,
        exact_layers=exact_layers,
        constants=constants,
        kernels=kernels,
        layout=layout,
    )
    return extend(
        model,
        cache,
        tokens,
        positions,
        phase="prefill",
        chunk=chunk,
        fresh=given is None,
        words=words,
        columns=columns,
        hold=hold,
    )


def extend(
    model: Model,
    cache: Cache,
    tokens: Array,
    positions: Array,
    *,
    phase: str = "append",
    chunk: int | None = None,
    fresh: bool = False,
    words: Words | None = None,
    columns: Mapping[str, Array] | None = None,
    hold: bool = False,
) -> tuple[Array, Cache]:
    """Runs more tokens into a cache, in chunks; donates the cache.

    Args:
      tokens, positions: int32 [B, T], -1: padding.
      phase: "prefill" (then `finish` is called at the end) or "append" (a later turn).
      chunk: tokens per forward pass; None: all at once.
      fresh: the cache is known to be empty.
      words, columns, hold: see `prefill`.

    Returns:
      (logits float32 [B, V] of each row's last token, cache).

    Raises:
      ValueError: chunks of a prompt that is computed under a rule among all of its rows.
    """
    fold = cache.foldable and not columns
    moving, rest = apart(cache)
    time = tokens.shape[1]
    size = time if chunk is None else min(chunk, time)
    if phase == "prefill" and rest.rule is not None and size < time:
        raise ValueError(
            f"chunk={chunk}: {rest.rule} needs all {time} tokens of the prompt at once"
        )
    columns = {n: jnp.asarray(x, jnp.float32) for n, x in (columns or {}).items()}
    best = jnp.full((tokens.shape[0],), -1, jnp.int32)
    result = None
    for start in range(0, time, size):
        part = {"tokens": tokens, "positions": positions, **columns}
        part = {name: x[:, start : start + size] for name, x in part.items()}
        if part["tokens"].shape[1] < size:  # the last chunk: the same shape, compiled once
            part = {
                name: jnp.pad(
                    x, ((0, 0), (0, size - x.shape[1])), constant_values=-(name == "positions")
                )
                for name, x in part.items()
            }
        t, p = part.pop("tokens"), part.pop("positions")
        logits, moving = _extend(
            model, moving, rest, t, p, part,
            phase=phase, fold=fold, read=not (fresh and start == 0), logits="last",
        )  # fmt: skip
        last = jnp.max(p, 1)
        logits = logits[:, 0]
        result = logits if result is None else jnp.where((last > best)[:, None], logits, result)
        best = jnp.maximum(best, last)
    if phase == "prefill":
        if rest.replays:
            moving, rest = apart(replay(model, together(moving, rest), tokens, positions, words))
        moving = moving if hold else _finish(moving, rest)
    return result, together(moving, rest)


@pytree()
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: int32 [B, N], -1 after a row has stopped (its stop token included before).
      logprobs: float32 [B, N], log-probability of each token before filters; 0 past the end.
      count: int32 [B], tokens per row.
      stopped: bool [B], whether a stop token came.
      logits: float32 [B, V], of what would come next.
      cache: holds every generated token of rows that have not stopped.
      processor: state of the logits processor.
      drawn: int32 scalar, draws made with the key so far.
    """

    tokens: Array
    logprobs: Array
    count: Array
    stopped: Array
    logits: Array
    cache: Cache
    processor: Any
    drawn: Array


def generate(
    model: Model,
    cache: Cache,
    logits: Array,
    new_tokens: int,
    *,
    sampler: Sampler | None = None,
    key: Array | None = None,
    stop: tuple[int, ...] | None = None,
    processor: Processor | None = None,
    prompt: Array | None = None,
    limit: Array | None = None,
    resume: Generation | None = None,
    donate: bool = False,
) -> Generation:
    """Decodes up to `new_tokens` tokens per row in one compiled loop.

    Args:
      cache, logits: from `prefill` (or a previous generation).
      new_tokens: static; the loop ends earlier when all rows have stopped.
      sampler: None: greedy.
      key: PRNG key, needed unless greedy. Draw n uses fold_in(key, n), counted on by `resume`.
      stop: token ids that end a row; None: the model's own.
      processor: changes logits before sampling; `prompt` int32 [B, T] (-1: padding) is shown to it.
      limit: int32 [B], at most so many tokens in each row.
      resume: continue where that generation ended (its processor state and stopped rows).
      donate: overwrite the given cache, which must not be used again; False: copy it once.

    Raises:
      ValueError: no room in the cache, or a sampler without key.
    """
    sampler = Sampler() if sampler is None else sampler
    if sampler.temperature > 0 and key is None:
        raise ValueError("generate: sampling needs key=jax.random.key(seed)")
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: at least 1")
    if model.config.bidirectional:
        raise ValueError(
            "generate: this model is bidirectional and does not predict the next token; use "
            "kvjax.diffusion.generate"
        )
    stop = model.config.eos if stop is None else tuple(stop)
    batch = logits.shape[0]
    check_room(cache, new_tokens)
    processor = processors() if processor is None else processor
    if resume is not None:
        state, stopped, drawn = resume.processor, resume.stopped, resume.drawn
    else:
        prompt = jnp.full((batch, 1), -1, jnp.int32) if prompt is None else jnp.asarray(prompt)
        state = processor.init(prompt, logits.shape[1])
        stopped, drawn = jnp.zeros((batch,), bool), jnp.zeros((), jnp.int32)
    moving, rest = apart(cache)
    run = _generate_donating if donate else _generate
    out, moving = run(
        model, moving, rest, logits,
        jax.random.key(0) if key is None else key, drawn, state, stopped,
        jnp.full((batch,), new_tokens, jnp.int32) if limit is None else jnp.asarray(limit),
        new_tokens=new_tokens, sampler=sampler, stop=stop, processor=processor,
    )  # fmt: skip
    tokens, logprobs, count, stopped, logits, state, drawn = out
    return Generation(
        tokens, logprobs, count, stopped, logits, together(moving, rest), state, drawn
    )


def check_room(cache: Cache, more: int) -> None:
    """Raises ValueError where a row has no room for `more` tokens; says nothing under a trace."""
    if isinstance(cache.length, jax.core.Tracer):
        return
    whole = cache.length.is_fully_addressable
    longest = int(np.max(np.asarray(cache.length)) if whole else jnp.max(cache.length))
    if longest + more > cache.max_length:
        raise ValueError(
            f"the cache has room for max_length={cache.max_length} tokens per row, holds up to "
            f"{longest} and {more} more are asked for; prefill with a larger max_length"
        )


def _generate_body(
    model: Model, moving: Any, rest: Cache, logits: Array, key: Array, drawn: Array, state: Any,
    stopped: Array, limit: Array, *, new_tokens: int, sampler: Sampler, stop: tuple[int, ...],
    processor: Processor,
) -> Any:  # fmt: skip
    batch = logits.shape[0]

    def more(carry: Any) -> Array:
        step, active = carry[0], carry[6]
        return (step < new_tokens) & jnp.any(active)

    def body(carry: Any) -> Any:
        step, moving, logits, state, tokens, logprobs, active, stopped, count = carry
        token, logprob = sampler(processor(state, logits), jax.random.fold_in(key, drawn + step))
        token = jnp.where(active, token, -1)
        state = processor.update(state, token)
        tokens = tokens.at[:, step].set(token)
        logprobs = logprobs.at[:, step].set(jnp.where(active, logprob, 0.0))
        count = count + active
        ends = functools.reduce(jnp.logical_or, [token == s for s in stop], jnp.zeros_like(active))
        stopped = stopped | (active & ends)
        still = active & ~ends
        cache = together(moving, rest)
        position = jnp.where(still, cache.length, -1)[:, None]
        out, new = forward(model, token[:, None], position, cache)
        moving = apart(commit(cache, new))[0]
        logits = jnp.where(still[:, None], out[:, 0], logits)
        still = still & (count < limit)
        return step + 1, moving, logits, state, tokens, logprobs, still, stopped, count

    carry = (
        jnp.zeros((), jnp.int32), moving, logits.astype(jnp.float32), state,
        jnp.full((batch, new_tokens), -1, jnp.int32), jnp.zeros((batch, new_tokens), jnp.float32),
        ~stopped & (limit > 0), stopped, jnp.zeros((batch,), jnp.int32),
    )  # fmt: skip
    carry = jax.lax.while_loop(more, body, carry)
    step, moving, logits, state, tokens, logprobs, _, stopped, count = carry
    return (tokens, logprobs, count, stopped, logits, state, drawn + step), moving


_static = ("new_tokens", "sampler", "stop", "processor")
_generate = jax.jit(_generate_body, static_argnames=_static)
_generate_donating = jax.jit(_generate_body, static_argnames=_static, donate_argnames=("moving",))


@functools.partial(jax.jit, static_argnames=("keep_logits",))
def _score(
    model: Model, moving: Any, rest: Cache, logits: Array, tokens: Array, keep_logits: bool
) -> Any:
    def step(carry: Any, token: Array) -> Any:
        moving, logits = carry
        cache = together(moving, rest)
        valid = token >= 0
        chosen = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], 1)[:, 0]
        logprob = jnp.where(valid, chosen - jax.nn.logsumexp(logits, -1), 0.0)
        position = jnp.where(valid, cache.length, -1)[:, None]
        out, new = forward(model, token[:, None], position, cache)
        moving = apart(commit(cache, new))[0]
        after = jnp.where(valid[:, None], out[:, 0], logits)
        return (moving, after), (logprob, logits if keep_logits else None)

    (moving, logits), (logprobs, before) = jax.lax.scan(step, (moving, logits), tokens.T)
    before = None if before is None else jnp.moveaxis(before, 0, 1)
    return logprobs.T, before, logits, moving


def score(
    model: Model,
    cache: Cache,
    logits: Array,
    tokens: Array,
    *,
    keep_logits: bool = False,
    next_logits: bool = False,
) -> tuple:
    """Log-likelihood of given tokens, fed one by one through the (compressed) cache.

    Args:
      cache, logits: from `prefill`; the logits predict the first token.
      tokens: int32 [B, N], -1: padding at the end of a row.
      keep_logits: return the logits that predicted each token.
      next_logits: return those of what comes next too, to go on from there.

    Returns:
      (log-probabilities float32 [B, N], 0 at padding; logits float32 [B, N, V] or None; cache),
      and the next logits [B, V] where asked for.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    check_room(cache, tokens.shape[1])
    moving, rest = apart(cache)
    logprobs, before, after, moving = _score(
        model, moving, rest, logits.astype(jnp.float32), tokens, keep_logits
    )
    cache = together(moving, rest)
    return (logprobs, before, cache, after) if next_logits else (logprobs, before, cache)
