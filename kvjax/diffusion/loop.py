"""Masked-diffusion decoding as one jitted loop over a schedule, an unmasker and a cache policy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import Cache, apart, commit, init_cache, together
from kvjax.cache.types import pytree
from kvjax.diffusion.cache import DiffusionCache, no_cache
from kvjax.diffusion.choose import Choice
from kvjax.diffusion.schedule import BlockSchedule, blocks
from kvjax.diffusion.unmask import Unmasker, quota
from kvjax.diffusion.view import Prediction, View
from kvjax.models.decoder import forward
from kvjax.models.llama import Model


@pytree()
class Denoised:
    """What `denoise` and `generate` return.

    Attributes:
      tokens: int32 [B, N], the canvas; -1 outside the row.
      order: int32 [B, N], the row's step in which each token was committed; -1: it was given.
      steps: int32 [B], network evaluations until the row was complete.
      evaluations: int32 scalar, network evaluations of the batch (its slowest row, with guidance
        twice as many).
      active: int32 [B], positions that had to be computed, summed over steps.
      computed: int32 scalar, positions that were computed, rows and padding to a compiled size
        included.
      cache: as it was at the end, or None.
    """

    tokens: Array
    order: Array
    steps: Array
    evaluations: Array
    active: Array
    computed: Array
    cache: Cache | None


def llada(new_tokens: int, steps: int, block: int) -> tuple[BlockSchedule, Unmasker]:
    """LLaDA's step arithmetic: `steps` in all, shared equally by blocks of `block` tokens.

    Raises:
      ValueError: new_tokens is no multiple of block, or steps none of the number of blocks.

    >>> llada(new_tokens=128, steps=64, block=32)
    (Blocks(size=32), Quota(steps=16))
    """
    if block < 1 or new_tokens < 1 or new_tokens % block:
        raise ValueError(f"new_tokens={new_tokens}: expected a multiple of block={block}")
    number = new_tokens // block
    if steps < 1 or steps % number:
        raise ValueError(f"steps={steps}: expected a multiple of the number of blocks, {number}")
    return blocks(block), quota(steps // number)


def generate(
    model: Model | Callable[[Array], Array],
    prompt: Array,
    new_tokens: int,
    *,
    lengths: Array | None = None,
    mask_token: int | None = None,
    **how: Any,
) -> Denoised:
    """Appends `new_tokens` masks to prompts and decodes them; arguments as `denoise`.

    Args:
      prompt: int32 [B, P]. lengths: int32 [B], of right-padded prompts; None: all P.

    Returns:
      `Denoised` with a canvas of N = P + new_tokens; row b ends at lengths[b] + new_tokens.
    """
    prompt = jnp.asarray(prompt, jnp.int32)
    if prompt.ndim != 2:
        raise ValueError(f"prompt has shape {prompt.shape}: expected [batch, time]")
    if new_tokens < 1:
        raise ValueError(f"new_tokens={new_tokens}: at least 1")
    mask_token = _mask_token(model, mask_token)
    batch, time = prompt.shape
    lengths = jnp.full((batch,), time) if lengths is None else jnp.asarray(lengths)
    lengths = lengths.astype(jnp.int32)
    canvas = jnp.pad(prompt, ((0, 0), (0, new_tokens)), constant_values=mask_token)
    canvas = jnp.where(jnp.arange(time + new_tokens) < lengths[:, None], canvas, mask_token)
    return denoise(
        model, canvas, lengths, lengths=lengths + new_tokens, mask_token=mask_token, **how
    )


def denoise(
    model: Model | Callable[[Array], Array],
    canvas: Array,
    origin: Array | int = 0,
    *,
    lengths: Array | None = None,
    mask_token: int | None = None,
    schedule: BlockSchedule | None = None,
    unmasker: Unmasker | None = None,
    cache: DiffusionCache | None = None,
    choice: Choice | None = None,
    guidance: float = 0.0,
    key: Array | None = None,
    sizes: tuple[int, ...] | None = None,
    dtype: Any = None,
    layout: Any = None,
) -> Denoised:
    """Replaces the masks of a canvas by tokens, block by block, in one compiled loop.

    Each step: the cache policy says which positions are active; these are run through the network;
    the masks of the current block get a token and a confidence; the unmasker commits some of them;
    the policy says which keys and values are kept. Rows go through their blocks independently.

    Args:
      model: a bidirectional model; or a function from tokens [B, N] to logits [B, N, V] (an ideal
        predictor), which has no cache.
      canvas: int32 [B, N], given tokens and masks in any pattern.
      origin: int32 [B] or scalar, where the first block begins; masks before it stay.
      lengths: int32 [B], positions of each row; None: all N.
      mask_token: None: the model's.
      schedule: None: one block of the whole canvas.
      unmasker: None: one token per step, `quota(schedule.size)`.
      cache: None: no cache.
      choice: None: the most probable token, confidence its probability.
      guidance: w of classifier-free guidance: logits = u + (w + 1)(c - u), u from a second pass in
        which everything before `origin` is masked; 0: none. With a cache both passes have their
        own rows in it.
      key: PRNG key, needed where choice draws.
      sizes: numbers of positions that steps are compiled for, descending from N; None: the
        policy's. None of them influences the result.
      dtype: of stored keys and values; None: that of the embedding.
      layout: `kvjax.parallel.Layout`, how these lie over the devices of a mesh.

    Raises:
      ValueError: no mask token, a causal model, a draw without key, or sizes that do not fit.

    Source: Large Language Diffusion Models, arXiv 2502.09992. Where LLaDA goes through its steps in
    any case, steps that can commit nothing are left out here. A token that is itself the mask token
    stays a mask and is not returned to once its block is over; `Choice.suppress` prevents it.

    >>> always = lambda tokens: jnp.zeros((*tokens.shape, 5)).at[..., 3].set(1.0)
    >>> denoise(always, jnp.array([[1, 4, 4]]), mask_token=4).tokens.tolist()
    [[1, 3, 3]]
    """
    canvas = jnp.asarray(canvas, jnp.int32)
    if canvas.ndim != 2:
        raise ValueError(f"canvas has shape {canvas.shape}: expected [batch, positions]")
    batch, width = canvas.shape
    mask_token = _mask_token(model, mask_token)
    schedule = blocks(width) if schedule is None else schedule
    unmasker = quota(schedule.size) if unmasker is None else unmasker
    cache = no_cache() if cache is None else cache
    choice = Choice() if choice is None else choice
    if choice.random and key is None:
        raise ValueError("denoise: this choice draws at random and needs key=jax.random.key(seed)")
    network = isinstance(model, Model)
    if network and not model.config.bidirectional:
        raise ValueError("denoise: the model is causal; expected config.bidirectional")
    if not network and cache.uses_cache:
        raise ValueError(f"cache={cache}: a function of tokens has no keys and values to keep")
    if guidance < 0:
        raise ValueError(f"guidance={guidance}: at least 0 (0: none)")
    if sizes is None:
        sizes = cache.sizes(width, schedule.size)
    if list(sizes) != sorted(set(sizes), reverse=True) or sizes[0] != width or sizes[-1] < 1:
        raise ValueError(f"sizes={sizes}: expected to descend from {width} to at least 1")
    held = None
    if cache.uses_cache:
        rows = batch * (2 if guidance else 1)
        dtype = model.embed.dtype if dtype is None else dtype
        held = init_cache(
            model.config, cache.storage(width), rows, width, dtype=dtype, layout=layout
        )
    moving, rest = (None, None) if held is None else apart(held)
    limit = jnp.full((batch,), width) if lengths is None else jnp.asarray(lengths)
    limit = jnp.minimum(limit, width)
    origin = jnp.broadcast_to(jnp.asarray(origin, jnp.int32), (batch,))
    out, moving = _denoise(
        model if network else None, moving, rest, canvas, origin, limit.astype(jnp.int32),
        jax.random.key(0) if key is None else key, jnp.float32(guidance),
        predict=None if network else model, mask_token=mask_token, schedule=schedule,
        unmasker=unmasker, policy=cache, choice=choice, guided=guidance > 0, sizes=tuple(sizes),
    )  # fmt: skip
    return Denoised(*out, None if moving is None else together(moving, rest))


def _mask_token(model: Any, given: int | None) -> int:
    known = model.config.mask_token if isinstance(model, Model) else None
    if given is None and known is None:
        raise ValueError("mask_token=None: the model's configuration names none, so give one")
    return known if given is None else int(given)


@pytree()
class _Loop:
    """What changes from step to step; fields as in View and Denoised."""

    view: View
    order: Array
    steps: Array
    evaluations: Array
    active: Array
    computed: Array
    memory: Any  # the unmasker's
    moving: Any

    @property
    def running(self) -> Array:
        return self.view.begin < self.view.limit


def _first(mask: Array, otherwise: Array) -> Array:
    """The lowest position where `mask` [B, N], or `otherwise` [B]."""
    return jnp.where(jnp.any(mask, 1), jnp.argmax(mask, 1).astype(jnp.int32), otherwise)


def _open(view: View, schedule: BlockSchedule, after: Array) -> View:
    """The first step of the next block that has a mask at or behind `after`; none: the row ends."""
    ahead = view.masked & view.between(after, view.limit)
    first = _first(ahead, view.limit)
    begin = jnp.where(first < view.limit, schedule.begin(view, after, first), view.limit)
    end = jnp.minimum(begin + schedule.size, view.limit)
    return view.replace(begin=begin, end=end, index=jnp.zeros_like(begin))


def _compact(mask: Array, size: int) -> Array:
    """The positions where `mask` [B, N], ascending, then -1: int32 [B, size]."""
    order = jnp.argsort(~mask, -1, stable=True).astype(jnp.int32)[:, :size]
    return jnp.where(jnp.arange(size) < jnp.sum(mask, -1, keepdims=True), order, -1)


def _at(x: Array, position: Array) -> Array:
    """x [B, N] at position [B, K] (-1: anything)."""
    return jnp.take_along_axis(x, jnp.maximum(position, 0), 1)


def _spread(x: Array, position: Array, width: int, empty: Any) -> Array:
    """The inverse of `_at`: x [B, K] at position [B, K] (-1: dropped), `empty` elsewhere."""
    rows = jnp.arange(x.shape[0])[:, None]
    where = jnp.where(position >= 0, position, width)
    return jnp.full((x.shape[0], width), empty, x.dtype).at[rows, where].set(x, mode="drop")


_static = (
    "predict", "mask_token", "schedule", "unmasker", "policy", "choice", "guided", "sizes",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=_static, donate_argnames=("moving",))
def _denoise(
    model: Model | None, moving: Any, rest: Cache | None, canvas: Array, origin: Array,
    limit: Array, key: Array, guidance: Array, *, predict: Any, mask_token: int,
    schedule: BlockSchedule, unmasker: Unmasker, policy: DiffusionCache, choice: Choice,
    guided: bool, sizes: tuple[int, ...],
) -> Any:  # fmt: skip
    batch, width = canvas.shape
    most = min(schedule.size, width)
    passes = 2 if guided else 1
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    def active_of(s: _Loop) -> Array:
        return policy.active(s.view) & s.view.inside & s.running[:, None]

    def needed(s: _Loop) -> Array:
        """Which compiled size the next step runs with."""
        count = jnp.max(jnp.sum(active_of(s), 1))
        return jnp.sum(jnp.asarray(sizes) >= count) - 1

    def network(view: View, moving: Any, position: Array, rows: Array, at: Array) -> Any:
        """Logits float32 [B, K, V] of the candidates, and what is new."""
        if predict is not None:
            logits = predict(view.tokens).astype(jnp.float32)
            return jnp.take_along_axis(logits, jnp.maximum(at, 0)[..., None], 1), None
        tokens, place = _at(view.tokens, position), position
        if guided:
            hidden = jnp.where(position < view.origin[:, None], mask_token, tokens)
            tokens = jnp.concatenate([tokens, hidden])
            place, rows = jnp.concatenate([place, place]), jnp.concatenate([rows, rows])
        held = None if moving is None else together(moving, rest)
        logits, new = forward(model, tokens, place, held, mask="full", logits=rows)
        if guided:
            given, blind = logits[:batch], logits[batch:]
            logits = blind + (guidance + 1.0) * (given - blind)
        return logits, new

    def body(size: int, s: _Loop) -> _Loop:
        view, running = s.view, s.running
        active = active_of(s)
        position = _compact(active, size)
        # The masks of the block (or of all that the schedule may choose to be the block).
        at = _compact(view.candidates & running[:, None], most)
        rows = jnp.maximum(_at(jnp.cumsum(active, 1, dtype=jnp.int32) - 1, at), 0)
        logits, new = network(view, s.moving, position, rows, at)
        with_step = jax.vmap(jax.random.fold_in)(row_keys, s.steps)
        keys = jax.vmap(lambda k, p: jax.vmap(lambda n: jax.random.fold_in(k, n))(p))(with_step, at)
        token, confidence = choice(logits, at, keys)
        token = _spread(token, at, width, 0)
        confidence = _spread(confidence, at, width, -jnp.inf)

        opening = view.index == 0
        end = schedule.end(view, Prediction(token, confidence))
        view = view.replace(end=jnp.where(opening, end, view.end))
        count = jnp.sum(view.candidates, 1, dtype=jnp.int32)
        view = view.replace(total=jnp.where(opening, count, view.total))
        candidate = view.candidates & running[:, None]
        prediction = Prediction(token, jnp.where(candidate, confidence, -jnp.inf))
        chosen, memory = unmasker.select(view, prediction, s.memory)
        chosen &= candidate

        moving = s.moving
        if moving is not None:
            wanted = _at(policy.keep(view, chosen) & active, position) & (position >= 0)
            keep = jnp.where(wanted, jnp.arange(size, dtype=jnp.int32), -1)
            keep = jnp.tile(keep, (passes, 1))
            moving = apart(commit(together(moving, rest), new, keep))[0]

        tokens = jnp.where(chosen, token, view.tokens)
        masked = view.masked & ~(chosen & (token != mask_token))
        after = view.replace(tokens=tokens, masked=masked, index=view.index + 1)
        after = after.replace(fresh=jnp.where(running[:, None], chosen, view.fresh))
        steps = jnp.asarray([unmasker.limit(n) for n in range(most + 1)])
        over = ~jnp.any(after.candidates, 1) | (after.index >= steps[view.end - view.begin])
        following = _open(after, schedule, view.end)
        pick = lambda new, old: jnp.where(over, new, old)  # noqa: E731
        after = after.replace(
            begin=pick(following.begin, view.begin),
            end=pick(following.end, view.end),
            index=pick(0, after.index),
        )
        return _Loop(
            after,
            jnp.where(chosen, s.steps[:, None], s.order),
            s.steps + running,
            s.evaluations + passes,
            s.active + passes * jnp.sum(active, 1, dtype=jnp.int32),
            s.computed + passes * batch * size,
            memory,
            moving,
        )

    def run(s: _Loop) -> _Loop:
        # One inner loop per size, each running for as long as its size is the one needed. A switch
        # inside one loop would copy the cache: what a branch both reads and writes is copied.
        for number, size in enumerate(sizes):
            mine = lambda s, number=number: jnp.any(s.running) & (needed(s) == number)  # noqa: E731
            s = jax.lax.while_loop(mine, functools.partial(body, size), s)
        return s

    zero, none = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, width), bool)
    view = View(canvas, none, none, origin, limit, origin, origin, zero, zero)
    view = view.replace(masked=(canvas == mask_token) & view.between(origin, limit))
    view = _open(view, schedule, origin)
    nothing = jnp.zeros((), jnp.int32)
    order = jnp.full((batch, width), -1, jnp.int32)
    s = _Loop(view, order, zero, nothing, zero, nothing, unmasker.init(view), moving)
    s = run(s) if len(sizes) == 1 else jax.lax.while_loop(lambda s: jnp.any(s.running), run, s)
    tokens = jnp.where(s.view.inside, s.view.tokens, -1)
    return (tokens, s.order, s.steps, s.evaluations, s.active, s.computed), s.moving
