"""`decode_attention`: the public function that picks an implementation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.types import Partial
from pallas_kernels.common import Implementation, check_dtypes, implementation_of, shape_of
from pallas_kernels.decode_attention.reference import decode_attention_reference


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    pos: Array,
    layer: Array | int = 0,
    *,
    used: Array | int | None = None,
    q_pos: Array | None = None,
    span: Array | int | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    implementation: Implementation | None = None,
    interpret: Any = False,
) -> Partial:
    """Attention of a few query rows over one layer of a stacked buffer of exact keys and values.

    The rows of all query heads of one key-value head form one matrix: nothing is repeated. Blocks
    of slots at and past `used` are not read, so the cost follows what is held; which layer is read
    is data, so no layer is sliced out of the buffer.

    Args:
      q: [B, Hq, T, D], rotated and scaled: logits are q.k. Up to 256 rows Hq / H * T.
      k, v: [L, B, H, N, D]; what k, v and pos have beyond the shortest of them is not read.
      pos: int32 [L or 1, B, H or 1, N], position of the token in each slot; -1: empty.
      layer: int32 scalar.
      used: int32 scalar, [B] or [B, H or 1]: slots from there on do not count, whatever they hold;
        None: N.
      q_pos, span: int32 [B, T] and scalar; with both, a row sees keys with q_pos - pos < span.
      softcap: c of c tanh(x / c) on logits.
      bias: float32 [L, B, H, N], added to the logits.
      implementation: "reference" (plain JAX, any backend), "tpu", "gpu"; None: that of the default
        backend, "reference" on CPU.
      interpret: runs a kernel on any backend: True, or `pltpu.InterpretParams` for "tpu".

    Returns:
      Partial over [B, Hq, T], float32. No gradient is defined for the kernels.

    Raises:
      ValueError: shapes that do not fit, or what the implementation does not take.

    >>> import jax, numpy as np
    >>> q, k, v = (jax.random.normal(jax.random.key(i), (1, 2, 64, 16)) for i in range(3))
    >>> part = decode_attention(q[:, :, :1], k[None], v[None], jnp.arange(64)[None, None, None])
    >>> out = jax.nn.softmax(q[:, :, :1] @ k.mT) @ v
    >>> np.testing.assert_allclose(part.out, out, atol=2e-6)
    """
    if k.ndim != 5 or v.shape != (*k.shape[:3], *v.shape[3:4], k.shape[4]):
        raise ValueError(f"k has shape {k.shape}, v {v.shape}: expected [L, B, H, N, D] for both")
    if q.ndim == 4 and q.shape[3] != k.shape[4]:
        raise ValueError(f"q has {q.shape[3]} channels, k {k.shape[4]}")
    implementation = implementation_of(implementation)
    check_dtypes(implementation, q=q, k=k, v=v)
    shape = shape_of(q, k.shape[:3], min(k.shape[3], v.shape[3]), pos, bias, softcap, q_pos, span)
    args = (q, k, v, pos, jnp.asarray(layer, jnp.int32), shape, used, q_pos, span, bias)
    if implementation == "reference":
        return decode_attention_reference(*args)
    if implementation == "tpu":
        from pallas_kernels.decode_attention.tpu import decode_attention_tpu

        return decode_attention_tpu(*args, interpret)
    from pallas_kernels.decode_attention.gpu import decode_attention_gpu

    return decode_attention_gpu(*args, interpret)
