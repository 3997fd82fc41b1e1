"""What each attention layer's positions mean: rotary frequencies and sliding windows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.types import Rope


def rope_of(config: Any, length: int) -> Rope:
    """Rotary frequencies of all attention layers, for sequences of up to `length` tokens."""
    table = []
    for layer in config.attention_layers:
        rule = config.rope
        if config.local_rope is not None and config.window(layer) is not None:
            rule = config.local_rope
        found, factor = rule.frequencies(config.rotated, config.max_length, length)
        rotated = layer not in config.unrotated  # angles of zero elsewhere
        table.append((found, factor) if rotated else (np.zeros_like(found), 1.0))
    freq = np.asarray([f for f, _ in table], np.float32).reshape(len(table), config.rotated // 2)
    return Rope(jnp.asarray(freq), jnp.asarray([s for _, s in table], jnp.float32))


def span_of(config: Any) -> Array:
    """How many positions back each attention layer sees, int32 [L]; a huge number where all."""
    huge = jnp.iinfo(jnp.int32).max // 2
    return jnp.asarray([config.window(i) or huge for i in config.attention_layers], jnp.int32)
