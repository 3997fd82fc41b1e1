"""Decode attention over packed codes in plain JAX: decode, then attend."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial
from kvjax.codecs import unpack
from pallas_kernels.common import Shape
from pallas_kernels.decode_attention.reference import decode_attention_reference, layer_of
from pallas_kernels.quantized_decode_attention.form import Form


def decoded(code: dict[str, Array], bits: int, axis: int, layer: Array) -> Array:
    """Codes of one layer times scale plus minimum, unpacked along `axis`: [1, B, H, ...]."""
    packed, scale, low = (layer_of(code[name], layer)[None] for name in ("codes", "scale", "min"))
    if axis == -1:
        packed = packed.reshape(*packed.shape[:-1], scale.shape[-1], -1)
    scale, low = (jnp.expand_dims(x.astype(jnp.float32), axis) for x in (scale, low))
    return unpack(packed, bits, axis).astype(jnp.float32) * scale + low


def quantized_decode_attention_reference(
    q: Array, k: dict[str, Array], v: dict[str, Array], pos: Array, layer: Array, shape: Shape,
    form: Form, used: Any, q_pos: Array | None, span: Any, bias: Array | None,
) -> Partial:  # fmt: skip
    """See `quantized_decode_attention`."""
    keys = decoded(k, form.k_bits, -2, layer)
    values = decoded(v, form.v_bits, -1, layer)
    keys = keys.reshape(*keys.shape[:3], -1, shape.width)
    values = values.reshape(*values.shape[:4], shape.width)
    return decode_attention_reference(
        q.astype(jnp.float32), keys, values, pos, layer, shape, used, q_pos, span, bias
    )
