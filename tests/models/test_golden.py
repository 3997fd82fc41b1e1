"""Forward, prefill and decode alike, against transformers: a tiny model of every family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import chain, commit, finish, init_cache, store
from kvjax.models.decoder import forward
from kvjax.models.huggingface import load_pretrained
from tests import golden

# What differs from another case only in the rule for frequencies, which the plain NumPy forward of
# test_huggingface_golden.py checks too, or in what two other cases have between them.
SLOW = {"llama_bias", "llama_linear", "llama_yarn", "phi3_longrope_short", "qwen2_window"}
CASES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SLOW else [])
    for path in golden.cases()
]


@functools.partial(jax.jit, static_argnames="phase")
def step(model, cache, tokens, positions, phase):
    logits, new = forward(model, tokens, positions, cache, phase=phase)
    return logits, commit(cache, new, phase=phase)


@pytest.mark.parametrize("path", CASES)
def test_prefill_and_decode_give_the_logits_of_transformers(path, tmp_path):
    case = golden.load_case(path, tmp_path)
    model = load_pretrained(case.folder)
    # Both sides compute in float32, in another order: 1e-6 relative per operation, some thirty of
    # them in sequence, on the scale of the largest logit; never more than 1e-4.
    scale = max(np.abs(logits).max() for logits in case.logits)
    check = functools.partial(np.testing.assert_allclose, atol=min(2e-5 * scale, 1e-4), rtol=0)
    for side in ("left", "right"):
        tokens, positions, valid = case.padded(side)
        cache = init_cache(model.config, chain(store()), 2, case.length, prompt=tokens.shape[1])
        logits, cache = step(model, cache, tokens, positions, "prefill")
        check(np.asarray(logits)[valid], case.prefill_logits(side)[valid], err_msg=f"{side} prompt")
        cache = finish(cache)
        for t in range(case.decode_tokens.shape[1]):
            token, position = case.decode_tokens[:, t : t + 1], case.lengths[:, None] + t
            logits, cache = step(model, cache, token, jnp.asarray(position), "decode")
            check(logits[:, 0], case.decode_logits[:, t], err_msg=f"{side}, step {t}")
