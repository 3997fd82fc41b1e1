"""Speculative decoding: draft a tree, run it once, commit what the target accepts; one jitted loop.

Each round runs the newest token and the guesses below it through the target in one forward pass.
The accepted path is committed, of a different length in each row, and at most the cache's horizon
long: then every row was computed from what plain decoding would have shown it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import Cache, apart, commit, horizon, together
from kvjax.cache.types import pytree
from kvjax.decode.loop import check_room
from kvjax.decode.process import Processor, processors
from kvjax.decode.sample import Sampler
from kvjax.models.decoder import embed, forward
from kvjax.models.llama import Model
from kvjax.speculate.drafter import Context, Drafter, Outcome
from kvjax.speculate.verify import _Law, verify


@pytree()
class Speculation:
    """What `speculate` returns.

    Attributes:
      tokens: int32 [B, N], -1 after a row has stopped (its stop token included before).
      logprobs: float32 [B, N], log-probability of each token before filters; 0 past the end.
      count: int32 [B], tokens per row.
      stopped: bool [B], whether a stop token came.
      logits: float32 [B, V], of what would come next.
      cache: holds every generated token but a stop token, as after `generate`.
      processor: state of the logits processor.
      drawn: int32 [B], tokens drawn with the key so far, in all.
      drafter: the drafter's state.
      history: int32 [B, max_length], every known token at its position.
      forwards: int32 [B], forward passes of the target while the row was decoding.
      passes: int32 scalar, forward passes in all.
    """

    tokens: Array
    logprobs: Array
    count: Array
    stopped: Array
    logits: Array
    cache: Cache
    processor: Any
    drawn: Array
    drafter: Any
    history: Array
    forwards: Array
    passes: Array


def speculate(
    model: Model,
    cache: Cache,
    logits: Array,
    new_tokens: int,
    drafter: Drafter,
    *,
    prompt: Array | None = None,
    state: Any = None,
    constants: Any = None,
    sampler: Sampler | None = None,
    key: Array | None = None,
    stop: tuple[int, ...] | None = None,
    processor: Processor | None = None,
    limit: Array | None = None,
    resume: Speculation | None = None,
    verifier: Callable = verify,
    donate: bool = False,
) -> Speculation:
    """Decodes up to `new_tokens` tokens per row, several per forward pass where guesses are right.

    Tokens are those of `generate` with the same arguments, greedy or sampled, up to the rounding of
    one pass over several rows (drafters that say from which law they draw, `Tree.q`, give other
    tokens of the same law when sampled).

    Args:
      cache, logits: from `prefill` (or a previous generation).
      new_tokens: static; the loop ends earlier when all rows have stopped.
      drafter: where the guesses come from.
      prompt: int32 [B, T] (-1: padding), the newest tokens that the cache has seen, for drafters
        and processors that read them.
      state: the drafter's, of a previous generation; None: a new one.
      constants: arrays that the drafter reads; never donated.
      sampler, key, stop, processor, limit: as for `generate`; `host_mask` is asked once per token
        drawn, and cannot be used with drafters that say from which law they draw.
      resume: continue where that generation ended (drafter, history, processor, stopped rows).
      verifier: called as `verify` is; another rule makes it another method.
      donate: overwrite the given cache, which must not be used again; False: copy it once.

    Raises:
      ValueError: no room in the cache, a sampler without key, or a tree with branches for a model
        with recurrent layers.
    """
    sampler = Sampler() if sampler is None else sampler
    if sampler.temperature > 0 and key is None:
        raise ValueError("speculate: sampling needs key=jax.random.key(seed)")
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: at least 1")
    if not isinstance(drafter, Drafter):
        raise ValueError(f"drafter={drafter!r}: expected a Drafter, such as prompt_lookup()")
    check_room(cache, new_tokens)
    stop = model.config.eos if stop is None else tuple(stop)
    processor = processors() if processor is None else processor
    batch, vocab = logits.shape
    if resume is not None:
        history, stopped, drawn = resume.history, resume.stopped, resume.drawn
        own, state = resume.processor, resume.drafter if state is None else state
    else:
        prompt = jnp.full((batch, 1), -1, jnp.int32) if prompt is None else jnp.asarray(prompt)
        history = _history(prompt, cache)
        stopped, drawn = jnp.zeros((batch,), bool), jnp.zeros((batch,), jnp.int32)
        own = processor.init(prompt, vocab)
        if state is None:
            state = drafter.init(model, prompt, cache.max_length, constants)
    moving, rest = apart(cache)
    run = _speculate_donating if donate else _speculate
    out, moving = run(
        model, moving, rest, constants, logits, history, own, state, stopped, drawn,
        jnp.full((batch,), new_tokens, jnp.int32) if limit is None else jnp.asarray(limit),
        jax.random.key(0) if key is None else key,
        new_tokens=new_tokens, drafter=drafter, sampler=sampler, stop=stop, processor=processor,
        verifier=verifier,
    )  # fmt: skip
    tokens, logprobs, count, stopped, logits, *others = out
    return Speculation(tokens, logprobs, count, stopped, logits, together(moving, rest), *others)


@jax.jit
def _history(prompt: Array, cache: Cache) -> Array:
    """The prompt's tokens at their positions, the last of them just before cache.length."""
    batch = prompt.shape[0]
    there = prompt >= 0
    count = jnp.sum(there, 1, keepdims=True)
    at = cache.length[:, None] - count + jnp.cumsum(there, 1) - 1
    at = jnp.where(there & (at >= 0), at, cache.max_length)
    empty = jnp.full((batch, cache.max_length), -1, jnp.int32)
    return empty.at[jnp.arange(batch)[:, None], at].set(prompt.astype(jnp.int32), mode="drop")


