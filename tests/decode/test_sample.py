"""Samplers and processors against plain NumPy statements of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.decode import Sampler, greedy, processors, repetition_penalty

VOCAB, ROWS = 11, 3


@functools.partial(jax.jit, static_argnames="sampler")
def filtered(sampler, logits):
    return sampler.filter(logits)


@functools.partial(jax.jit, static_argnames="sampler")
def draw(sampler, logits, key):
    return sampler(logits, key)


def allowed(x, temperature, top_k, top_p, min_p):
    """bool [V]: which tokens may be drawn. Ties at the k-th probability all stay."""
    x = x.astype(np.float64) / temperature
    ok = np.ones(len(x), bool)
    if top_k:
        ok &= x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    p = np.exp(x - x[ok].max()) * ok
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        if np.any(np.abs(before - top_p) < 1e-5):
            return None  # too close to call in float32
        ok &= np.isin(np.arange(len(x)), order[before < top_p])
    if min_p:
        ratio = p / p.max()
        if np.any(np.abs(ratio - min_p) < 1e-5):
            return None
        ok &= ratio >= min_p
    return ok


SAMPLERS = [
    dict(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in [
        (1.0, 0, 1.0, 0.0), (0.5, 3, 1.0, 0.0), (1.0, 0, 0.6, 0.0), (2.0, 0, 1.0, 0.3),
        (0.7, 5, 0.8, 0.1), (1.0, 50, 0.01, 0.0), (1.3, 1, 1.0, 0.9),
    ]
]  # fmt: skip


@pytest.mark.parametrize("how", SAMPLERS, ids=str)
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_filters(how, seed):
    logits = (np.random.default_rng(seed).normal(size=(ROWS, VOCAB)) * 2).astype(np.float32)
    out = np.asarray(filtered(Sampler(**how), logits))
    token, logprob = draw(Sampler(**how), logits, jax.random.key(seed))
    for b in range(ROWS):
        want = allowed(logits[b], **how)
        if want is not None:
            np.testing.assert_array_equal(np.isfinite(out[b]), want)
            assert want[token[b]]
        x = logits[b].astype(np.float64)
        exact = x - x.max() - np.log(np.exp(x - x.max()).sum())
        np.testing.assert_allclose(logprob[b], exact[token[b]], rtol=1e-5, atol=1e-6)


def test_draws_follow_the_probabilities():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    sampler = Sampler(temperature=1.0, top_k=3)
    keys = jax.random.split(jax.random.key(0), 4000)
    tokens = jax.jit(jax.vmap(lambda key: sampler(logits, key)[0][0]))(keys)
    share = np.bincount(tokens, minlength=4) / 4000
    want = np.array([0.5, 0.3, 0.15, 0.0]) / 0.95
    # Four standard deviations of a share of 4,000 draws: at most 0.032.
    np.testing.assert_allclose(share, want, atol=0.032)
    assert share[3] == 0


def test_a_row_draws_alike_in_any_batch():
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    sampler, key = Sampler(temperature=1.0), jax.random.key(5)
    many = draw(sampler, logits, key)[0]
    np.testing.assert_array_equal(draw(sampler, logits[:1], key)[0], many[:1])


def test_greedy_takes_the_first_of_the_largest():
    assert draw(greedy(), jnp.asarray([[1.0, 3.0, 3.0]]), jax.random.key(0))[0] == 1
    np.testing.assert_array_equal(
        filtered(greedy(), jnp.asarray([[1.0, 3.0, 3.0]])), [[-np.inf, 0, -np.inf]]
    )


@pytest.mark.parametrize(
    "how, words",
    [
        (dict(temperature=-1), "temperature=-1"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.1), "top_p=1.1"),
        (dict(min_p=1.0), "min_p=1.0"),
    ],
)
def test_sampler_errors(how, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**how)


def test_repetition_penalty():
    processor = processors(repetition_penalty(2.0))
    prompt = jnp.asarray([[3, 3, -1], [0, 1, 2]])
    state = processor.update(processor.init(prompt, 5), jnp.asarray([4, -1]))
    logits = np.array([[1.0, -1.0, 2.0, -2.0, 4.0]] * 2, np.float32)
    out = processor(state, jnp.asarray(logits))
    np.testing.assert_array_equal(out, [[1, -1, 2, -4, 2], [0.5, -2, 1, -2, 4]])
    with pytest.raises(ValueError, match="above 0"):
        repetition_penalty(0)
