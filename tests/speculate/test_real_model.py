"""SmolLM2-135M: speculation in a batch of unequal prompts is plain greedy decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.compress import parse
from kvjax.decode import generate, prefill, score
from kvjax.decode.text import pad
from kvjax.evaluate import language_reference
from kvjax.models import load
from kvjax.models.embedded import cached_smollm2
from kvjax.speculate import paper_tree, prompt_lookup, speculate, token_recycling
from tests.speculate.harness import Guess

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.usefixtures("compile_fully")]
NEW, MARGIN = 24, 0.01
CACHES = "dense; snapkv(keep=0.5, window=16); kivi(residual=32, release=8); h2o(release=8)"


@pytest.fixture(scope="module")
def loaded():
    path = cached_smollm2()
    if path is None:
        pytest.skip("the embedded model is not cached: run `python -m kvjax.models.embedded`")
    return load(path)


@pytest.mark.parametrize(("label", "method"), parse(CACHES))
def test_greedy_is_plain_decoding(loaded, label, method):
    model, tokenizer = loaded
    ids = tokenizer.encode(language_reference()[:40_000], special=False)
    prompts = [ids[i * 900 : i * 900 + 30 + 17 * i] for i in range(6)]
    tokens, lengths = pad(prompts)
    shown = jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)
    logits, cache = prefill(model, tokens, method, lengths=jnp.asarray(lengths), new_tokens=NEW)
    plain = generate(model, cache, logits, NEW)
    drafters = (prompt_lookup(least=1, match="latest"), token_recycling(15))
    for drafter in (*drafters, Guess(paper_tree())) if label == "dense" else drafters[:1]:
        mine = speculate(model, cache, logits, NEW, drafter, prompt=shown, key=jax.random.key(0))
        differs = np.asarray(mine.tokens != plain.tokens)
        for row in np.flatnonzero(differs.any(1)):  # only between the best two, if nearly equal
            _, before, _ = score(model, cache, logits, plain.tokens, keep_logits=True)
            best = jax.lax.top_k(before[row, differs[row].argmax()], 2)[0]
            assert best[0] - best[1] < MARGIN
        if not isinstance(drafter, Guess):
            assert (mine.forwards < mine.count).any()
