"""What the attention kernels share: arguments and their checks, rows of queries, memory order."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial

Implementation = Literal["reference", "tpu", "gpu"]
# Query rows of one key-value head, at most: these kernels are for a few rows, not for prompts.
ROWS = 256


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static part of one call.

    Attributes:
      batch, heads, query_heads, tokens, width: B, H, Hq, T, D.
      slots: N that can be read.
      rows: query rows of one key-value head, Hq / H * T, before padding.
      softcap: c of c tanh(x / c) on logits, or None.
      window, bias: whether there is a sliding window, a bias.
    """

    batch: int
    heads: int
    query_heads: int
    tokens: int
    width: int
    slots: int
    softcap: float | None
    window: bool
    bias: bool

    @property
    def rows(self) -> int:
        return self.query_heads // self.heads * self.tokens


def up(n: int, multiple: int) -> int:
    """n rounded up."""
    return -(-n // multiple) * multiple


def implementation_of(name: Implementation | None) -> Implementation:
    """The one asked for, or that of the default backend."""
    if name is None:
        return {"tpu": "tpu", "gpu": "gpu"}.get(jax.default_backend(), "reference")
    if name not in ("reference", "tpu", "gpu"):
        raise ValueError(f"implementation={name!r}: expected 'reference', 'tpu', 'gpu' or None")
    return name


def check_dtypes(implementation: Implementation, **arrays: Array) -> None:
    """Raises ValueError for floats that a backend's compiler does not take."""
    takes = (
        ("float32", "bfloat16") if implementation == "tpu" else ("float32", "bfloat16", "float16")
    )
    for name, x in arrays.items():
        if implementation != "reference" and x.dtype.name not in takes:
            raise ValueError(
                f"{name} is {x.dtype.name}: implementation={implementation!r} takes "
                f"{', '.join(takes)}"
            )


def shape_of(
    q: Array, lead: tuple[int, ...], slots: int, pos: Array, bias: Array | None,
    softcap: float | None, q_pos: Array | None, span: Any,
) -> Shape:  # fmt: skip
    """Checks what all implementations need; `lead` is [L, B, H] of keys and values."""
    if q.ndim != 4 or len(lead) != 3:
        raise ValueError(f"q has shape {q.shape}: expected [B, Hq, T, D], keys [L, B, H, N, ...]")
    layers, batch, heads = lead
    if q.shape[0] != batch or q.shape[1] % heads:
        raise ValueError(
            f"q has shape {q.shape}: expected a batch of {batch} and a multiple of {heads} heads"
        )
    held = pos.shape[:3]
    if pos.ndim != 4 or any(a not in (1, b) for a, b in zip(held, lead)) or held[1] != batch:
        raise ValueError(
            f"pos has shape {pos.shape}: expected [{layers} or 1, {batch}, {heads} or 1, slots]"
        )
    if bias is not None and bias.shape[:3] != tuple(lead):
        raise ValueError(f"bias has shape {bias.shape}: expected [{layers}, {batch}, {heads}, N]")
    if (q_pos is None) != (span is None):
        raise ValueError("q_pos and span: a sliding window needs both")
    if q_pos is not None and q_pos.shape != (batch, q.shape[2]):
        raise ValueError(f"q_pos has shape {q_pos.shape}: expected {(batch, q.shape[2])}")
    slots = min(slots, pos.shape[3], slots if bias is None else bias.shape[3])
    if slots < 1:
        raise ValueError("keys have no slots: attention over none is Partial.identity")
    shape = Shape(batch, heads, *q.shape[1:], slots, softcap, span is not None, bias is not None)
    if shape.rows > ROWS:
        raise ValueError(
            f"q has shape {q.shape}: {shape.rows} rows for each of {heads} key-value heads, and "
            f"kernels for decoding take up to {ROWS}"
        )
    return shape


def ends(used: Array | int | None, shape: Shape) -> Array:
    """First slot that is not read, int32 [B, H], from a scalar, [B] or [B, H or 1]."""
    used = jnp.asarray(shape.slots if used is None else used, jnp.int32)
    if used.ndim == 1:
        used = used[:, None]
    if used.ndim not in (0, 2):
        raise ValueError(f"used has shape {used.shape}: expected a scalar, [B] or [B, H or 1]")
    return jnp.clip(jnp.broadcast_to(used, (shape.batch, shape.heads)), 0, shape.slots)


def grouped(q: Array, shape: Shape, rows: int) -> Array:
    """[B, Hq, T, D] -> [B, H, rows, D]: query heads of one key-value head, padded with zeros."""
    q = q.reshape(shape.batch, shape.heads, shape.rows, shape.width)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - shape.rows), (0, 0)))


def grouped_positions(q_pos: Array, shape: Shape, rows: int) -> Array:
    """Positions of the rows of `grouped`: int32 [B, T] -> [B, rows]."""
    q_pos = jnp.tile(q_pos.astype(jnp.int32), (1, shape.query_heads // shape.heads))
    return jnp.pad(q_pos, ((0, 0), (0, rows - shape.rows)))


def ungrouped(out: Array, top: Array, total: Array, shape: Shape) -> Partial:
    """[B, H, rows, ...] -> Partial over [B, Hq, T]."""
    lead = (shape.batch, shape.query_heads, shape.tokens)
    cut = lambda x: x[:, :, : shape.rows].reshape(*lead, *x.shape[3:])  # noqa: E731
    return Partial(cut(out), cut(top), cut(total))
