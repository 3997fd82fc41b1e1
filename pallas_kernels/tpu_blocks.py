"""What the TPU kernels share: blocks of a stacked cache, and the running softmax over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common import Shape, ends, grouped, grouped_positions, up

LANES = 128


def lies_transposed(width: int) -> bool:
    """Whether a TPU keeps arrays [..., N, width] with N as the minor axis.

    XLA takes the order that wastes least: an axis that is no multiple of 128 lanes would be padded
    to one. A kernel that asks for another order than the arrays have makes XLA copy them.
    """
    return width % LANES != 0


def head_block(heads: int) -> int:
    """Key-value heads of one block: 8, or all. (Second-last axes go by eights or as a whole.)"""
    return 8 if heads % 8 == 0 else heads


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Of products: float32 operands are multiplied as such, not rounded to bfloat16."""
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A grid over (rows of the batch, blocks of heads, blocks of slots in use).

    Attributes:
      block: slots per block, a multiple of 128.
      dtype: of the matrix products; decides to how many query rows the heads of a group are padded.
    """

    shape: Shape
    block: int
    dtype: Any

    @property
    def heads(self) -> int:
        return head_block(self.shape.heads)

    @property
    def rows(self) -> int:
        return up(self.shape.rows, 32 // jnp.dtype(self.dtype).itemsize)

    def slots(self, x: Array, axis: int = 3, each: int = 1) -> pl.BlockSpec:
        """Blocks of x [L or 1, B, H or 1, ...] along `axis`, of `each` slots per entry."""
        layers, wide = x.shape[0] > 1, x.shape[2] > 1

        def index(b: Any, group: Any, n: Any, layer: Any, used: Any, span: Any) -> tuple:
            # A block past the last in use is that one again: what is there is not fetched twice.
            last = used[b, group * self.heads]
            for i in range(1, self.heads):
                last = jnp.maximum(last, used[b, group * self.heads + i])
            n = jnp.minimum(n, jnp.maximum(pl.cdiv(last, self.block) - 1, 0))
            lead = (layer[0] if layers else 0, b, group if wide else 0)
            return (*lead, *(n if a == axis else 0 for a in range(3, x.ndim)))

        size = [self.block // each if a == axis else x.shape[a] for a in range(3, x.ndim)]
        return pl.BlockSpec((1, 1, self.heads if wide else 1, *size), index)

    def fixed(self, *size: int) -> pl.BlockSpec:
        """The same block of [B, H, *size] for all blocks of slots."""
        zeros = (0,) * len(size)
        return pl.BlockSpec((1, self.heads, *size), lambda b, group, n, *_: (b, group, *zeros))

    def call(
        self, kernel: Any, name: str, layer: Array, used: Any, q: Array, pos: Array,
        bias: Array | None, q_pos: Array | None, span: Any, args: Sequence[tuple[Array, Any]],
        out: tuple[int, ...], interpret: Any, bytes_read: int,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Runs the kernel: out [B, H, *out] and max, sum [B, H, rows], float32.

        Args:
          args: further arrays and their specs.
          out: of one head, (.., rows, channels).
          bytes_read: by a call on a full buffer, for XLA's scheduler.
        """
        shape, rows = self.shape, self.rows
        end = ends(used, shape)
        fixed = [(grouped(q, shape, rows), self.fixed(rows, shape.width)), (pos, self.slots(pos))]
        if bias is not None:
            fixed.append((bias, self.slots(bias)))
        if shape.window:
            spec = pl.BlockSpec((1, rows, 1), lambda b, group, n, *_: (b, 0, 0))
            fixed.append((grouped_positions(q_pos, shape, rows)[..., None], spec))
        arrays, specs = zip(*fixed, *args)
        span = jnp.asarray(0 if span is None else span, jnp.int32).reshape(1)
        sizes = [out, (rows, 1), (rows, 1)]
        logits = shape.batch * shape.heads * rows * shape.slots
        out, top, total = pl.pallas_call(
            kernel,
            out_shape=[
                jax.ShapeDtypeStruct((shape.batch, shape.heads, *n), jnp.float32) for n in sizes
            ],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                # The number of blocks is data: a step costs what is held, not what could be.
                grid=(
                    shape.batch,
                    shape.heads // self.heads,
                    jnp.maximum(pl.cdiv(jnp.max(end), self.block), 1),
                ),
                in_specs=specs,
                out_specs=[self.fixed(*n) for n in sizes],
                scratch_shapes=[
                    pltpu.VMEM((self.heads, *n), jnp.float32)
                    for n in (out, (rows, LANES), (rows, LANES))
                ],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            cost_estimate=pl.CostEstimate(
                flops=4 * logits * shape.width, transcendentals=logits, bytes_accessed=bytes_read
            ),
            interpret=interpret,
            name=name,
        )(jnp.asarray(layer, jnp.int32).reshape(1), end, span, *arrays)
        return out, top[..., 0], total[..., 0]


def begin(acc: Any, top: Any, total: Any) -> None:
    """Before the first block of slots: attention over no key."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)


def end_with(out: Any, top_out: Any, sum_out: Any, acc: Any, top: Any, total: Any) -> None:
    """After the last block of slots: normalises."""

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        for i in range(acc.shape[0]):
            sums = total[i][:, :1]
            out[0, i] = acc[i] / jnp.where(sums > 0, sums, 1.0)
            top_out[0, i] = top[i][:, :1]
            sum_out[0, i] = sums


def softmax_step(
    s: Array, i: int, first: Any, end: Any, span: Any, pos: Any, bias: Any, rows: Any, top: Any,
    total: Any, softcap: float | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Masks logits s [R, N] of head i and takes them into the running softmax.

    Args:
      first: number of the block's first slot. end: first slot that does not count.
      pos, bias, rows: blocks (refs) of positions, bias and query positions; None where unused.
      top, total: running maximum and sum [heads, R, LANES], updated.

    Returns:
      (weights [R, N], the factor [R, 1] of what was summed before, valid bool [1, N]).
    """
    if softcap is not None:
        s = softcap * jnp.tanh(s / softcap)
    if bias is not None:
        s = s + bias[0, 0, i : i + 1]
    at = pos[0, 0, i : i + 1] if pos.shape[2] > 1 else pos[0, 0]
    slot = first + jax.lax.broadcasted_iota(jnp.int32, at.shape, 1)
    valid = (at >= 0) & (slot < end)
    seen = valid if rows is None else valid & (rows[0] - at < span)
    s = jnp.where(seen, s, -jnp.inf)
    before = top[i][:, :1]
    now = jnp.maximum(before, jnp.max(s, 1, keepdims=True))
    safe = jnp.where(now == -jnp.inf, 0.0, now)
    weights, shrink = jnp.exp(s - safe), jnp.exp(before - safe)
    sums = total[i][:, :1] * shrink + jnp.sum(weights, 1, keepdims=True)
    top[i] = jnp.broadcast_to(now, top.shape[1:])
    total[i] = jnp.broadcast_to(sums, total.shape[1:])
    return weights, shrink, valid
