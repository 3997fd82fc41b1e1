"""The cache of a model: a transform, its state, and the functions that read and write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.chain import Chain
from kvjax.cache.kernels import Kernels
from kvjax.cache.recurrent import Recurrence
from kvjax.cache.rule import Rule
from kvjax.cache.stage import FOREVER, Commit, InputMark, Replay
from kvjax.cache.types import (
    KV,
    PHASES,
    New,
    Observation,
    Partial,
    Phase,
    Query,
    Rope,
    pytree,
    rotate,
)


@pytree("transforms", "groups", "softcap", "max_length", "kernels", "layout")
class Cache:
    """Everything that is held of a batch of sequences. Immutable.

    Attributes:
      state: one state per group; donate it.
      length: int32 [B], one more than the highest position committed.
      constants: arrays never donated: "rope", "span" (sliding windows) and those of the transform.
      transforms: one per group, static: a chain for attention layers, a recurrence for others.
      groups: which layers each group holds, counted among the layers of its kind; static.
      kernels: what attends to held tokens where it can, static: "xla" (plain JAX), the Pallas
        kernels for "tpu" or "gpu", or "interpret" (those for TPU, on any backend, for tests).
      layout: how the arrays lie over the devices of a mesh (`kvjax.parallel.Layout`), static;
        None: wherever they are.
    """

    state: tuple[Any, ...]
    length: Array
    constants: dict[str, Any]
    transforms: tuple[Chain | Recurrence, ...]
    groups: tuple[tuple[int, ...], ...]
    softcap: float | None
    max_length: int
    kernels: Kernels = "xla"
    layout: Any = None

    def replace(self, **changes: Any) -> Cache:
        return dataclasses.replace(self, **changes)

    @property
    def needs_attention(self) -> bool:
        """Whether commits must be given attention statistics."""
        return any(t.needs_attention(s) for t, s in zip(self.transforms, self.state))

    @property
    def input_marks(self) -> tuple[InputMark, ...]:
        """Columns that `forward` must make from what each layer reads."""
        found = (mark for n in self.chains for mark in self.transforms[n].input_marks)
        return tuple(dict.fromkeys(found))

    @property
    def replays(self) -> tuple[Replay, ...]:
        """Columns for which a prompt is read again before `finish`; see `replayed_attention`."""
        return tuple(dict.fromkeys(c for n in self.chains for c in self.transforms[n].replays))

    @property
    def looks_ahead(self) -> bool:
        """Whether `forward` makes each layer's queries one layer early too (`Query.ahead`): where a
        reader asks, and one chain holds all layers."""
        chains = [self.transforms[n] for n in self.chains]
        return len(chains) == 1 and any(stage.looks_ahead for stage in chains[0].stages)

    @property
    def rule(self) -> Rule | None:
        """The rule among the rows of a prompt; None: all see all rows up to them."""
        return next((r for n in self.chains if (r := self.transforms[n].rule) is not None), None)

    @property
    def streaming(self) -> bool:
        return all(t.streaming for t in self.transforms)

    @property
    def chains(self) -> tuple[int, ...]:
        """Numbers of the groups that hold keys and values."""
        return tuple(n for n, t in enumerate(self.transforms) if isinstance(t, Chain))

    @property
    def given(self) -> Array | None:
        """Tokens of shared prefixes that each row sees, int32 [B]; None: there are none."""
        batch = self.length.shape[0]
        found = (self.transforms[n].given(self.constants, batch) for n in self.chains)
        return next((rows for rows, _ in filter(None, found)), None)

    @property
    def recurrent(self) -> int | None:
        """The number of the group that holds recurrent state, if there is one."""
        found = [n for n, t in enumerate(self.transforms) if isinstance(t, Recurrence)]
        return found[0] if found else None

    @property
    def foldable(self) -> bool:
        """Whether commits may happen inside the layer scan (`forward(..., fold=True)`)."""
        chains = [self.transforms[n] for n in self.chains]
        marked = any(t.input_marks or t.token_marks for t in chains)
        alone = len(chains) <= 1 and self.rule is None
        return self.streaming and alone and not (marked or self.needs_attention)


def apart(cache: Cache) -> tuple[Any, Cache]:
    """(what commits change: donate it; the rest: never donated). `together` is the inverse.

    A jitted step takes both and donates the first, so that the cache is written in place:

        @partial(jax.jit, donate_argnames="moving")
        def step(model, moving, rest, tokens, positions):
            cache = together(moving, rest)
            logits, new = forward(model, tokens, positions, cache)
            return logits, apart(commit(cache, new))[0]
    """
    return (cache.state, cache.length), cache.replace(state=None, length=None)


def together(moving: Any, rest: Cache) -> Cache:
    """The cache of which `apart` gave the parts."""
    return rest.replace(state=moving[0], length=moving[1])


def start(cache: Cache, pos: Array) -> tuple[Any, ...]:
    """What `attend` of the first layer is given as `carry`, for rows at pos [B, T]."""
    return tuple(cache.transforms[n].start(cache.state[n], pos) for n in cache.chains)


def attend(cache: Cache, layer: Array, query: Query, carry: Any = None) -> tuple[Partial, Any]:
    """Attention of the query rows of one layer over what the cache holds.

    Args:
      layer: int32 scalar, traced, counted among the attention layers.
      carry: threaded from layer to layer, beginning with `start(cache, positions)` (None: that).
    """
    carry = start(cache, query.pos) if carry is None else carry
    groups = [cache.groups[n] for n in cache.chains]  # chains come first: their numbers agree
    if len(groups) == 1:
        part, own = cache.transforms[0].attend(cache.state[0], layer, query, carry[0])
        return part, (own,)
    group = np.zeros(sum(map(len, groups)), np.int32)
    index = np.zeros_like(group)
    for number, layers in enumerate(groups):
        group[list(layers)], index[list(layers)] = number, np.arange(len(layers))

    def branch(number: int) -> Any:
        def run(carry: Any) -> Any:
            part, own = cache.transforms[number].attend(
                cache.state[number], jnp.asarray(index)[layer], query, carry[number]
            )
            return part, (*carry[:number], own, *carry[number + 1 :])

        return run

    return jax.lax.switch(jnp.asarray(group)[layer], [branch(n) for n in range(len(groups))], carry)


def commit(cache: Cache, new: New, keep: Array | None = None, phase: Phase = "decode") -> Cache:
    """Folds new rows into the cache.

    Args:
      new: from `forward`.
      keep: int32 [B, K], which rows to take, per batch row, -1 for none, in any order; None: all.
      phase: "prefill" (a prompt, or a chunk of one, before `finish`), "append" (a later turn),
        "decode" or "verify". Static.

    Returns:
      The cache that also holds these rows. Rows at position -1 are never written.
    """
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r}: expected one of {', '.join(PHASES)}")
    kv = new.kv
    if keep is None:
        index = jnp.arange(kv.size, dtype=jnp.int32)[None]
        index = jnp.broadcast_to(index, (kv.pos.shape[1], kv.size))
    else:
        index = keep.astype(jnp.int32)
    # Positions are written after the forward pass, which still reads those of the cache.
    pos = buffer.after(kv.pos, kv.k)
    kv = dataclasses.replace(kv, pos=pos)
    pos = jnp.take_along_axis(jnp.max(pos, (0, 2)), jnp.maximum(index, 0), 1)
    index = jnp.where(pos >= 0, index, -1)
    if index.shape[1] > 1:
        far = jnp.iinfo(jnp.int32).max
        order = jnp.argsort(jnp.where(index >= 0, pos, far), axis=1, stable=True)
        index = jnp.take_along_axis(index, order, 1)
    kept = index
    index = index[None, :, None]
    rows = buffer.take(kv, index)
    pos = jnp.max(rows.pos, (0, 2))
    length = jnp.maximum(cache.length, jnp.max(pos, 1) + 1)
    states = []
    for transform, state, layers in zip(cache.transforms, cache.state, cache.groups):
        if isinstance(transform, Recurrence):
            states.append(transform.commit(state, new.recurrent, kept))
            continue
        own, rope = _layers(rows, layers, new), _rope(cache, layers)
        seen = None
        if transform.needs_attention(state):
            if new.seen is None:
                raise ValueError(
                    "this cache needs attention statistics at every commit: call "
                    "forward(..., cache) with the same cache, so that `new.seen` is there"
                )
            seen = _observe(new.seen, index, pos, layers)
        if not transform.unrotated:
            own = dataclasses.replace(own, k=rotate(own.k, own.pos, rope))
        context = Commit(phase, rope, seen, {}, cache.constants, cache.softcap, cache.layout)
        states.append(transform.commit(state, own, context))
    return _placed(cache.replace(state=tuple(states), length=length))


def _placed(cache: Cache) -> Cache:
    """Keeps a sharded cache's arrays on the devices that its layout says."""
    return cache if cache.layout is None else cache.layout.constrain(cache)


