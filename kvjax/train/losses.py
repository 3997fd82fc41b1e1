"""Losses on logits and hidden states, each a weighted mean; and language modelling with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from kvjax.models.decoder import forward
from kvjax.train.trainer import Loss


def weighted_mean(values: Array, weights: Array | None) -> Array:
    """Mean of values where weights (bool or >= 0, same shape) say; 0 if they are 0 everywhere."""
    if weights is None:
        return jnp.mean(values)
    weights = weights.astype(jnp.float32)
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights > 0, values, 0.0) * weights) / jnp.where(total > 0, total, 1.0)


def token_losses(logits: Array, targets: Array) -> Array:
    """Cross-entropy of each token in nats: logits [..., V], int targets [...] -> float32 [...].

    Targets below 0 (padding) count as token 0: leave them out by a weight.
    """
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))


def cross_entropy(logits: Array, targets: Array, weights: Array | None = None) -> Array:
    """Mean cross-entropy in nats per token: logits [..., V], targets and weights [...]."""
    return weighted_mean(token_losses(logits, targets), weights)


def kl_divergence(
    student: Array, teacher: Array, weights: Array | None = None, temperature: float = 1.0
) -> Array:
    """Mean KL(teacher || student) in nats, times temperature ** 2, of logits [..., V].

    The factor keeps gradients of one size over temperatures. No gradient reaches the teacher.

    Source: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """
    p, q = (
        jax.nn.log_softmax(x.astype(jnp.float32) / temperature, -1)
        for x in (jax.lax.stop_gradient(teacher), student)
    )
    return temperature**2 * weighted_mean(jnp.sum(jnp.exp(p) * (p - q), -1), weights)


def squared_error(x: Array, target: Array, weights: Array | None = None) -> Array:
    """Mean over rows of the mean squared difference of vectors [..., D]; weights [...]."""
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    return weighted_mean(jnp.mean(jnp.square(x - target), -1), weights)


def binary_cross_entropy(logits: Array, labels: Array, weights: Array | None = None) -> Array:
    """Mean cross-entropy of yes-no predictions in nats: logits, labels (bool) and weights [...]."""
    losses = optax.sigmoid_binary_cross_entropy(
        logits.astype(jnp.float32), labels.astype(jnp.float32)
    )
    return weighted_mean(losses, weights)


def language_modelling(remat: bool = False) -> Loss:
    """The loss of predicting each next token.

    The batch is {"tokens": int32 [B, T], -1 for padding at the end of rows}, optionally with
    "weights" [B, T] on tokens as targets.

    Args:
      remat: see `forward`.
    """

    def loss(model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        tokens = batch["tokens"]
        logits = _next_logits(model, tokens, remat)
        targets, weights = tokens[:, 1:], _target_weights(batch)
        right = jnp.argmax(logits, -1) == targets
        return cross_entropy(logits, targets, weights), {"accuracy": weighted_mean(right, weights)}

    return loss


def distillation(temperature: float = 1.0, remat: bool = False) -> Loss:
    """The loss of predicting what a teacher predicts, for every next token.

    The model is {"student": Model, "teacher": Model}: train it with `trainable="^student"`. The
    batch is that of `language_modelling`.

    Source: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """

    def loss(model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        tokens, weights = batch["tokens"], _target_weights(batch)
        student = _next_logits(model["student"], tokens, remat)
        teacher = jax.lax.stop_gradient(_next_logits(model["teacher"], tokens, False))
        same = jnp.argmax(student, -1) == jnp.argmax(teacher, -1)
        value = kl_divergence(student, teacher, weights, temperature)
        return value, {"agreement": weighted_mean(same, weights)}

    return loss


def _next_logits(model: Any, tokens: Array, remat: bool) -> Array:
    positions = jnp.where(tokens >= 0, jnp.arange(tokens.shape[1]), -1)
    logits, _ = forward(model, tokens, positions, phase="prefill", differentiable=True, remat=remat)
    return logits[:, :-1]


def _target_weights(batch: dict[str, Array]) -> Array:
    tokens = batch["tokens"]
    weights = batch.get("weights", jnp.ones(tokens.shape, jnp.float32))
    return jnp.where(tokens >= 0, weights, 0.0)[:, 1:]
