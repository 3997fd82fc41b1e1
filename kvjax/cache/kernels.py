"""The one switch between plain XLA and the Pallas kernels, and where the kernels apply.

`Cache.kernels` says which implementation attention over held tokens has; it is static, so that
equal caches compile once. Where a kernel does not apply the plain form is used, silently: results
differ by rounding only. Kernels apply to

  - a few new rows (at most 16: decoding, verification), not to prompts;
  - float32 and bfloat16 buffers of keys that are stored rotated: exact ones of any stage, and a
    store of `quantize(2 | 4 | 8, "channel", g)` keys (g up to 128) and `quantize(2 | 4 | 8,
    "token", g)` values, not symmetric;

and not to keys stored before rotation, other codecs, pools (heads of unlike budgets), readers, host
memory, shared prefixes, or where gradients are asked for.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.buffer import FEW
from kvjax.cache.types import KV, Partial, Query
from kvjax.codecs import Dense, Quantize

Kernels = Literal["xla", "tpu", "gpu", "interpret"]
KERNELS = ("xla", "tpu", "gpu", "interpret")


def check_kernels(kernels: str) -> None:
    """Raises ValueError for a name that is none of `KERNELS`."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: expected one of {', '.join(KERNELS)}")


def _how(query: Query) -> dict[str, Any]:
    """Arguments of either kernel."""
    interpret = query.kernels == "interpret"
    how = {"implementation": "tpu" if interpret else query.kernels, "interpret": interpret}
    if query.window:
        how |= {"q_pos": query.pos, "span": query.span}
    return {**how, "softcap": query.softcap}


def _few(query: Query) -> bool:
    rows = query.pos.shape[1]
    return query.kernels != "xla" and not query.differentiable and rows <= FEW


def _takes(*arrays: Array) -> bool:
    return all(x.dtype in (jnp.float32, jnp.bfloat16) for x in arrays)


def attend_exact(
    query: Query, q: Array, kv: KV, layer: Array, used: Array | None
) -> Partial | None:
    """Attention of rows q [B, Hq, T, D] over an exact buffer by a kernel; None: it does not apply.

    Args:
      kv: k, v [L, B, H, N, D], keys rotated.
      used: int32 scalar, [B] or [B, H or 1]: slots from there on do not count.
    """
    if not _few(query) or not _takes(q, kv.k, kv.v) or kv.size == 0:
        return None
    from pallas_kernels import decode_attention

    return decode_attention(
        q, kv.k, kv.v, kv.pos, layer, used=used, bias=kv.extra.get("bias"), **_how(query)
    )


def attend_stored(
    query: Query, stage: Any, state: Any, layer: Array, coded: Array
) -> Partial | None:
    """The same over the units of a store, the first `coded` [B, H or 1] tokens of each head.

    Returns:
      Partial over the grouped rows, [B, H, G * T]; None: no kernel applies.
    """
    pair, spec, bias = stage.codec, state.spec, state.extra.get("bias")
    if stage.host or stage.reader is not None or spec.unrotated or spec.totals is not None:
        return None
    if isinstance(pair.k, Dense) and isinstance(pair.v, Dense):
        held = KV(state.k, state.v, state.pos, state.extra)
        done = attend_exact(query, query.q, held, layer, coded)
    elif _few(query) and _takes(query.q) and _packed(pair.k, pair.v):
        from pallas_kernels import quantized_decode_attention

        done = quantized_decode_attention(
            query.q, state.k, state.v, state.pos, layer, k_bits=pair.k.code_bits,
            v_bits=pair.v.code_bits, used=coded, bias=bias, **_how(query),
        )  # fmt: skip
    else:
        return None
    if done is None:
        return None
    group = lambda x: x.reshape(x.shape[0], spec.kv_heads, -1, *x.shape[3:])  # noqa: E731
    return jax.tree.map(group, done)


def _packed(k: Any, v: Any) -> bool:
    if not all(isinstance(c, Quantize) and c.code_bits in (2, 4, 8) for c in (k, v)):
        return False
    if k.symmetric or v.symmetric:
        return False
    return k.axis == "channel" and v.axis == "token" and k.group <= 128