def _layers(kv: KV, layers: tuple[int, ...], new: New) -> KV:
    total = kv.k.shape[0]
    if layers == tuple(range(total)):
        return kv
    at = np.asarray(layers)
    pos = kv.pos if kv.pos.shape[0] == 1 else kv.pos[at]
    return KV(kv.k[at], kv.v[at], pos, {n: x[at] for n, x in kv.extra.items()})


def _rope(cache: Cache, layers: tuple[int, ...]) -> Rope:
    return cache.constants["rope"][np.asarray(layers)]


def _observe(seen: Observation, index: Array, pos: Array, layers: tuple[int, ...]) -> Observation:
    at = np.asarray(layers)
    whole = len(at) == seen.q.shape[0]

    def rows(x: Array) -> Array:
        x = x if whole else x[at]
        where = jnp.maximum(index, 0).reshape(index.shape + (1,) * (x.ndim - 4))
        return jnp.take_along_axis(x, where, 3)

    return Observation(rows(seen.q), rows(seen.max), rows(seen.sum), pos, seen.span[at])


def finish(cache: Cache, stats: Mapping[str, Any] | None = None) -> Cache:
    """Once, after the last chunk of a prompt: lets stages act that need all of it.

    Args:
      stats: further statistics by name, for scores that read such.

    Returns:
      The cache, ready to decode. Shapes may change.
    """
    states = list(cache.state)
    for n in cache.chains:
        rope = _rope(cache, cache.groups[n])
        context = Commit("prefill", rope, None, {}, cache.constants, cache.softcap, cache.layout)
        states[n] = cache.transforms[n].finish(states[n], context, stats)
    return _placed(cache.replace(state=tuple(states)))


