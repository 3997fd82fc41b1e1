"""Speculation over recurrent layers and hybrids says what plain decoding says."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import chain, recent, store
from kvjax.decode import Sampler, generate, prefill
from kvjax.speculate import Drafter, chain_of, prompt_lookup, speculate, token_recycling
from tests.models.recurrent_zoo import BATCH, LENGTHS, PROMPT, VOCAB, model, prompts

NEW = 24


@dataclasses.dataclass(frozen=True)
class Answer(Drafter):
    """Knows the continuation (constants: int32 [B, S] by position), errs at each third place."""

    length: int = 5

    def draft(self, state: Any, context: Any):
        at = context.length[:, None] + jnp.arange(self.length)
        answer = context.constants
        right = jnp.take_along_axis(answer, jnp.minimum(at, answer.shape[1] - 1), 1)
        wrong = jnp.where(at % 3 == 0, (right + 1) % VOCAB, right)
        return chain_of(jnp.concatenate([context.root[:, None], wrong], 1))


@functools.cache
def plain(name, method, sampler=None):
    own = model(name)
    logits, cache = prefill(
        own, prompts(), method, lengths=jnp.array(LENGTHS), max_length=PROMPT + NEW
    )
    key = None if sampler is None else jax.random.key(5)
    out = generate(own, cache, logits, NEW, stop=(), sampler=sampler, key=key)
    return own, logits, cache, out, {"sampler": sampler, "key": key}


def agree(mine, out):
    np.testing.assert_array_equal(mine.tokens, out.tokens)
    np.testing.assert_array_equal(mine.cache.length, out.cache.length)
    # One pass over six rows and six over one round differently, in float32.
    np.testing.assert_allclose(mine.logits, out.logits, rtol=0, atol=2e-4)
    for a, b in zip(jax.tree.leaves(mine.cache.state), jax.tree.leaves(out.cache.state)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(initial=0), 1))


CASES = [
    ("mamba2", chain(), None),
    pytest.param("hybrid", chain(store()), None, marks=pytest.mark.slow),
    pytest.param(
        "hybrid", chain(recent(8, release=4)), Sampler(temperature=0.7), marks=pytest.mark.slow
    ),
    pytest.param("average", chain(store()), None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "method", "sampler"), CASES)
def test_guesses_right_and_wrong_give_plain_decoding(name, method, sampler):
    own, logits, cache, out, how = plain(name, method, sampler)
    row = jnp.arange(BATCH)[:, None]
    at = jnp.array(LENGTHS)[:, None] + jnp.arange(NEW)
    answer = jnp.zeros((BATCH, PROMPT + NEW), jnp.int32).at[row, at].set(out.tokens)
    mine = speculate(own, cache, logits, NEW, Answer(), stop=(), constants=answer, **how)
    agree(mine, out)
    assert mine.forwards.max() < NEW  # some guesses were accepted


@pytest.mark.parametrize(("name", "method"), [("mamba2", chain()), ("hybrid", chain(store()))])
def test_prompt_lookup_is_lossless(name, method):
    own, logits, cache, out, _ = plain(name, method)
    padded = jnp.where(jnp.arange(PROMPT) < jnp.array(LENGTHS)[:, None], prompts(), -1)
    mine = speculate(
        own, cache, logits, NEW, prompt_lookup(length=4, least=1), prompt=padded, stop=()
    )
    agree(mine, out)


def test_trees_are_refused():
    own, logits, cache, _, _ = plain("hybrid", chain(store()))
    with pytest.raises(ValueError, match="a chain of drafts, not a tree"):
        speculate(own, cache, logits, 4, token_recycling(9), stop=())
