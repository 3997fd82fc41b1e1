"""A round of speculation reads the cache and writes the path in place."""

import jax
import jax.numpy as jnp
import pytest

from kvjax.cache import apart, init_cache, nbytes
from kvjax.decode import Sampler, processors
from kvjax.models import llama
from kvjax.speculate import loop, prompt_lookup, token_recycling, verify
from tests.speculate.harness import CONFIG, METHODS

CAPACITY = 16384


# What is copied is decided by the passes that other tests leave out.
pytestmark = pytest.mark.usefixtures("compile_fully")


@pytest.mark.parametrize(
    "drafter",
    [prompt_lookup(), pytest.param(token_recycling(9), marks=pytest.mark.slow)],
)
def test_the_loop_copies_nothing_of_the_cache(drafter):
    shape = jax.ShapeDtypeStruct
    model = jax.eval_shape(lambda: llama.init(CONFIG, jax.random.key(0)))
    cache = jax.eval_shape(lambda: init_cache(CONFIG, METHODS["dense"], 1, CAPACITY))
    prompt = shape((1, 8), jnp.int32)
    state = jax.eval_shape(lambda p: drafter.init(model, p, CAPACITY), prompt)
    moving, rest = apart(cache)
    row = shape((1,), jnp.int32)
    compiled = loop._speculate_donating.lower(
        model, moving, rest, None, shape((1, CONFIG.vocab_size), jnp.float32),
        shape((1, CAPACITY), jnp.int32), (), state, shape((1,), bool), row, row,
        jax.random.key(0), new_tokens=8, drafter=drafter, sampler=Sampler(), stop=(),
        processor=processors(), verifier=verify,
    ).compile()  # fmt: skip
    used = compiled.memory_analysis()
    assert used.alias_size_in_bytes >= nbytes(moving) - 1024
    keys = CONFIG.layers * CONFIG.kv_heads * CAPACITY * CONFIG.head_dim * 4
    assert used.temp_size_in_bytes < keys  # less than a copy of the keys alone