@pytree()
class _Carry:
    """The loop's state. `root`: drawn, and not a stop token, but not yet written down or run."""

    passes: Array
    moving: Any
    logits: Array
    root: Array
    root_logprob: Array
    history: Array
    processor: Any
    drafter: Any
    tokens: Array
    logprobs: Array
    count: Array
    active: Array
    stopped: Array
    forwards: Array


def _speculate_body(
    model: Model, moving: Any, rest: Cache, constants: Any, logits: Array, history: Array,
    own: Any, state: Any, stopped: Array, drawn: Array, limit: Array, key: Array, *,
    new_tokens: int, drafter: Drafter, sampler: Sampler, stop: tuple[int, ...],
    processor: Processor, verifier: Callable,
) -> Any:  # fmt: skip
    batch = logits.shape[0]
    row = jnp.arange(batch)[:, None]
    # Guesses must be drawn apart from the draws that judge them.
    guess_key = jax.random.fold_in(key, jnp.iinfo(jnp.int32).max)

    def written(tokens: Array, start: Array, new: Array, count: Array) -> Array:
        """`count` [B] of `new` [B, W] put at `start` [B] on."""
        at = start[:, None] + jnp.arange(new.shape[1])
        at = jnp.where(jnp.arange(new.shape[1]) < count[:, None], at, tokens.shape[1])
        return tokens.at[row, at].set(new, mode="drop")

    def body(carry: _Carry) -> _Carry:
        cache = together(carry.moving, rest)
        active, root = carry.active, carry.root
        history = written(carry.history, cache.length, root[:, None], active)
        own = processor.update(carry.processor, jnp.where(active, root, -1))

        context = Context(
            model, history, cache.length + 1, active,
            jax.random.fold_in(guess_key, jnp.max(drawn) + carry.passes), constants,
        )  # fmt: skip
        tree = drafter.draft(carry.drafter, context)
        ancestors = tree.ancestors()
        positions = tree.positions(jnp.where(active, cache.length, -1), ancestors)
        known = tree.tokens >= 0
        tokens, inputs = jnp.where(known, tree.tokens, 0), None
        if tree.embeddings is not None:
            inputs = embed(model, tokens)
            inputs = jnp.where(known[..., None], inputs, tree.embeddings.astype(inputs.dtype))
            tokens = None
        out, new = forward(
            model, tokens, positions, cache, embeddings=inputs,
            phase="verify", mask="causal" if tree.chain else ancestors, hidden=drafter.hidden,
        )  # fmt: skip

        left = limit - carry.count - 1  # beyond the root
        verdict = verifier(
            tree, out, sampler=sampler, key=key, index=drawn + carry.count + 1,
            allowed=jnp.where(active, jnp.minimum(horizon(cache) - 1, left), 0), stop=stop,
            processor=processor, state=own,
        )  # fmt: skip
        path = jnp.where(active[:, None], verdict.path, -1)
        accepted = jnp.where(active, verdict.accepted, 0)
        moving = apart(commit(cache, new, keep=path, phase="verify"))[0]

        # Written down: the root, the accepted guesses, and a stop token where one follows.
        ends = active & law.stops(verdict.next) & (accepted < left)
        fresh = jnp.take_along_axis(tree.tokens, jnp.maximum(path, 0), 1)
        fresh = jnp.concatenate([fresh, jnp.zeros((batch, 1), jnp.int32)], 1)
        fresh = fresh.at[row[:, 0], accepted + 1].set(verdict.next)
        number = jnp.where(active, accepted + 1 + ends, 0)
        scores = jnp.concatenate([carry.root_logprob[:, None], verdict.logprobs], 1)
        last = jnp.take_along_axis(path, accepted[:, None], 1)[..., None]
        after = jnp.take_along_axis(out, jnp.maximum(last, 0), 1)[:, 0]
        outcome = Outcome(tree, positions, out, new.hidden, path, verdict.next)
        count = carry.count + number
        return _Carry(
            carry.passes + 1,
            moving,
            jnp.where(active[:, None], after, carry.logits),
            jnp.where(active, verdict.next, root),
            jnp.take_along_axis(verdict.logprobs, accepted[:, None], 1)[:, 0],
            written(history, cache.length, fresh, accepted + active),
            verdict.processor,
            drafter.update(carry.drafter, context, outcome),
            written(carry.tokens, carry.count, fresh, number),
            written(carry.logprobs, carry.count, scores, number),
            count,
            active & ~ends & (count < limit),
            carry.stopped | ends,
            carry.forwards + active,
        )

    limit = jnp.minimum(limit, new_tokens)
    logits = logits.astype(jnp.float32)
    law = _Law(sampler, processor, stop, key, drawn)
    root, logprob = sampler.draw(processor(own, logits), law.keys(jnp.zeros((batch,), jnp.int32)))
    begin = ~stopped & (limit > 0)
    ends = begin & law.stops(root)  # the very first token may be a stop token
    none = jnp.full((batch, new_tokens), -1, jnp.int32)
    zeros = jnp.zeros((batch,), jnp.int32)
    carry = _Carry(
        jnp.zeros((), jnp.int32), moving, logits, root, logprob, history, own, state,
        written(none, zeros, root[:, None], ends),
        written(jnp.zeros(none.shape), zeros, logprob[:, None], ends),
        zeros + ends, begin & ~ends, stopped | ends, zeros,
    )  # fmt: skip
    carry = jax.lax.while_loop(lambda c: jnp.any(c.active), body, carry)
    out = (
        carry.tokens, carry.logprobs, carry.count, carry.stopped, carry.logits, carry.processor,
        drawn + carry.count, carry.drafter, carry.history, carry.forwards, carry.passes,
    )  # fmt: skip
    return out, carry.moving


_static = ("new_tokens", "drafter", "sampler", "stop", "processor", "verifier")
_speculate = jax.jit(_speculate_body, static_argnames=_static)
_speculate_donating = jax.jit(_speculate_body, static_argnames=_static, donate_argnames=("moving",))
