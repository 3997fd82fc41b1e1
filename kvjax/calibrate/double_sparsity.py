"""The order of channels that `kvjax.compress.double_sparsity` reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import rope_of, rotate
from kvjax.calibrate.base import calibration
from kvjax.compress.double_sparsity import ORDER
from kvjax.compress.double_sparsity import double_sparsity as method
from kvjax.decode import positions_of
from kvjax.models import forward


def channels_by_score(model: Any, batches: Iterable[Array], score: str = "qk") -> dict[str, Array]:
    """{"double_sparsity_channels": int32 [L, 1, Hq, D]}: channels by descending score.

    Args:
      batches: tokens, int32 [B, T] each.
      score: as of the method.
    """
    total = None
    for tokens in batches:
        more = _sums(model, jnp.asarray(tokens), score)
        total = jax.block_until_ready(more if total is None else jax.tree.map(jnp.add, total, more))
    q, k = total
    order = jnp.argsort(-(q * k), -1, stable=True).astype(jnp.int32)
    return {ORDER: order[:, None]}


@functools.partial(jax.jit, static_argnames="score")
def _sums(model: Any, tokens: Array, score: str) -> tuple[Array, Array]:
    """Two sums over tokens, float32 [L, Hq, D], whose product is the score; 1 where one is all."""
    pos = positions_of(tokens)
    _, new = forward(model, tokens, pos, phase="prefill", logits="none", statistics=True)
    rope = rope_of(model.config, tokens.shape[1])
    q, k = new.seen.q, new.kv.k
    if score == "q":
        q = rotate(q, pos[:, None], rope, inverse=True)
    elif score != "k":
        k = rotate(k, new.kv.pos, rope)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)  # for every query head its own
    q, k = (jnp.abs(x.astype(jnp.float32)) for x in (q, k))
    if score == "qk":
        q, k = q * k, jnp.ones_like(k[:, :1, :, :1])
    total = lambda x: jnp.sum(x, (1, 3))  # noqa: E731
    ones = jnp.ones(q.shape[:1] + q.shape[2:3] + q.shape[4:])
    sums = {"qk": (total(q), ones), "q": (total(q), ones), "k": (ones, total(k))}
    return sums.get(score, (total(q), total(k)))


double_sparsity = calibration(method, (ORDER,), channels_by_score, reads=("score",))
