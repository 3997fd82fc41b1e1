"""Decode attention over packed codes for TPU: unpacked in VMEM, scales folded, by Mosaic."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kvjax.cache.types import Partial
from pallas_kernels.common import Shape, ungrouped
from pallas_kernels.quantized_decode_attention.form import Form
from pallas_kernels.tpu_blocks import (
    LANES,
    Blocks,
    begin,
    end_with,
    lies_transposed,
    precision_of,
    softmax_step,
)


def block_size(shape: Shape, group: int) -> int:
    """Slots per block: whole tiles of units and of lanes; about 512, fewer for wide heads."""
    least = math.lcm(LANES, 8 * group)
    most = min(512 if shape.width <= LANES else 256, shape.slots)
    return max(most // least, 1) * least


def wide(x: Array) -> Array:
    """float32 of scales: bfloat16 or float32, or the bits of float16 as int16 (no TPU type)."""
    if x.dtype != jnp.int16:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.int32)
    small = (bits & 0x3FF).astype(jnp.float32) * 2.0**-24
    normal = jax.lax.bitcast_convert_type(((bits & 0x7FFF) << 13) + (112 << 23), jnp.float32)
    size = jnp.where(bits & 0x7C00 == 0, small, normal)
    return jnp.where(bits < 0, -size, size)


def unpack(packed: Array, bits: int, axis: int, dtype: Any) -> Array:
    """Planes of int32 words that hold bytes, one after the other along `axis`, as floats."""
    planes = [(packed >> low) & (2**bits - 1) for low in range(0, 8, bits)]
    codes = planes[0] if len(planes) == 1 else jnp.concatenate(planes, axis)
    return codes.astype(jnp.float32).astype(dtype)


def _kernel(layer, used, span, q, pos, *rest, shape: Shape, blocks: Blocks, form: Form, lies: bool):
    rest = list(rest)
    bias = rest.pop(0) if shape.bias else None
    rows = rest.pop(0) if shape.window else None
    k, k_scale, k_min, v, v_scale, v_min, *outs = rest
    acc, top, total = outs[3:]
    begin(acc, top, total)
    b, group, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * blocks.block
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    exact, fast = precision_of(jnp.float32), precision_of(blocks.dtype)

    for i in range(blocks.heads):
        end = used[b, group * blocks.heads + i]

        @pl.when(first < end)
        def _(i=i, end=end):
            # Each unit's scales go into the queries, its minima into one sum per query and unit.
            x = q[0, i].astype(jnp.float32)[None]
            folded = (x * wide(k_scale[0, 0, i])[:, None]).astype(blocks.dtype)
            low = jnp.sum(x * wide(k_min[0, 0, i])[:, None], -1, keepdims=True)
            codes = unpack(k[0, 0, i].astype(jnp.int32), form.k_bits, 1, blocks.dtype)
            s = dot(folded, codes, (((2,), (2,)), ((0,), (0,))), fast) + low
            s = jnp.concatenate([s[u] for u in range(s.shape[0])], 1)
            weights, shrink, valid = softmax_step(
                s, i, first, end, span[0], pos, bias, rows, top, total, shape.softcap
            )
            # Scales of values go into the weights. Those of empty slots may be anything.
            scale = jnp.where(valid, wide(v_scale[0, 0, i]), 0.0)
            low = jnp.where(valid, wide(v_min[0, 0, i]), 0.0)
            low = dot(weights, low, (((1,), (1,)), ((), ())), exact)
            packed = v[0, 0, i].astype(jnp.int32)
            packed = packed if lies else packed.T
            each = packed.shape[0] // form.v_groups
            for g in range(form.v_groups):
                codes = unpack(packed[g * each : (g + 1) * each], form.v_bits, 0, blocks.dtype)
                folded = (weights * scale[g : g + 1]).astype(blocks.dtype)
                mixed = dot(folded, codes, (((1,), (1,)), ((), ())), fast) + low[:, g : g + 1]
                acc[i, g] = acc[i, g] * shrink + mixed

    end_with(*outs)


def _scales(x: Array, layer: Array) -> Array:
    """Mosaic takes no float16: the bits of one layer's scales, copied by XLA; others untouched."""
    if x.dtype != jnp.float16:
        return x
    x = jax.lax.dynamic_slice_in_dim(x, layer if x.shape[0] > 1 else 0, 1)
    return jax.lax.bitcast_convert_type(x, jnp.int16)


def quantized_decode_attention_tpu(
    q: Array, k: dict[str, Array], v: dict[str, Array], pos: Array, layer: Array, shape: Shape,
    form: Form, used: Any, q_pos: Array | None, span: Any, bias: Array | None,
    interpret: Any = False,
) -> Partial:  # fmt: skip
    """See `quantized_decode_attention`."""
    size = block_size(shape, form.k_group)
    blocks = Blocks(shape, size, jnp.dtype(q.dtype))
    lies = lies_transposed(v["codes"].shape[4])
    codes = jnp.swapaxes(v["codes"], 3, 4) if lies else v["codes"]
    args = [(k["codes"], 3, form.k_group)]
    args += [(_scales(k[name], layer), 3, form.k_group) for name in ("scale", "min")]
    args += [(codes, 4 if lies else 3, 1)]
    args += [(jnp.swapaxes(_scales(v[name], layer), 3, 4), 4, 1) for name in ("scale", "min")]
    read = sum(x.size * x.dtype.itemsize // x.shape[0] for x, _, _ in args)
    out, top, total = blocks.call(
        functools.partial(_kernel, shape=shape, blocks=blocks, form=form, lies=lies),
        "quantized_decode_attention", layer, used, q, pos, bias, q_pos, span,
        [(x, blocks.slots(x, axis, each)) for x, axis, each in args],
        (form.v_groups, blocks.rows, shape.width // form.v_groups), interpret, read,
    )  # fmt: skip
    out = jnp.moveaxis(out, 2, 3).reshape(*out.shape[:2], blocks.rows, shape.width)
    return ungrouped(out, top, total, shape)
