"""Decode attention in plain JAX: what the kernels must equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial, partial_attention
from pallas_kernels.common import Shape, ends, grouped, grouped_positions, ungrouped


def layer_of(x: Array, layer: Array, slots: int | None = None) -> Array:
    """[L or 1, B, H or 1, N, ...] -> [B, H or 1, slots, ...]."""
    x = jax.lax.dynamic_index_in_dim(x, layer if x.shape[0] > 1 else 0, 0, keepdims=False)
    return x[:, :, :slots]


def decode_attention_reference(
    q: Array, k: Array, v: Array, pos: Array, layer: Array, shape: Shape, used: Any,
    q_pos: Array | None, span: Any, bias: Array | None,
) -> Partial:  # fmt: skip
    """See `decode_attention`. Reads every slot of the layer."""
    k, v, pos = (layer_of(x, layer, shape.slots) for x in (k, v, pos))
    q, rows = grouped(q, shape, shape.rows), shape.rows
    exact = jax.lax.Precision.HIGHEST
    s = jnp.einsum("bhrd,bhnd->bhrn", q, k, precision=exact, preferred_element_type=jnp.float32)
    if shape.softcap is not None:
        s = shape.softcap * jnp.tanh(s / shape.softcap)
    if bias is not None:
        s = s + layer_of(bias, layer, shape.slots)[:, :, None]
    valid = (pos >= 0) & (jnp.arange(shape.slots) < ends(used, shape)[..., None])
    seen = valid[:, :, None]
    if shape.window:
        at = grouped_positions(q_pos, shape, rows)[:, None, :, None]
        seen = seen & (at - pos[:, :, None] < span)
    v = jnp.where(valid[..., None], v, jnp.zeros((), v.dtype))

    def mix(p: Array) -> Array:
        return jnp.einsum(
            "bhrn,bhnd->bhrd", p.astype(v.dtype), v, precision=exact,
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    part = partial_attention(s, seen, mix)
    return ungrouped(part.out, part.max, part.sum, shape)
