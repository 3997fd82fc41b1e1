"""What the GPU kernels share: splits of the slots in use, gathered blocks, the running softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kvjax.cache.types import Partial
from pallas_kernels.common import Shape, ends, grouped, grouped_positions, ungrouped

# Programs that a call should at least have: about two for each multiprocessor of a large GPU.
PROGRAMS = 256
# The least side of a tensor-core product.
TILE = 16


def power(n: int) -> int:
    """The next power of two, at least TILE: the sizes that Triton has."""
    return max(TILE, 1 << (n - 1).bit_length())


def lanes(n: int) -> Array:
    """0 to power(n) - 1, past n - 1 that again: never out of bounds, and never fetched anew."""
    index = jax.lax.iota(jnp.int32, power(n))
    return index if power(n) == n else jnp.minimum(index, n - 1)


@dataclasses.dataclass(frozen=True)
class Programs:
    """A grid over (rows of the batch, key-value heads, splits of the slots in use).

    Attributes:
      block: slots per step, a power of two.
      unit: slots that are read together; a split is a multiple of it.
    """

    shape: Shape
    block: int
    unit: int = 1

    @property
    def rows(self) -> int:
        return power(self.shape.rows)

    @property
    def splits(self) -> int:
        wanted = -(-PROGRAMS // (self.shape.batch * self.shape.heads))
        return max(1, min(wanted, -(-self.shape.slots // max(self.block, self.unit))))

    def bounds(self, end: Array) -> tuple[Array, Array]:
        """First and last + 1 of the units (of `unit` slots) that this program reads."""
        units = (end + self.unit - 1) // self.unit
        each = (units + self.splits - 1) // self.splits
        first = pl.program_id(2) * each
        return first, jnp.minimum(first + each, units)

    def call(
        self, kernel: Callable, name: str, layer: Array, used: Any, q: Array, pos: Array,
        bias: Array | None, q_pos: Array | None, span: Any, args: Sequence[Array],
        out: tuple[int, ...], interpret: Any,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Runs `kernel` and merges its splits: out [B, H, *out] and max, sum [B, H, rows].

        Args:
          args: further arrays, each given whole.
          out: of one head, (.., rows, channels).
        """
        shape, rows = self.shape, self.rows
        pad = power(shape.width) - shape.width
        q = jnp.pad(grouped(q, shape, rows), ((0, 0), (0, 0), (0, 0), (0, pad)))
        given = [jnp.asarray(layer, jnp.int32).reshape(1), ends(used, shape), q, pos]
        if shape.window:
            given.append(jnp.asarray(span, jnp.int32).reshape(1))
            given.append(grouped_positions(q_pos, shape, rows))
        if bias is not None:
            given.append(bias)
        sizes = [out, (rows,), (rows,)]
        lead = (shape.batch, shape.heads, self.splits)

        def spec(size: tuple[int, ...]) -> pl.BlockSpec:
            zeros = (0,) * len(size)
            return pl.BlockSpec((None, None, None, *size), lambda b, h, s: (b, h, s, *zeros))

        acc, top, total = pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct((*lead, *n), jnp.float32) for n in sizes],
            grid=lead,
            out_specs=[spec(n) for n in sizes],
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name=name,
        )(*given, *args)
        most = jnp.max(top, 2)
        weight = jnp.exp(top - jnp.where(jnp.isneginf(most), 0.0, most)[:, :, None])
        sums = jnp.sum(weight * total, 2)
        weight = weight.reshape(*weight.shape[:3], *(1,) * (len(out) - 2), rows, 1)
        acc = jnp.sum(weight * acc, 2)
        scale = jnp.where(sums > 0, sums, 1.0)
        return acc / scale.reshape(*scale.shape[:2], *(1,) * (len(out) - 2), rows, 1), most, sums

    def partial(self, out: Array, top: Array, total: Array) -> Partial:
        return ungrouped(out[..., : self.shape.width], top, total, self.shape)


class Inputs:
    """The refs that every kernel is given, before its own arrays and its outputs (`rest`)."""

    def __init__(self, shape: Shape, refs: Sequence[Any]) -> None:
        layer, ends, q, self.pos, *rest = refs
        # What depends on the program is asked for here, outside of loops.
        self.layer, self.b, self.h = layer[0], pl.program_id(0), pl.program_id(1)
        self.shape, self.end, self.q = shape, ends[self.b, self.h], q[self.b, self.h]
        if shape.window:
            span, rows, *rest = rest
            self.span, self.rows = span[0], rows[self.b]
        if shape.bias:
            self.bias, *rest = rest
        self.rest = rest

    def at(self, x: Any) -> tuple[Any, Any, Any]:
        """(layer, row, head) of this program in x [L or 1, B, H or 1, ...]."""
        return self.layer if x.shape[0] > 1 else 0, self.b, self.h if x.shape[2] > 1 else 0

    def masked(self, s: Array, slot: Array, counts: Array) -> tuple[Array, Array]:
        """Logits s [R, N] of slots [N], capped, biased, -inf where not seen; valid bool [N].

        Args:
          counts: bool [N], the slots that this step is to read.
        """
        shape = self.shape
        if shape.softcap is not None:
            s = shape.softcap * jnp.tanh(s / shape.softcap)
        if shape.bias:
            s = s + self.bias[(*self.at(self.bias), slot)][None]
        at = self.pos[(*self.at(self.pos), slot)]
        valid = (at >= 0) & counts & (slot < self.end)
        seen = jnp.broadcast_to(valid[None], s.shape)
        if shape.window:
            seen &= self.rows[:, None] - at[None] < self.span
        return jnp.where(seen, s, -jnp.inf), valid


def softmax_step(s: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """(weights [R, N], factor [R] of earlier sums, new maximum [R], new sum [R])."""
    now = jnp.maximum(top, jnp.max(s, 1))
    safe = jnp.where(now == -jnp.inf, 0.0, now)
    weights, shrink = jnp.exp(s - safe[:, None]), jnp.exp(top - safe)
    return weights, shrink, now, total * shrink + jnp.sum(weights, 1)


def dot(a: Array, b: Array, axis: int) -> Array:
    """a [R, K] and b [K, N] (axis 0) or [N, K] (axis 1) -> float32 [R, N]."""
    exact = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    dims = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, jnp.float32)
