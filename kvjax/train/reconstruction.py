"""Layer-wise reconstruction: codecs learn to give back a frozen model's keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.codecs import PerKV
from kvjax.decode import positions_of
from kvjax.models.decoder import forward
from kvjax.train.trainer import Loss


def reconstruction(codecs: Mapping[str, PerKV]) -> Loss:
    """The loss of reading back, through each codec, the keys and values that went in.

        sum over codecs, layers of  mean |k - k'|^2 + mean |v - v'|^2,  x' = decode(encode(x))

    with gradients to the codecs' constants; rounding passes them straight through. Keys and values
    are those of the model alone, before rotary embedding (a rotation changes no length), so what
    one layer's codec gets wrong reaches no other layer, and several codecs trained together, on one
    forward pass, are trained as if each were alone.

    The model is {"base": Model, "constants": {name: {constant: [L, ...]}}}: train it with
    `trainable="^constants"` (or a part of them). The batch is {"tokens": int32 [B, T], -1 for
    padding at the end of rows}, T a multiple of the codecs' blocks.

    Args:
      codecs: by name; their constants lie under the same name.

    Returns:
      The loss; its metrics are "<name> k" and "<name> v", the squared errors of all layers over the
      squares of all keys (values).

    Source: CSKV, arXiv 2409.10593.
    """

    def loss(model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        tokens = batch["tokens"]
        positions = jnp.where(tokens >= 0, positions_of(tokens), -1)
        _, new = forward(model["base"], tokens, positions, phase="prefill", logits="none")
        valid = (positions >= 0)[None, :, None]
        total, metrics = jnp.zeros(()), {}
        for name, pair in codecs.items():
            for side in ("k", "v"):
                x = jax.lax.stop_gradient(getattr(new.kv, side)).astype(jnp.float32)
                error, size = _errors(getattr(pair, side), x, valid, model["constants"][name])
                count = jnp.maximum(valid.sum(), 1) * x.shape[2] * x.shape[4]
                total = total + jnp.sum(error) / count
                metrics[f"{name} {side}"] = jnp.sum(error) / jnp.sum(size)
        return total, metrics

    return loss


def _errors(codec: Any, x: Array, valid: Array, constants: Any) -> tuple[Array, Array]:
    """Squared errors and squares of x [L, B, H, T, D], summed by layer: [L] each."""
    full = jnp.broadcast_to(valid, x.shape[:-1])
    given = codec.pick(constants, x.shape[-1])
    y = codec.roundtrip(x, full, None, given)
    squares = (jnp.where(full[..., None], a, 0.0) ** 2 for a in (x - y, x))
    return tuple(jnp.sum(a, (1, 2, 3, 4)) for a in squares)
