"""`init_cache`: an empty cache for a model, and what is refused before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.cache import Cache
from kvjax.cache.chain import Chain, chain
from kvjax.cache.kernels import Kernels, check_kernels
from kvjax.cache.recurrent import Recurrence
from kvjax.cache.rotary import rope_of, span_of
from kvjax.cache.stage import Stage
from kvjax.cache.stages.store import store
from kvjax.cache.types import KV, Spec


def init_cache(
    config: Any,
    transform: Chain | Stage,
    batch: int,
    max_length: int,
    prompt: int = 0,
    dtype: Any = jnp.float32,
    exact_layers: Sequence[int] = (),
    constants: Mapping[str, Any] | None = None,
    recurrence: Recurrence | None = None,
    kernels: Kernels = "xla",
    layout: Any = None,
) -> Cache:
    """An empty cache for a model.

    Args:
      config: the model's configuration.
      transform: a chain (or a single stage), for the attention layers. A model without such
        layers takes `chain()`, or `chain(store())` as the exact cache of any model.
      batch: rows.
      max_length: the most tokens that any row will ever have, prompt and shared prefix included.
      prompt: the most of these that come as the prompt, before `finish`; 0: no prompt. After it,
        every row has room for max_length - prompt tokens: a row with a shorter prompt may have
        more where nothing was pruned, but should not count on it.
      dtype: of exact keys and values.
      exact_layers: attention layers that hold everything exactly whatever the transform, by their
        number in the model (negative: from the end).
      constants: arrays that the transform reads by name (calibration, shared prefixes), their
        first axis that of layers, or of size 1.
      recurrence: how the state of recurrent layers is held; None: as the model's layers say.
      kernels: "xla", "tpu", "gpu" or "interpret", see `Cache`; `kvjax.cache.kernels` says where
        kernels apply. On several devices only "xla".
      layout: `kvjax.parallel.Layout`, how the cache lies over the devices of a mesh.

    Raises:
      ValueError: sizes that do not fit each other, the model, the transform or the mesh.
    """
    check_kernels(kernels)
    if kernels != "xla" and layout is not None and layout.mesh.size > 1:
        raise ValueError(
            f"kernels={kernels!r} on a mesh of {layout.mesh.size} devices: XLA cannot split a "
            "kernel over them; expected 'xla'"
        )
    if isinstance(transform, Stage):
        transform = chain(transform)
    if not isinstance(transform, Chain):
        raise ValueError(f"transform={transform!r}: expected a chain of stages")
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 row")
    constants = dict(constants or {})
    given = _given(config, transform, constants, batch, max_length, prompt)
    room = max_length if given is None else max_length - given[1]
    if not 0 <= prompt <= max_length or max_length < 1:
        raise ValueError(
            f"prompt={prompt} and max_length={max_length}: need 0 <= prompt <= max_length"
        )
    exact = _exact(config, transform, exact_layers)
    attention = range(len(config.attention_layers))
    if not attention and transform not in (chain(), chain(store())):
        raise ValueError(
            f"transform={transform!r}: this model has no attention layers, so it would do nothing; "
            "expected chain() or chain(store())"
        )
    rest = tuple(layer for layer in attention if layer not in exact)
    plan = [(rest, transform)]
    if exact:
        plan.append((tuple(sorted(exact)), chain(store())))
    plan = [(layers, t) for layers, t in plan if layers]
    missing = sorted(set(transform.constants(config.head_dim)) - constants.keys())
    if missing and rest:
        raise ValueError(
            f"constants has no {', '.join(map(repr, missing))}, which {transform} reads: calibrate "
            "it for this model first (python -m experiments.calibrate); lists of tokens come from "
            "kvjax.decode.token_lists"
        )
    if exact:  # the others read no constants: each array is cut to the layers that do
        cut = lambda x: x[np.asarray(rest)] if x.shape[0] == len(attention) else x  # noqa: E731
        constants = jax.tree.map(cut, constants)

    def empty() -> Cache:
        states = []
        for layers, t in plan:
            spec = Spec(
                len(layers),
                batch,
                config.heads,
                config.kv_heads,
                config.head_dim,
                room,
                prompt,
                prompt,
                dtype,
                shards=1 if layout is None else layout.shards,
            )
            states.append(t.init(spec))
        held = list(plan)
        if config.recurrent_layers:
            layers = len(config.recurrent_layers)
            own = config.recurrence if recurrence is None else recurrence
            held.append((tuple(range(layers)), own))
            states.append(own.init(layers, batch, dtype))
        return Cache(
            tuple(states),
            jnp.zeros((batch,), jnp.int32) if given is None else given[0],
            {"rope": rope_of(config, max_length), "span": span_of(config)},
            tuple(t for _, t in held),
            tuple(layers for layers, _ in held),
            config.attention_softcap,
            max_length,
            kernels,
            layout,
        )

    if layout is None:
        cache = empty()
    else:
        cache, constants = layout.create(empty), layout.everywhere(constants)
    return cache.replace(constants={**cache.constants, **constants})


def _exact(config: Any, transform: Chain, exact_layers: Sequence[int]) -> set[int]:
    """`exact_layers` counted among the attention layers."""
    exact = set()
    for layer in exact_layers:
        if not -config.layers <= layer < config.layers:
            raise ValueError(
                f"exact_layers={tuple(exact_layers)}: there are {config.layers} layers"
            )
        if layer % config.layers in config.recurrent_layers:
            raise ValueError(
                f"exact_layers={tuple(exact_layers)}: layer {layer} is recurrent, holds no tokens"
            )
        exact.add(config.attention_layers.index(layer % config.layers))
    if exact and any(stage.every_layer for stage in transform.stages):
        raise ValueError(
            f"exact_layers={tuple(exact_layers)}: these layers would not see the tokens of "
            f"{next(s for s in transform.stages if s.every_layer)}"
        )
    return exact


def _given(
    config: Any,
    transform: Chain,
    constants: dict[str, Any],
    batch: int,
    max_length: int,
    prompt: int,
) -> tuple[Array, int] | None:
    """Tokens of shared prefixes; see `Stage.given`."""
    given = transform.given(constants, batch)
    unread = sorted(
        name for name, x in constants.items()
        if isinstance(x, KV) and transform.given({name: x}, batch) is None
    )  # fmt: skip
    if unread:
        raise ValueError(
            f"constants has the shared prefixes {unread}, which {transform} never reads"
        )
    if given is not None and config.recurrent_layers:
        raise ValueError(
            f"{transform}: this model has recurrent layers, whose state would not have seen a "
            "shared prefix"
        )
    if given is not None and not prompt <= max_length - given[1] >= 1:
        raise ValueError(
            f"max_length={max_length}: {given[1]} tokens of shared prefixes and {prompt} of a "
            "prompt are given, and rows need room for at least 1 token"
        )
    return given
