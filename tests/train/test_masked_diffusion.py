"""LLaDA's loss stated again in NumPy, and the bound that it estimates by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.data.list_operations import MASK
from kvjax.models import forward
from kvjax.train import corrupt, log_likelihood, masked_diffusion, start, train_step
from tests.train.conftest import CONFIG, SOURCE

KEY = jax.random.key(3)
EXAMPLES = [SOURCE[i] for i in range(6)]
TOKENS = np.stack([e["tokens"] for e in EXAMPLES])
ANSWER = np.stack([e["answer"] for e in EXAMPLES])
RAGGED = TOKENS.copy()
RAGGED[0, -3:] = RAGGED[2, -1:] = -1


@jax.jit
def network(model, tokens, positions):
    return forward(model, tokens, positions, mask="full")[0]


def log_probability(model, noisy, tokens):
    """log p of each token in its place, [B, N], by the model's plain forward pass."""
    valid = tokens >= 0
    positions = np.where(valid, np.arange(tokens.shape[1]), -1)
    logits = np.asarray(network(model, np.where(valid, noisy, 0), positions), np.float64)
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, np.maximum(tokens, 0)[..., None], -1)[..., 0]


def test_corruption_is_as_often_as_it_says():
    tokens = jnp.full((4000, 12), 9)
    answer = jnp.arange(12) >= 4
    for stratified in (False, True):
        noisy, masked, p = corrupt(
            KEY, tokens, jnp.broadcast_to(answer, tokens.shape), MASK, stratified=stratified
        )
        assert not masked[:, :4].any() and ((noisy == MASK) == masked).all()
        assert (noisy[~masked] == 9).all()
        assert float(p.min()) >= 1e-3 and float(p.max()) <= 1.0
        assert abs(float(p.mean()) - 0.5) < (1e-3 if stratified else 0.02)
        share = np.asarray(masked[:, 4:].mean(1))
        error = (share - np.asarray(p)) / np.sqrt(np.asarray(p * (1 - p)) / 8 + 1e-9)
        assert abs(error.mean()) < 0.1 and 0.9 < error.std() < 1.1
        spread = np.sort(np.asarray(p))
        if stratified:  # one in each of 4000 equal parts
            assert np.abs(np.diff(spread) - 1 / 4000).max() < 1e-4


@pytest.mark.parametrize("supervised", [False, True])
def test_loss_is_the_formula(tiny, supervised):
    """The masks are those of `corrupt`; all else is NumPy."""
    batch = {"tokens": jnp.asarray(RAGGED)}
    may = RAGGED >= 0
    if supervised:
        batch["answer"] = jnp.asarray(ANSWER)
        may &= ANSWER
    value, metrics = jax.jit(masked_diffusion())(tiny, batch, KEY)
    draw = jax.random.fold_in(KEY, 0)
    noisy, masked, p = map(np.asarray, corrupt(draw, jnp.asarray(RAGGED), jnp.asarray(may), MASK))
    ce = -log_probability(tiny, noisy, RAGGED)
    expected = np.mean([
        (ce[b] * masked[b]).sum() / p[b] / may[b].sum() for b in range(len(RAGGED))
    ])  # fmt: skip
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["masked_loss"]) == pytest.approx(ce[masked].mean(), rel=1e-5)
    assert float(metrics["masked"]) == pytest.approx(masked.sum() / may.sum(), rel=1e-6)


def test_a_uniform_model_loses_log_v(tiny):
    blank = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "head" in jax.tree_util.keystr(path) else x, tiny
    )
    loss = jax.jit(masked_diffusion(stratified=True))
    batch = {"tokens": jnp.tile(jnp.asarray(TOKENS), (40, 1))}
    value = np.mean([float(loss(blank, batch, jax.random.key(i))[0]) for i in range(8)])
    assert value == pytest.approx(np.log(CONFIG.vocab_size), rel=0.05)


def test_crop_leaves_a_prefix(tiny):
    """With crop=1 and one token kept in some draw, the loss is that of a shorter batch."""
    loss = jax.jit(masked_diffusion(crop=1.0))
    batch = {"tokens": jnp.asarray(TOKENS)}
    for seed in range(3):
        key = jax.random.key(seed)
        value, _ = loss(tiny, batch, key)
        length = int(jax.random.randint(jax.random.fold_in(key, 2), (), 1, TOKENS.shape[1] + 1))
        cut = np.where(np.arange(TOKENS.shape[1]) < length, TOKENS, -1)
        same, _ = jax.jit(masked_diffusion())(tiny, {"tokens": jnp.asarray(cut)}, key)
        assert float(value) == pytest.approx(float(same), rel=1e-6)


