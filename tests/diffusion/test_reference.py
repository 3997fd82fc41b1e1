"""Whole generations equal those of a plain NumPy statement: tokens, order, steps, work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import quantize
from kvjax.diffusion import Choice, dkv_decode, generate, llada, no_cache, threshold
from kvjax.models import Config
from kvjax.models.llama import flatten, init
from tests.diffusion import reference

MASK, EOS, EOT = 40, 7, 9
CONFIG = Config(41, 32, 48, 2, 4, 2, 8, tied=False, bidirectional=True, mask_token=MASK, eos=(EOS,))
NEW, PROMPT, LENGTHS = 16, 7, (7, 4, 6)
KEY = jax.random.key(5)


def model(seed=0):
    """A random model with peaked predictions, as trained ones have."""
    found = init(CONFIG, jax.random.key(seed))
    found.head[...] = found.head[...] * 3.0
    return found


def prompts(seed=1):
    return np.random.default_rng(seed).integers(0, MASK, (len(LENGTHS), PROMPT)).astype(np.int32)


def both(steps, block, code=lambda x: x, seed=0, unmasker=None, **how):
    """The batch, and the same rows one by one in NumPy."""
    names = {"random": "random", "low_confidence": "probability"}
    remasking, temperature = how.get("remasking", "low_confidence"), how.get("temperature", 0.0)
    choice = Choice(temperature, names[remasking], how.get("never", ()), how.get("last", ()))
    schedule, shares = llada(NEW, steps, block)
    own = model(seed)
    cache = how.pop("cache", None) or no_cache()
    got = generate(
        own, prompts(seed + 1), NEW, lengths=jnp.asarray(LENGTHS), schedule=schedule,
        unmasker=unmasker or shares, cache=cache, choice=choice,
        guidance=how.get("guidance", 0.0), key=KEY, sizes=how.pop("sizes", None),
    )  # fmt: skip
    rows = []
    for b, length in enumerate(LENGTHS):
        network = reference.Network(CONFIG, flatten(own), code)
        noise = reference.noise(KEY, b, CONFIG.vocab_size)
        row = prompts(seed + 1)[b, :length].tolist()
        rows.append(reference.generate(network, row, NEW, steps, block, MASK, noise=noise, **how))
    return got, rows


def same(got, rows):
    for b, row in enumerate(rows):
        size = len(row.tokens)
        assert np.asarray(got.tokens)[b].tolist() == row.tokens + [-1] * (PROMPT + NEW - size)
        assert np.asarray(got.order)[b, :size].tolist() == row.order
    assert got.steps.tolist() == [row.steps for row in rows]
    assert got.active.tolist() == [row.computed for row in rows]


@pytest.mark.parametrize(
    ("steps", "block", "how"),
    [
        (16, 16, {}),  # one token per step, pure diffusion
        (6, 16, {}),  # quotas 3, 3, 3, 3, 2, 2
        (8, 8, {"remasking": "random"}),
        (4, 4, {"temperature": 0.7}),  # whole blocks at once
        (32, 8, {"temperature": 1.0, "remasking": "random"}),  # more steps than tokens
        (8, 4, {"guidance": 0.5}),
        (8, 8, {"never": (EOS, 11), "last": (EOT, 3)}),
    ],
)
def test_llada(steps, block, how):
    got, rows = both(steps, block, **how)
    same(got, rows)
    batch, width = got.tokens.shape
    passes = 2 if "guidance" in how else 1
    assert int(got.evaluations) == passes * max(row.steps for row in rows)
    assert int(got.computed) == int(got.evaluations) * batch * width


@pytest.mark.parametrize(
    ("steps", "block", "refresh", "delay", "how"),
    [
        (16, 16, 8, 1, {}),
        (16, 8, 3, 1, {"remasking": "random", "temperature": 0.5}),
        (12, 4, 99, 1, {"guidance": 0.5}),  # the second pass has its own rows in the cache
        (8, 8, 3, 0, {}),
        (16, 8, 8, 1, {"keep_prompt": False}),
    ],
)
def test_dkv_decode(steps, block, refresh, delay, how):
    cache = dkv_decode(refresh, delay, prompt=how.get("keep_prompt", True))
    got, rows = both(steps, block, refresh=refresh, delay=delay, cache=cache, **how)
    same(got, rows)


def test_threshold():
    for value, cache in ((0.5, {}), (0.3, {"refresh": 2})):
        policy = dkv_decode(2) if cache else no_cache()
        got, rows = both(16, 8, threshold=value, unmasker=threshold(value), cache=policy, **cache)
        same(got, rows)
        assert len(set(got.steps.tolist())) > 1  # rows are out of step with each other


def test_dkv_decode_at_four_bits():
    codec = quantize(4, axis="token")
    store = jax.jit(lambda x: codec.decode(codec.encode(x)))

    def code(x):
        return np.asarray(store(jnp.asarray(x, jnp.float32)[:, None])[:, 0], np.float64)

    got, rows = both(16, 16, code, refresh=8, cache=dkv_decode(8, codec=codec))
    same(got, rows)
    exact, _ = both(16, 16, refresh=8, cache=dkv_decode(8))
    assert got.order.tolist() != exact.order.tolist()  # four bits do change something here
