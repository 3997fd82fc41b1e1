"""Decode attention for TPU: one pass over the blocks in use, by Pallas and Mosaic."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kvjax.cache.types import Partial
from pallas_kernels.common import Shape, ungrouped, up
from pallas_kernels.tpu_blocks import (
    LANES,
    Blocks,
    begin,
    end_with,
    head_block,
    lies_transposed,
    precision_of,
    softmax_step,
)

# Bytes of one block of keys (values), at most: four such blocks are in VMEM at a time.
BLOCK_BYTES = 2**20


def block_size(shape: Shape, itemsize: int) -> int:
    """Slots per block: 128 to 2,048, as many as the buffer has and VMEM allows."""
    block, row = LANES, head_block(shape.heads) * up(shape.width, LANES) * itemsize
    while block < min(shape.slots, 2048) and 2 * block * row <= BLOCK_BYTES:
        block *= 2
    return block


def _kernel(layer, used, span, q, pos, *rest, shape: Shape, blocks: Blocks, transposed: bool):
    rest = list(rest)
    bias = rest.pop(0) if shape.bias else None
    rows = rest.pop(0) if shape.window else None
    k, v, *outs = rest
    acc, top, total = outs[3:]
    begin(acc, top, total)
    b, group, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * blocks.block
    for i in range(blocks.heads):
        end = used[b, group * blocks.heads + i]

        @pl.when(first < end)
        def _(i=i, end=end):
            keys, values = k[0, 0, i].astype(blocks.dtype), v[0, 0, i]
            s = jax.lax.dot_general(
                q[0, i].astype(blocks.dtype), keys, (((1,), (0 if transposed else 1,)), ((), ())),
                precision_of(blocks.dtype), jnp.float32,
            )  # fmt: skip
            weights, shrink, valid = softmax_step(
                s, i, first, end, span[0], pos, bias, rows, top, total, shape.softcap
            )
            if not transposed:  # a row of flags as a column
                valid = jnp.broadcast_to(valid.astype(jnp.int32), (8, blocks.block)).T[:, :1] > 0
            # What lies in empty slots may be anything: its weight is 0, but 0 * NaN is not.
            valid = jnp.broadcast_to(valid, values.shape)
            values = jnp.where(valid, values, jnp.zeros((), values.dtype))
            mixed = jax.lax.dot_general(
                weights.astype(values.dtype), values, (((1,), (1 if transposed else 0,)), ((), ())),
                precision_of(values.dtype), jnp.float32,
            )  # fmt: skip
            acc[i] = acc[i] * shrink + mixed

    end_with(*outs)


def decode_attention_tpu(
    q: Array, k: Array, v: Array, pos: Array, layer: Array, shape: Shape, used: Any,
    q_pos: Array | None, span: Any, bias: Array | None, interpret: Any = False,
) -> Partial:  # fmt: skip
    """See `decode_attention`."""
    transposed = lies_transposed(shape.width)
    if transposed:  # as the arrays lie: XLA makes a change of names of this, no copy
        k, v = jnp.swapaxes(k, 3, 4), jnp.swapaxes(v, 3, 4)
    axis = 4 if transposed else 3
    size = block_size(shape, k.dtype.itemsize)
    blocks = Blocks(shape, size, jnp.promote_types(q.dtype, k.dtype))
    done = blocks.call(
        functools.partial(_kernel, shape=shape, blocks=blocks, transposed=transposed),
        "decode_attention", layer, used, q, pos, bias, q_pos, span,
        [(k, blocks.slots(k, axis)), (v, blocks.slots(v, axis))],
        (blocks.rows, shape.width), interpret, (k.nbytes + v.nbytes) // k.shape[0],
    )  # fmt: skip
    return ungrouped(*done, shape)
