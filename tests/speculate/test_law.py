"""Sampling through the whole loop, on a tiny model, against the exact law of three tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import chain, store
from kvjax.decode import Sampler, prefill
from kvjax.models import Config, llama
from kvjax.models.decoder import forward
from kvjax.speculate import speculate
from tests.speculate.harness import Drawn
from tests.speculate.test_verify import fits

V, ROWS, NEW = 6, 20000, 3
CONFIG = Config(V, 16, 24, 2, 2, 1, 8)
PROMPT = jnp.asarray([[3, 1, 4]])


@pytest.fixture(scope="module")
def target():
    model = llama.init(CONFIG, jax.random.key(2))
    model.embed[...] = model.embed[...] * 2.0
    return model


@pytest.fixture(scope="module")
def conditionals(target):
    """Logits [V * V, 3, V] after the prompt and 0, 1 and 2 more tokens, for all pairs of these."""
    more = jnp.asarray(list(itertools.product(range(V), repeat=2)))
    tokens = jnp.concatenate([jnp.broadcast_to(PROMPT, (V * V, 3)), more], 1)
    out, _ = jax.jit(forward)(target, tokens, jnp.broadcast_to(jnp.arange(5), tokens.shape))
    return out[:, 2:]


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(0.6),
        Sampler(1.7, top_k=4, top_p=0.9),
        pytest.param(Sampler(1.0), marks=pytest.mark.slow),
    ],
)
def test_three_tokens_have_the_law_of_plain_sampling(target, conditionals, sampler):
    p = np.asarray(jax.nn.softmax(sampler.filter(conditionals), -1), np.float64)
    p = p.reshape(V, V, 3, V)
    law = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
    logits, cache = prefill(target, PROMPT, chain(store()), new_tokens=NEW)
    many = jax.tree.map(lambda x: jnp.repeat(x, ROWS, 1) if x.ndim > 1 else x, cache.state)
    cache = cache.replace(state=many, length=jnp.repeat(cache.length, ROWS))
    guess = 1.5 * jax.random.normal(jax.random.key(8), (2, V))  # bad guesses, said to be such
    out = speculate(
        target, cache, jnp.repeat(logits, ROWS, 0), NEW, Drawn(), constants=guess,
        sampler=sampler, key=jax.random.key(9), stop=(),
    )  # fmt: skip
    assert (out.count == NEW).all() and out.forwards.min() == 1 and out.forwards.max() == NEW
    tokens = np.asarray(out.tokens)
    number = (tokens[:, 0] * V + tokens[:, 1]) * V + tokens[:, 2]
    fits(np.bincount(number, minlength=V**3), law.reshape(-1))
