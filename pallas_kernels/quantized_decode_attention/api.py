"""`quantized_decode_attention`: the public function that picks an implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial
from pallas_kernels.common import Implementation, check_dtypes, implementation_of, shape_of
from pallas_kernels.quantized_decode_attention.form import form_of
from pallas_kernels.quantized_decode_attention.reference import (
    quantized_decode_attention_reference,
)

# Tokens that share a key's scale, at most, on a TPU: 8 groups are unpacked at once.
GROUP = 128


def quantized_decode_attention(
    q: Array,
    k: dict[str, Array],
    v: dict[str, Array],
    pos: Array,
    layer: Array | int = 0,
    *,
    k_bits: int,
    v_bits: int,
    used: Array | int | None = None,
    q_pos: Array | None = None,
    span: Array | int | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of a few query rows over one layer of keys and values packed at 2, 4 or 8 bits.

    Keys are coded by channel (`quantize(k_bits, "channel", g)`), values by token
    (`quantize(v_bits, "token", g)`), arrays as these codecs make them. Codes are unpacked on chip,
    never in memory. On a TPU the scales of keys go into the queries and those of values into the
    weights, so that the matrix units see plain codes; on a GPU, whose products have at least 16
    rows, a scale is applied in registers.

    Args:
      q: [B, Hq, T, D], rotated and scaled.
      k: codes uint8 [L, B, H, U, g b/8, D], scale and min [L, B, H, U, D]; unit u holds the tokens
        of slots u g to u g + g - 1.
      v: codes uint8 [L, B, H, N, D b/8], scale and min [L, B, H, N, D/g].
      k_bits, v_bits: 2, 4 or 8.
      pos, layer, used, q_pos, span, softcap, bias, implementation, interpret: as in
        `decode_attention`; what k, v and pos have beyond the shortest of them is not read.

    Returns:
      Partial over [B, Hq, T], float32. No gradient is defined for the kernels.

    Raises:
      ValueError: shapes that do not fit, or what the implementation does not take.

    Source of the form: KIVI, arXiv 2402.02750.

    >>> import jax, numpy as np
    >>> from kvjax.codecs import quantize
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 1, 2, 64, 32)) for i in range(3))
    >>> keys, values = quantize(8, "channel", 32), quantize(8, "token", 32)
    >>> pos = jnp.arange(64)[None, None, None]
    >>> part = quantized_decode_attention(
    ...     q[0, :, :, :1], keys.encode(k), values.encode(v), pos, k_bits=8, v_bits=8
    ... )
    >>> out = jax.nn.softmax(q[0, :, :, :1] @ k[0].mT) @ v[0]
    >>> np.testing.assert_allclose(part.out, out, atol=0.03)
    """
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}: expected [B, Hq, T, D]")
    form, lead, slots = form_of(k, v, k_bits, v_bits, q.shape[3])
    implementation = implementation_of(implementation)
    check_dtypes(implementation, q=q)
    if implementation == "tpu" and form.k_group > GROUP:
        raise ValueError(
            f"k has groups of {form.k_group} tokens: implementation='tpu' takes up to {GROUP}"
        )
    shape = shape_of(q, lead, slots, pos, bias, softcap, q_pos, span)
    args = (q, k, v, pos, jnp.asarray(layer, jnp.int32), shape, form, used, q_pos, span, bias)
    if implementation == "reference":
        return quantized_decode_attention_reference(*args)
    if implementation == "tpu":
        from pallas_kernels.quantized_decode_attention.tpu import quantized_decode_attention_tpu

        return quantized_decode_attention_tpu(*args, interpret)
    from pallas_kernels.quantized_decode_attention.gpu import quantized_decode_attention_gpu

    return quantized_decode_attention_gpu(*args, interpret)
