"""Decode attention for GPU: splits of the slots in use, merged after, by Pallas and Triton."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial
from pallas_kernels.common import Shape
from pallas_kernels.gpu_blocks import Inputs, Programs, dot, lanes, power, softmax_step


def block_size(shape: Shape) -> int:
    """Slots per step: what keeps a block of keys within a few thousand numbers."""
    return min(64 if power(shape.width) <= 128 else 32, power(shape.slots))


def _kernel(*refs, shape: Shape, programs: Programs, dtype: Any):
    given = Inputs(shape, refs)
    k, v, out, top_out, sum_out = given.rest
    block, column = programs.block, lanes(shape.width)
    first, last = programs.bounds(given.end)
    q = given.q.astype(dtype)

    def step(n: Array, carry: tuple) -> tuple:
        acc, top, total = carry
        slot = first + n * block + jax.lax.iota(jnp.int32, block)
        mine = slot < last
        slot = jnp.minimum(slot, shape.slots - 1)
        at = (*given.at(k), slot[:, None], column[None, :])
        s, valid = given.masked(dot(q, k[at].astype(dtype), 1), slot, mine)
        weights, shrink, top, total = softmax_step(s, top, total)
        # What lies in empty slots may be anything: its weight is 0, but 0 * NaN is not.
        values = v[at]
        values = jnp.where(valid[:, None], values, jnp.zeros((), values.dtype))
        acc = acc * shrink[:, None] + dot(weights.astype(values.dtype), values, 0)
        return acc, top, total

    none = jnp.zeros((programs.rows, power(shape.width)), jnp.float32)
    low = jnp.full((programs.rows,), -jnp.inf, jnp.float32)
    steps = (jnp.maximum(last - first, 0) + block - 1) // block
    done = jax.lax.fori_loop(0, steps, step, (none, low, jnp.zeros_like(low)))
    out[...], top_out[...], sum_out[...] = done


def decode_attention_gpu(
    q: Array, k: Array, v: Array, pos: Array, layer: Array, shape: Shape, used: Any,
    q_pos: Array | None, span: Any, bias: Array | None, interpret: Any = False,
) -> Partial:  # fmt: skip
    """See `decode_attention`."""
    programs = Programs(shape, block_size(shape))
    dtype = jnp.promote_types(q.dtype, k.dtype)
    done = programs.call(
        functools.partial(_kernel, shape=shape, programs=programs, dtype=dtype),
        "decode_attention", layer, used, q, pos, bias, q_pos, span, [k, v],
        (programs.rows, power(shape.width)), interpret,
    )  # fmt: skip
    return programs.partial(*done)
