"""SmolLM2-135M through the kernels (interpreted): the tokens of plain XLA."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.compress import dense, kivi
from kvjax.decode import generate, prefill
from kvjax.models import load
from kvjax.models.embedded import cached_smollm2

pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.usefixtures("compile_fully")]
TEXT = "The Python programming language was created by Guido van Rossum. It is known for " * 3


@pytest.mark.parametrize("method", [dense(), kivi(bits=4, residual=32)], ids=["dense", "kivi"])
def test_same_tokens(method):
    path = cached_smollm2()
    if path is None:
        pytest.skip("the embedded model is not cached: run `python -m kvjax.models.embedded`")
    model, tokenizer = load(path)
    prompt = jnp.asarray([tokenizer.encode(TEXT.strip())])
    logits, cache = prefill(model, prompt, method, new_tokens=16, kernels="xla")
    plain, kernel = (
        generate(model, cache.replace(kernels=k), logits, 16, stop=()) for k in ("xla", "interpret")
    )
    np.testing.assert_array_equal(plain.tokens, kernel.tokens)
    np.testing.assert_allclose(plain.logits, kernel.logits, atol=2e-3)
