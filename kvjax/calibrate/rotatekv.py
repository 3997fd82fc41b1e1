"""The order of channels that `kvjax.compress.rotatekv` reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.calibrate.base import calibration
from kvjax.codecs.heads import join, rotate_heads
from kvjax.compress.rotatekv import ORDER
from kvjax.compress.rotatekv import rotatekv as method
from kvjax.decode import positions_of
from kvjax.models import forward


def order_of_means(
    model: Any, batches: Iterable[Array], heads: int = 4, **_: Any
) -> dict[str, Array]:
    """{"rotatekv_order": int32 [L, 1, H, D]}: rotated channels by ascending signed mean.

    Args:
      batches: tokens, int32 [B, T] each.
      heads: rotated together; no other argument of the method changes the order.
    """
    total = None
    for tokens in batches:
        more = _sum(model, jnp.asarray(tokens), heads)
        total = jax.block_until_ready(more if total is None else total + more)
    order = jnp.argsort(total, -1, stable=True).astype(jnp.int32)
    return {ORDER: order.reshape(len(order), 1, model.config.kv_heads, model.config.head_dim)}


@functools.partial(jax.jit, static_argnames="heads")
def _sum(model: Any, tokens: Array, heads: int) -> Array:
    """The sum over tokens of rotated keys, float32 [L, H D]."""
    _, new = forward(model, tokens, positions_of(tokens), phase="prefill", logits="none")
    return jnp.sum(join(rotate_heads(heads).forward(new.kv.k))[:, :, 0], (1, 2))


rotatekv = calibration(method, (ORDER,), order_of_means)
