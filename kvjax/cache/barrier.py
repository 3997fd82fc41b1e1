"""A barrier between what computes an array and what uses it, for XLA on CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def computed(x: Array) -> Array:
    """x (floating), equal in every bit; XLA computes it once, before what uses it.

    Otherwise XLA on CPU fuses what computes x into what uses it, and so computes it again for
    every use of an element: the cosines of rotary embedding for every head, the input of a product
    for every output. (`optimization_barrier` is dropped there before fusion.) A quotient is not
    fused so, and XLA does not know that the divisor is 1.
    """
    bits = jax.lax.stop_gradient(x).astype(jnp.float32).view(jnp.int32)
    one = 1 + jnp.minimum(bits & 0x7FFFFFFF, 0)
    return x / one.astype(x.dtype)
