"""Running layers of several kinds: scans over runs and repetitions, so that compile time stays flat
in depth."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.models.recurrent import one_layer

Run = tuple[str, int]


def layer_plan(kinds: Sequence[str]) -> tuple[tuple[tuple[Run, ...], int], ...]:
    """Layers as blocks of runs, each block repeated: ((runs of a block, repetitions), ...).

    The repetition that saves most is taken; what stands before and after it runs once.

    >>> layer_plan("mmammam")
    (((('m', 2), ('a', 1)), 2), ((('m', 1),), 1))
    """
    runs = tuple((kind, len(list(group))) for kind, group in itertools.groupby(kinds))
    best = (0, 0, 0, 0)  # runs saved, start, runs in the block, repetitions
    for size in range(1, len(runs) // 2 + 1):
        for start in range(len(runs) - 2 * size + 1):
            block, times = runs[start : start + size], 1
            while runs[start + times * size : start + (times + 1) * size] == block:
                times += 1
            best = max(best, ((times - 1) * size, -start, -size, times))
    _, start, size, times = best[0], -best[1], -best[2], best[3]
    if times < 2:
        return ((runs, 1),)
    parts = (
        (runs[:start], 1),
        (runs[start : start + size], times),
        (runs[start + size * times :], 1),
    )
    return tuple(part for part in parts if part[0])


def scan_layers(
    kinds: Sequence[str],
    blocks: Mapping[str, Callable[[Any, Any], tuple[Any, Any]]],
    carry: Any,
    inputs: Mapping[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """Runs all layers in order.

    Args:
      kinds: of each layer.
      blocks: kind -> function (carry, (inputs of one layer, index among its kind)) -> (carry, out).
      carry: goes through all layers.
      inputs: kind -> stacked arrays [layers of that kind, ...].

    Returns:
      (carry, kind -> outputs of its layers, stacked).
    """
    totals = Counter(kinds)
    if len(totals) == 1:
        kind = kinds[0]
        indices = jnp.arange(len(kinds), dtype=jnp.int32)
        carry, out = jax.lax.scan(blocks[kind], carry, (inputs[kind], indices))
        return carry, {kind: out}

    # Layers are cut out of the whole stacks by index: slices of the stacks for each run would be
    # copies of the parameters.
    def layer(kind: str, carry: Any, index: Array) -> tuple[Any, Any]:
        return blocks[kind](carry, (one_layer(inputs[kind], index), index))

    def run(runs: tuple[Run, ...], begin: Mapping[str, int], inside: Counter) -> Callable:
        def block(carry: Any, n: Array) -> tuple[Any, dict[str, Any]]:
            """The n-th repetition of a block of runs."""
            done, outs = Counter(), {kind: [] for kind in inside}
            for kind, count in runs:
                first = begin[kind] + n * inside[kind] + done[kind]
                indices = first + jnp.arange(count, dtype=jnp.int32)
                if count == 1:
                    carry, out = layer(kind, carry, indices[0])
                    out = jax.tree.map(lambda x: x[None], out)
                else:
                    carry, out = jax.lax.scan(functools.partial(layer, kind), carry, indices)
                outs[kind].append(out)
                done[kind] += count
            return carry, {kind: _join(parts) for kind, parts in outs.items()}

        return block

    begin, found = Counter(), {kind: [] for kind in totals}
    for runs, times in layer_plan(kinds):
        inside = Counter()
        for kind, count in runs:
            inside[kind] += count
        block = run(runs, Counter(begin), inside)
        if times == 1:
            carry, outs = block(carry, jnp.zeros((), jnp.int32))
        else:
            carry, outs = jax.lax.scan(block, carry, jnp.arange(times, dtype=jnp.int32))
            outs = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), outs)
        for kind, out in outs.items():
            found[kind].append(out)
            begin[kind] += times * inside[kind]
    return carry, {kind: _join(parts) for kind, parts in found.items()}


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
