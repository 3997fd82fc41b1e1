"""Masked diffusion: the loss that LLaDA is trained with, and the likelihood that it bounds."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.models.decoder import forward
from kvjax.train.losses import token_losses
from kvjax.train.trainer import Loss


def corrupt(
    key: Array, tokens: Array, answer: Array, mask_token: int, *,
    smallest: float = 1e-3, stratified: bool = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Masks each token of the answer with a probability drawn once per row.

    Args:
      tokens: int32 [B, N]. answer: bool [B, N], what may be masked.
      smallest: the probability is (1 - smallest) * t + smallest, t uniform in (0, 1).
      stratified: spread t evenly over the rows of a batch (each remains uniform): less noise.

    Returns:
      (tokens with `mask_token` in places, bool [B, N] which, float32 [B] the probabilities).
    """
    rows = tokens.shape[0]
    one, two = jax.random.split(key)
    if stratified:
        t = (jax.random.uniform(one) + jnp.arange(rows) / rows) % 1.0
    else:
        t = jax.random.uniform(one, (rows,))
    p = (1.0 - smallest) * t + smallest
    masked = (jax.random.uniform(two, tokens.shape) < p[:, None]) & answer
    return jnp.where(masked, mask_token, tokens), masked, p


def predict(
    model: Any, tokens: Array, positions: Array, *, shift: bool = False, remat: bool = False
) -> Array:
    """Logits float32 [B, N, V] of the token in each place, all places seen.

    Args:
      shift: the model was a causal one: what stands at place i is predicted at i - 1 (Dream); the
        first place has no prediction, its logits are those of the last.
    """
    logits, _ = forward(
        model, tokens, positions, phase="prefill", mask="full", differentiable=True, remat=remat
    )
    return jnp.roll(logits, 1, axis=1) if shift else logits


def masked_diffusion(
    *, mask_token: int | None = None, smallest: float = 1e-3, crop: float = 0.0,
    stratified: bool = False, shift: bool = False, remat: bool = False,
) -> Loss:  # fmt: skip
    """The training loss of masked-diffusion models, an upper bound on -log p(answer | prompt).

    Each row draws t, each token of its answer is masked with probability p(t), and the loss is
    the mean over rows of (sum over masked tokens of their cross-entropy / p) / answer length, in
    nats per token.

    The batch is {"tokens": int32 [B, N], -1 for padding}, with "answer" bool [B, N] for supervised
    fine-tuning: the prompt is never masked, and an answer's <eos> padding is part of it. Without
    "answer" every token is one (pre-training).

    Args:
      mask_token: None: that of the model's configuration.
      smallest, stratified: see `corrupt`. shift, remat: see `predict`.
      crop: probability of cutting the batch to a length drawn from 1 to N, so that all lengths
        are seen (LLaDA's pre-training: 0.01). Shapes stay, the rest becomes padding.

    Returns:
      The loss; its metrics are "masked_loss" (mean cross-entropy of masked tokens), "accuracy"
      (of their most likely token) and "masked" (share of the answers).

    Raises:
      ValueError: neither the argument nor the model names a mask token; crop out of [0, 1].

    Source: Large Language Diffusion Models (LLaDA), arXiv 2502.09992, equations 3 and 5, and its
    guidelines; stratified t: Simple and Effective Masked Diffusion Language Models, 2406.07524.
    """
    if not 0.0 <= crop <= 1.0:
        raise ValueError(f"crop={crop}: expected a probability")

    def loss(model: Any, batch: dict[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        tokens = batch["tokens"]
        noise, cut, length = (jax.random.fold_in(key, i) for i in range(3))
        valid = tokens >= 0
        if crop:
            most = jax.random.randint(length, (), 1, tokens.shape[1] + 1)
            most = jnp.where(jax.random.bernoulli(cut, crop), most, tokens.shape[1])
            valid &= jnp.arange(tokens.shape[1]) < most
        answer = valid & batch.get("answer", True)
        noisy, masked, p = corrupt(
            noise, tokens, answer, mask_of(model, mask_token),
            smallest=smallest, stratified=stratified,
        )  # fmt: skip
        positions = jnp.where(valid, jnp.arange(tokens.shape[1]), -1)
        logits = predict(model, noisy, positions, shift=shift, remat=remat)
        each = jnp.where(masked, token_losses(logits, tokens), 0.0)
        right = masked & (jnp.argmax(logits, -1) == tokens)
        size, hidden = jnp.sum(answer, 1), jnp.sum(masked)
        metrics = {
            "masked_loss": jnp.sum(each) / jnp.maximum(hidden, 1),
            "accuracy": jnp.sum(right) / jnp.maximum(hidden, 1),
            "masked": hidden / jnp.maximum(jnp.sum(size), 1),
        }
        return jnp.mean(jnp.sum(each, 1) / p / jnp.maximum(size, 1)), metrics

    return loss


@functools.partial(jax.jit, static_argnames=("draws", "mask_token", "shift"))
def log_likelihood(
    model: Any, tokens: Array, answer: Array, key: Array, *,
    draws: int = 128, mask_token: int | None = None, shift: bool = False,
) -> Array:  # fmt: skip
    """A Monte-Carlo estimate of a lower bound on log p(answer | prompt).

    Each draw masks an exact number x of the answer's A tokens, a random subset, and gives
    A / x times the log-probability of what it masks; the draws' x are spread evenly over 1..A
    from a random start, which has less variance than masking with probability t.

    Args:
      tokens: int32 [B, N], -1: padding. answer: bool [B, N]. draws: forward passes of B rows.
      mask_token, shift: as in `masked_diffusion`.

    Returns:
      float32 [B], in nats; 0 for an empty answer.

    Source: Large Language Diffusion Models (LLaDA), arXiv 2502.09992, equation 6.
    """
    valid = tokens >= 0
    answer = answer & valid
    size = jnp.sum(answer, 1)
    mask_token = mask_of(model, mask_token)
    positions = jnp.where(valid, jnp.arange(tokens.shape[1]), -1)
    first, subset = jax.random.split(key)
    start = jnp.floor(jax.random.uniform(first, size.shape) * size)  # 0 .. A - 1

    def draw(total: Array, number: Array) -> tuple[Array, None]:
        step = jnp.floor(number * size / draws)
        count = ((start + step) % jnp.maximum(size, 1) + 1).astype(jnp.int32)
        order = jax.random.uniform(jax.random.fold_in(subset, number), tokens.shape)
        order = jnp.where(answer, order, 2.0)
        rank = jnp.argsort(jnp.argsort(order, 1), 1)
        masked = (rank < count[:, None]) & answer
        logits = predict(model, jnp.where(masked, mask_token, tokens), positions, shift=shift)
        each = jnp.where(masked, token_losses(logits, tokens), 0.0)
        return total - jnp.sum(each, 1) * size / count, None

    zero = jnp.zeros(size.shape, jnp.float32)
    return jax.lax.scan(draw, zero, jnp.arange(draws))[0] / draws


def mask_of(model: Any, mask_token: int | None = None) -> int:
    """The mask token: the one given, else the model's.

    Raises:
      ValueError: there is none.
    """
    found = model.config.mask_token if mask_token is None else mask_token
    if found is None:
        raise ValueError(
            "mask_token=None, and the model's configuration names none: give the id of the mask"
        )
    return found
