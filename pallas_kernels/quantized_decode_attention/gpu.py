"""Decode attention over packed codes for GPU: unpacked in registers, by Pallas and Triton."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial
from pallas_kernels.common import Shape
from pallas_kernels.gpu_blocks import Inputs, Programs, dot, lanes, power, softmax_step
from pallas_kernels.quantized_decode_attention.form import Form

# Rows of bytes per step. Each holds one token of every plane: 4 tokens at 2 bits.
ROWS = 32


def _kernel(*refs, shape: Shape, programs: Programs, form: Form, dtype: Any):
    given = Inputs(shape, refs)
    k, k_scale, k_min, v, v_scale, v_min, out, top_out, sum_out = given.rest
    column, byte = lanes(shape.width), lanes(v.shape[4])
    each, v_each = k.shape[4], v.shape[4] // form.v_groups  # bytes of a unit, of a group
    first, last = programs.bounds(given.end)
    q = given.q.astype(dtype)

    def step(n: Array, carry: tuple) -> tuple:
        accs, top, total = carry
        row = first * each + n * ROWS + jax.lax.iota(jnp.int32, ROWS)
        mine = row < last * each
        row = jnp.minimum(row, k.shape[3] * each - 1)
        unit, i = row // each, row % each
        here = (unit[:, None], column[None, :])
        packed = k[(*given.at(k), unit[:, None], i[:, None], column[None, :])].astype(jnp.int32)
        scale = k_scale[(*given.at(k), *here)].astype(jnp.float32)
        low = k_min[(*given.at(k), *here)].astype(jnp.float32)
        for plane, shift in enumerate(range(0, 8, form.k_bits)):
            codes = ((packed >> shift) & (2**form.k_bits - 1)).astype(jnp.float32)
            slot = unit * form.k_group + plane * each + i
            counts = mine & (slot < shape.slots)
            slot = jnp.minimum(slot, shape.slots - 1)
            s = dot(q, (codes * scale + low).astype(dtype), 1)
            s, valid = given.masked(s, slot, counts)
            weights, shrink, top, total = softmax_step(s, top, total)
            group = (*given.at(v), slot[:, None], (byte // v_each)[None, :])
            # Scales of empty slots may be anything: their weight is 0, but 0 * NaN is not.
            v_step = jnp.where(valid[:, None], v_scale[group].astype(jnp.float32), 0.0)
            v_low = jnp.where(valid[:, None], v_min[group].astype(jnp.float32), 0.0)
            bytes_ = v[(*given.at(v), slot[:, None], byte[None, :])].astype(jnp.int32)
            values = [
                ((bytes_ >> shift) & (2**form.v_bits - 1)).astype(jnp.float32) * v_step + v_low
                for shift in range(0, 8, form.v_bits)
            ]
            accs = tuple(
                acc * shrink[:, None] + dot(weights.astype(dtype), x.astype(dtype), 0)
                for acc, x in zip(accs, values)
            )
        return accs, top, total

    none = jnp.zeros((programs.rows, power(v.shape[4])), jnp.float32)
    lowest = jnp.full((programs.rows,), -jnp.inf, jnp.float32)
    steps = (jnp.maximum(last - first, 0) * each + ROWS - 1) // ROWS
    start = ((none,) * (8 // form.v_bits), lowest, jnp.zeros_like(lowest))
    accs, top, total = jax.lax.fori_loop(0, steps, step, start)
    for plane, acc in enumerate(accs):
        out[plane] = acc
    top_out[...], sum_out[...] = top, total


def quantized_decode_attention_gpu(
    q: Array, k: dict[str, Array], v: dict[str, Array], pos: Array, layer: Array, shape: Shape,
    form: Form, used: Any, q_pos: Array | None, span: Any, bias: Array | None,
    interpret: Any = False,
) -> Partial:  # fmt: skip
    """See `quantized_decode_attention`."""
    programs = Programs(shape, ROWS, form.k_group)
    args = [code[name] for code in (k, v) for name in ("codes", "scale", "min")]
    size, planes = v["codes"].shape[4], 8 // form.v_bits
    out, top, total = programs.call(
        functools.partial(_kernel, shape=shape, programs=programs, form=form, dtype=q.dtype),
        "quantized_decode_attention", layer, used, q, pos, bias, q_pos, span, args,
        (planes, programs.rows, power(size)), interpret,
    )  # fmt: skip
    # [B, H, plane, row, (group, byte)] -> [B, H, row, (group, plane, byte)], the order of channels
    out = out[..., :size].reshape(*out.shape[:4], form.v_groups, -1)
    out = jnp.moveaxis(out, 2, 4).reshape(*out.shape[:2], programs.rows, shape.width)
    return programs.partial(out, top, total)
