"""The cache of a model: a transform, its state, and the four functions that use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.chain import Chain, chain
from kvjax.cache.stage import Commit, Stage
from kvjax.cache.types import (
    KV,
    PHASES,
    New,
    Observation,
    Partial,
    Phase,
    Query,
    Rope,
    Spec,
    pytree,
    rotate,
)


@pytree("transforms", "groups", "softcap", "max_length", "layout")
class Cache:
    """Everything that is held of a batch of sequences. Immutable.

    Attributes:
      state: one state per scan group; donate it.
      length: int32 [B], one more than the highest position committed.
      constants: arrays never donated: "rope", "span" (sliding windows) and those of the transform.
      transforms: one transform per group, static.
      groups: which layers each group holds, static.
      layout: how the arrays lie over the devices of a mesh (`kvjax.parallel.Layout`), static;
        None: wherever they are.
    """

    state: tuple[Any, ...]
    length: Array
    constants: dict[str, Any]
    transforms: tuple[Chain, ...]
    groups: tuple[tuple[int, ...], ...]
    softcap: float | None
    max_length: int
    layout: Any = None

    def replace(self, **changes: Any) -> Cache:
        return dataclasses.replace(self, **changes)

    @property
    def needs_attention(self) -> bool:
        """Whether commits must be given attention statistics."""
        return any(t.needs_attention(s) for t, s in zip(self.transforms, self.state))

    @property
    def streaming(self) -> bool:
        return all(t.streaming for t in self.transforms)


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


def init_cache(
    config: Any,
    transform: Chain | Stage,
    batch: int,
    max_length: int,
    prompt: int = 0,
    dtype: Any = jnp.float32,
    exact_layers: Sequence[int] = (),
    constants: Mapping[str, Any] | None = None,
    layout: Any = None,
) -> Cache:
    """An empty cache for a model.

    Args:
      config: the model's configuration.
      transform: a chain (or a single stage).
      batch: rows.
      max_length: the most tokens that any row will ever have, prompt included.
      prompt: the most of these that come as the prompt, before `finish`; 0: no prompt. After it,
        every row has room for max_length - prompt tokens: a row with a shorter prompt may have
        more where nothing was pruned, but should not count on it.
      dtype: of exact keys and values.
      exact_layers: layers that hold everything exactly whatever the transform (negative: from the
        end).
      constants: arrays that the transform reads by name (calibration, shared prefixes), their
        first axis that of layers, or of size 1.
      layout: `kvjax.parallel.Layout`, how the cache lies over the devices of a mesh.

    Raises:
      ValueError: sizes that do not fit each other, the model, the transform or the mesh.
    """
    if isinstance(transform, Stage):
        transform = chain(transform)
    if not isinstance(transform, Chain):
        raise ValueError(f"transform={transform!r}: expected a chain of stages")
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 row")
    if not 0 <= prompt <= max_length or max_length < 1:
        raise ValueError(
            f"prompt={prompt} and max_length={max_length}: need 0 <= prompt <= max_length"
        )
    exact = set()
    for layer in exact_layers:
        if not -config.layers <= layer < config.layers:
            raise ValueError(
                f"exact_layers={tuple(exact_layers)}: there are {config.layers} layers"
            )
        exact.add(layer % config.layers)
    if exact and any(stage.every_layer for stage in transform.stages):
        raise ValueError(
            f"exact_layers={tuple(exact_layers)}: these layers would not see the tokens of "
            f"{next(s for s in transform.stages if s.every_layer)}"
        )
    rest = tuple(layer for layer in range(config.layers) if layer not in exact)
    plan = [(rest, transform)]
    if exact:
        from kvjax.cache.store import store

        plan.append((tuple(sorted(exact)), chain(store())))
    plan = [(layers, t) for layers, t in plan if layers]

    def empty() -> Cache:
        states = []
        for layers, t in plan:
            spec = Spec(
                len(layers),
                batch,
                config.heads,
                config.kv_heads,
                config.head_dim,
                max_length,
                prompt,
                prompt,
                dtype,
                shards=1 if layout is None else layout.shards,
            )
            states.append(t.init(spec))
        return Cache(
            tuple(states),
            jnp.zeros((batch,), jnp.int32),
            {"rope": rope_of(config, max_length), "span": span_of(config)},
            tuple(t for _, t in plan),
            tuple(layers for layers, _ in plan),
            config.attention_softcap,
            max_length,
            layout,
        )

    constants = dict(constants or {})
    if layout is None:
        cache = empty()
    else:
        cache, constants = layout.create(empty), layout.everywhere(constants)
    return cache.replace(constants={**cache.constants, **constants})


def rope_of(config: Any, length: int) -> Rope:
    """Rotary frequencies of all layers, for sequences of up to `length` tokens."""
    table = []
    for layer in range(config.layers):
        rule = config.rope
        if config.local_rope is not None and config.window(layer) is not None:
            rule = config.local_rope
        table.append(rule.frequencies(config.rotated, config.max_length, length))
    freq = np.stack([f for f, _ in table]).astype(np.float32)
    return Rope(jnp.asarray(freq), jnp.asarray([s for _, s in table], jnp.float32))


def span_of(config: Any) -> Array:
    """How many positions back each layer sees, int32 [L]; a huge number where all."""
    huge = jnp.iinfo(jnp.int32).max // 2
    return jnp.asarray([config.window(i) or huge for i in range(config.layers)], jnp.int32)


def start(cache: Cache, pos: Array) -> tuple[Any, ...]:
    """What `attend` of the first layer is given as `carry`, for rows at pos [B, T]."""
    return tuple(t.start(state, pos) for t, state in zip(cache.transforms, cache.state))


def attend(cache: Cache, layer: Array, query: Query, carry: Any = None) -> tuple[Partial, Any]:
    """Attention of the query rows of one layer over what the cache holds.

    Args:
      layer: int32 scalar, traced.
      carry: threaded from layer to layer, beginning with `start(cache, positions)` (None: that).
    """
    carry = start(cache, query.pos) if carry is None else carry
    if len(cache.groups) == 1:
        part, own = cache.transforms[0].attend(cache.state[0], layer, query, carry[0])
        return part, (own,)
    group = np.zeros(sum(map(len, cache.groups)), np.int32)
    index = np.zeros_like(group)
    for number, layers in enumerate(cache.groups):
        group[list(layers)], index[list(layers)] = number, np.arange(len(layers))

    def branch(number: int) -> Any:
        def run(carry: Any) -> Any:
            part, own = cache.transforms[number].attend(
                cache.state[number], jnp.asarray(index)[layer], query, carry[number]
            )
            return part, (*carry[:number], own, *carry[number + 1 :])

        return run

    return jax.lax.switch(
        jnp.asarray(group)[layer], [branch(n) for n in range(len(cache.groups))], carry
    )


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
    pos = jnp.take_along_axis(pos[0, :, 0], jnp.maximum(index, 0), 1)
    index = jnp.where(pos >= 0, index, -1)
    if index.shape[1] > 1:
        far = jnp.iinfo(jnp.int32).max
        order = jnp.argsort(jnp.where(index >= 0, pos, far), axis=1, stable=True)
        index = jnp.take_along_axis(index, order, 1)
    index = index[None, :, None]
    rows = buffer.take(kv, index)
    length = jnp.maximum(cache.length, jnp.max(rows.pos[0, :, 0], 1) + 1)
    states = []
    for transform, state, layers in zip(cache.transforms, cache.state, cache.groups):
        own, rope = _layers(rows, layers, new), _rope(cache, layers)
        seen = None
        if transform.needs_attention(state):
            if new.seen is None:
                raise ValueError(
                    "this cache needs attention statistics at every commit: call "
                    "forward(..., cache) with the same cache, so that `new.seen` is there"
                )
            seen = _observe(new.seen, index, rows.pos[0, :, 0], layers)
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

    def context(layers: tuple[int, ...]) -> Commit:
        rope = _rope(cache, layers)
        return Commit("prefill", rope, None, {}, cache.constants, cache.softcap, cache.layout)

    states = tuple(
        t.finish(s, context(g), stats)
        for t, s, g in zip(cache.transforms, cache.state, cache.groups)
    )
    return _placed(cache.replace(state=states))


def horizon(cache: Cache) -> Array:
    """int32 [B]: the most tokens that may be accepted at once; see `Chain.horizon`."""
    reach = [t.horizon(s) for t, s in zip(cache.transforms, cache.state)]
    return jnp.min(jnp.stack(reach), 0)


def tokens_held(cache: Cache) -> int:
    """Tokens held now, summed over layers, rows and key-value heads (concrete)."""
    return int(sum(t.tokens(state) for t, state in zip(cache.transforms, cache.state)))


def nbytes(tree: Any) -> int:
    """Bytes really allocated by a cache's state (or any pytree), each array counted once."""
    if isinstance(tree, Cache):
        shared = {k: v for k, v in tree.constants.items() if k not in ("rope", "span")}
        tree = (tree.state, shared)
    arrays = {id(x): x for x in jax.tree.leaves(tree)}
    return sum(x.size * x.dtype.itemsize for x in arrays.values())
