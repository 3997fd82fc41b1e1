"""The switch: stages attend by the kernels and say the same as plain XLA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    accumulated_attention,
    by_position,
    chain,
    first,
    heavy,
    init_cache,
    recent,
    store,
)
from kvjax.codecs import quantize
from kvjax.compress import kivi
from kvjax.decode import generate, prefill
from kvjax.models import Config, forward, llama

CONFIG = Config(vocab_size=61, width=32, mlp_width=32, layers=2, heads=4, kv_heads=2, head_dim=32)
METHODS = {
    "dense": (chain(store()), 1),
    "kivi": (kivi(bits=4, residual=32), 1),
    "sinks, window, heavy": (chain(first(2), recent(8), heavy(8, accumulated_attention())), 3),
    "by position": (by_position(64), 1),
}
FALLBACKS = {
    "unrotated": chain(store(rope="before")),
    "token codes": chain(store(quantize(4))),
    "symmetric": chain(store(quantize(4, "channel", 32, symmetric=True))),
}


@pytest.fixture(scope="module")
def model():
    return llama.init(CONFIG, jax.random.key(0))


def calls(cache, model, rows=1, **how):
    """Kernels in one forward pass."""
    tokens = jnp.zeros((2, rows), jnp.int32)
    at = cache.length[:, None] + jnp.arange(rows)
    run = jax.make_jaxpr(lambda cache: forward(model, tokens, at, cache, **how)[0])
    return str(run(cache)).count("pallas_call[")


@pytest.mark.parametrize("name", METHODS)
def test_same_logits_and_tokens(name, model):
    method, kernels = METHODS[name]
    prompt = jax.random.randint(jax.random.key(1), (2, 40), 0, 61)
    lengths = jnp.array([40, 11])
    logits, cache = prefill(model, prompt, method, lengths=lengths, new_tokens=24, kernels="xla")
    other = cache.replace(kernels="interpret")
    assert calls(cache, model) == 0 and calls(other, model) == kernels
    at = cache.length[:, None]
    token = jnp.argmax(logits, -1)[:, None]
    step = jax.jit(lambda cache: forward(model, token, at, cache)[0])
    np.testing.assert_allclose(step(cache), step(other), atol=2e-5)
    plain, kernel = (generate(model, c, logits, 12) for c in (cache, other))
    np.testing.assert_array_equal(plain.tokens, kernel.tokens)


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_plain_form_where_no_kernel_applies(name, model):
    cache = init_cache(CONFIG, FALLBACKS[name], 2, 64, kernels="interpret")
    assert calls(cache, model) == 0


def test_not_for_prompts_nor_for_gradients(model):
    cache = init_cache(CONFIG, chain(store()), 2, 64, kernels="interpret")
    assert calls(cache, model) == calls(cache, model, rows=8) == 1
    assert calls(cache, model, rows=17) == calls(cache, model, differentiable=True) == 0
    half = init_cache(CONFIG, chain(store()), 2, 64, dtype=jnp.float16, kernels="interpret")
    assert calls(half, model) == 0


def test_a_sliding_window_and_a_softcap():
    config = dataclasses.replace(CONFIG, windows=(9, None), attention_softcap=5.0)
    model = llama.init(config, jax.random.key(2))
    prompt = jax.random.randint(jax.random.key(1), (2, 40), 0, 61)
    logits, cache = prefill(model, prompt, chain(store()), new_tokens=8)
    at = cache.length[:, None]
    token = jnp.argmax(logits, -1)[:, None]
    step = jax.jit(lambda cache: forward(model, token, at, cache)[0])
    plain, kernel = (step(cache.replace(kernels=k)) for k in ("xla", "interpret"))
    np.testing.assert_allclose(plain, kernel, atol=2e-5)


def test_by_value():
    """Static, equal by value, refused where it makes no sense; plain XLA on a CPU by default."""
    make = lambda **how: init_cache(CONFIG, chain(store()), 1, 8, **how)  # noqa: E731
    same = [jax.tree.structure(make(kernels="interpret")) for _ in range(2)]
    assert same[0] == same[1] != jax.tree.structure(make())
    assert make().kernels == {"cpu": "xla"}.get(jax.default_backend(), jax.default_backend())
    with pytest.raises(ValueError, match="kernels='pallas': expected one of xla, tpu, gpu"):
        make(kernels="pallas")
