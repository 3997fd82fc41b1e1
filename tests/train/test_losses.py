"""Losses against NumPy, and that padding and teachers are not felt."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvjax.train import (
    binary_cross_entropy,
    cross_entropy,
    distillation,
    kl_divergence,
    language_modelling,
    squared_error,
    start,
    train_step,
    weighted_mean,
)  # fmt: skip

DRAW = np.random.default_rng(0)
LOGITS, OTHER = DRAW.standard_normal((2, 3, 5, 7)) * 2
TARGETS = DRAW.integers(0, 7, (3, 5))
WEIGHTS = np.array([[1, 0, 2, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], np.float32)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def average(values, weights):
    return (values * weights).sum() / weights.sum()


def test_cross_entropy():
    each = -np.take_along_axis(log_softmax(LOGITS), TARGETS[..., None], -1)[..., 0]
    found = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(WEIGHTS))
    assert float(found) == pytest.approx(average(each, WEIGHTS), rel=1e-5)
    assert float(cross_entropy(LOGITS, TARGETS)) == pytest.approx(each.mean(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_divergence(temperature):
    p, q = log_softmax(OTHER / temperature), log_softmax(LOGITS / temperature)
    each = (np.exp(p) * (p - q)).sum(-1) * temperature**2
    found = kl_divergence(LOGITS, OTHER, jnp.asarray(WEIGHTS), temperature)
    assert float(found) == pytest.approx(average(each, WEIGHTS), rel=1e-5)
    assert float(kl_divergence(LOGITS, LOGITS)) == pytest.approx(0.0, abs=1e-6)
    teacher = jax.grad(lambda t: kl_divergence(jnp.asarray(LOGITS), t))(jnp.asarray(OTHER))
    assert not teacher.any()


def test_squared_error_and_binary_cross_entropy():
    each = ((LOGITS - OTHER) ** 2).mean(-1)
    found = squared_error(jnp.asarray(LOGITS), jnp.asarray(OTHER), jnp.asarray(WEIGHTS))
    assert float(found) == pytest.approx(average(each, WEIGHTS), rel=1e-5)
    p = 1 / (1 + np.exp(-LOGITS))
    labels = OTHER > 0
    each = -np.where(labels, np.log(p), np.log(1 - p))
    found = binary_cross_entropy(jnp.asarray(LOGITS), jnp.asarray(labels))
    assert float(found) == pytest.approx(each.mean(), rel=1e-5)


def test_values_of_weight_zero_are_not_felt():
    values = jnp.array([1.0, jnp.nan, 3.0])
    assert float(weighted_mean(values, jnp.array([True, False, True]))) == 2.0
    assert float(weighted_mean(values, jnp.zeros(3))) == 0.0
    slope = jax.grad(lambda v: weighted_mean(v, jnp.array([1.0, 0.0, 3.0])))(values)
    assert slope.tolist() == [0.25, 0.0, 0.75]


def test_language_modelling_does_not_feel_padding(tiny):
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 4, 30)
    padded = jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=-1)
    loss = jax.jit(language_modelling())
    model = tiny
    one, two = (loss(model, {"tokens": t}, jax.random.key(0))[0] for t in (tokens, padded))
    assert float(one) == pytest.approx(float(two), rel=1e-5)


def test_distillation_trains_the_student_alone(tiny):
    worse = jax.tree.map(lambda x: x + 0.3 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), tiny)
    pair = {"student": worse, "teacher": tiny}
    optimizer = optax.adam(3e-3)
    state, frozen = start(pair, optimizer, jax.random.key(0), "^student")
    assert len(jax.tree.leaves(state.params)) == len(jax.tree.leaves(tiny))
    before = [np.asarray(x) for x in jax.tree.leaves(frozen)]
    step = train_step(distillation(temperature=2.0), optimizer)
    batch = {"tokens": jax.random.randint(jax.random.key(1), (4, 8), 4, 30)}
    losses = []
    for _ in range(30):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]
    assert all((a == b).all() for a, b in zip(before, jax.tree.leaves(frozen)))