def bound(model, tokens, answer):
    """The bound by enumeration: mean over x of the mean over subsets of x masks, A / x each."""
    places = np.flatnonzero(answer)
    total = 0.0
    for count in range(1, len(places) + 1):
        subsets = list(itertools.combinations(places, count))
        rows = np.tile(tokens, (len(subsets), 1))
        masked = np.zeros_like(rows, bool)
        for row, subset in zip(masked, subsets):
            row[list(subset)] = True
        lp = log_probability(model, np.where(masked, MASK, rows), rows)
        total += (lp * masked).sum(1).mean() * len(places) / count
    return total / len(places)


def test_likelihood_is_the_enumerated_bound_and_the_loss_estimates_it(tiny):
    tokens, answer = TOKENS[:2], ANSWER[:2]
    exact = [bound(tiny, t, a) for t, a in zip(tokens, answer)]
    found = log_likelihood(tiny, jnp.asarray(tokens), jnp.asarray(answer), KEY, draws=600)
    np.testing.assert_allclose(found, exact, rtol=0.02)
    loss = jax.jit(masked_diffusion(stratified=True, smallest=1e-6))
    batch = {"tokens": jnp.tile(tokens, (64, 1)), "answer": jnp.tile(answer, (64, 1))}
    values = [float(loss(tiny, batch, jax.random.key(i))[0]) for i in range(24)]
    error = np.std(values) / np.sqrt(len(values))
    assert error < 0.03 * np.mean(values)
    assert abs(np.mean(values) + np.mean(exact) / answer[0].sum()) < 4 * error


def test_likelihood_of_one_token_is_its_log_probability(tiny):
    answer = np.zeros_like(ANSWER)
    answer[:, 8] = True
    exact = log_probability(tiny, np.where(answer, MASK, TOKENS), TOKENS)[:, 8]
    found = log_likelihood(tiny, jnp.asarray(TOKENS), jnp.asarray(answer), KEY, draws=2)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    none = log_likelihood(tiny, jnp.asarray(TOKENS), jnp.zeros_like(answer), KEY, draws=2)
    assert not none.any()


def test_remat_changes_memory_not_gradients(tiny):
    batch = {"tokens": jnp.asarray(TOKENS)}
    slopes = []
    for remat in (False, True):
        loss = masked_diffusion(remat=remat)
        slopes.append(jax.jit(jax.grad(lambda m, loss=loss: loss(m, batch, KEY)[0]))(tiny))
    for a, b in zip(*map(jax.tree.leaves, slopes)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_shift_reads_the_place_before(tiny):
    plain, shifted = (masked_diffusion(shift=s) for s in (False, True))
    answer = np.zeros_like(ANSWER)
    answer[:, 7:] = True
    batch = {"tokens": jnp.asarray(TOKENS), "answer": jnp.asarray(answer)}
    value, metrics = jax.jit(shifted)(tiny, batch, KEY)
    draw = jax.random.fold_in(KEY, 0)
    noisy, masked, _ = map(np.asarray, corrupt(draw, jnp.asarray(TOKENS), answer, MASK))
    ahead = np.concatenate([TOKENS[:, 1:], TOKENS[:, :1]], 1)
    ce = -np.roll(log_probability(tiny, noisy, ahead), 1, axis=1)
    assert float(metrics["masked_loss"]) == pytest.approx(ce[masked].mean(), rel=1e-5)
    assert float(value) != pytest.approx(float(plain(tiny, batch, KEY)[0]), rel=1e-3)


def test_refused(tiny):
    import dataclasses

    from kvjax.models.llama import Model, flatten

    with pytest.raises(ValueError, match=r"crop=1\.5"):
        masked_diffusion(crop=1.5)
    causal = Model(dataclasses.replace(CONFIG, mask_token=None), flatten(tiny))
    with pytest.raises(ValueError, match="mask_token=None"):
        masked_diffusion()(causal, {"tokens": jnp.asarray(TOKENS)}, KEY)


def test_a_few_steps_learn_a_batch(tiny):
    import optax

    optimizer = optax.adam(1e-2)
    state, frozen = start(tiny, optimizer, KEY)
    step = train_step(masked_diffusion(stratified=True), optimizer)
    batch = {"tokens": jnp.asarray(TOKENS), "answer": jnp.asarray(ANSWER)}
    losses = []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["masked_loss"]))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