def horizon(cache: Cache) -> Array:
    """int32 [B]: the most tokens that may be accepted at once; see `Chain.horizon`.

    Recurrent state is replayed token by token: any number.
    """
    reach = [cache.transforms[n].horizon(cache.state[n]) for n in cache.chains]
    return jnp.min(jnp.stack([jnp.full(cache.length.shape, FOREVER), *reach]), 0)


def tokens_held(cache: Cache) -> int:
    """Tokens held now, summed over layers, rows and key-value heads (concrete)."""
    return int(sum(cache.transforms[n].tokens(cache.state[n]) for n in cache.chains))


def nbytes(tree: Any) -> int:
    """Bytes really allocated by a cache's state (or any pytree), each array counted once."""
    if isinstance(tree, Cache):
        shared = {k: v for k, v in tree.constants.items() if k not in ("rope", "span")}
        tree = (tree.state, shared)
    arrays = {id(x): x for x in jax.tree.leaves(tree)}
    return sum(x.size * x.dtype.itemsize for x in arrays.values())


def used_bytes(cache: Cache) -> int:
    """Of `nbytes`, those in use: a stage's bytes in proportion to the slots that hold tokens.

    What a stage has beside its slots (exact rings, indices, maps) counts with them; shared arrays
    and recurrent state count whole. Concrete.
    """
    used = float(nbytes(cache) - nbytes(cache.state))
    for transform, state in zip(cache.transforms, cache.state):
        stages = transform.stages if isinstance(transform, Chain) else ()
        if not isinstance(state, tuple) or not stages:
            used += nbytes(state)
            continue
        for stage, own in zip(stages, state):
            room = 0 if own is None else stage.slots(own)
            part = min(int(stage.tokens(own)) / room, 1.0) if room else 1.0
            used += part * nbytes(own)
    return round(used)
