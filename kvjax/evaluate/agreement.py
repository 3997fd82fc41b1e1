"""How far one model's predictions are from another's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


@jax.jit
def agreement(logits: Array, reference: Array) -> tuple[Array, Array]:
    """Compares predictions position by position.

    Args:
      logits, reference: [..., V].

    Returns:
      (KL divergence of the prediction from the reference in nats, float32 [...]; whether the most
      probable tokens are the same, bool [...]).
    """
    p = jax.nn.log_softmax(reference.astype(jnp.float32), -1)
    q = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    divergence = jnp.sum(jnp.exp(p) * (p - q), -1)
    return divergence, jnp.argmax(p, -1) == jnp.argmax(q, -1)
