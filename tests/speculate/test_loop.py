"""Speculation says what plain decoding says, whatever the drafts, the cache and the batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.decode import generate, prefill
from kvjax.speculate import prompt_lookup, speculate
from tests.speculate.harness import (
    LENGTHS,
    METHODS,
    NEW,
    PROMPT,
    Guess,
    Oracle,
    model,
    prompts,
)

STOP = ()


@pytest.fixture(scope="module")
def target():
    return model()


@pytest.fixture(scope="module")
def filled(target):
    """Prefilled caches by name, and the plain continuations."""
    found = {}
    for name, method in METHODS.items():
        logits, cache = prefill(
            target, jnp.maximum(prompts(), 0), method, lengths=LENGTHS, new_tokens=NEW + 4
        )
        found[name] = logits, cache, generate(target, cache, logits, NEW, stop=STOP)
    return found


def answers(plain):
    """int32 [B, PROMPT + NEW]: plain decoding's tokens at their positions."""
    whole = jnp.full((len(LENGTHS), PROMPT + NEW), 0, jnp.int32)
    row = jnp.arange(len(LENGTHS))[:, None]
    return whole.at[row, LENGTHS[:, None] + jnp.arange(NEW)].set(plain.tokens)


def agree(mine, plain, atol=2e-4):
    """Tokens equal, log-probabilities and what comes next up to float32 sums in another order."""
    np.testing.assert_array_equal(mine.tokens, plain.tokens)
    np.testing.assert_array_equal(mine.count, plain.count)
    np.testing.assert_array_equal(mine.stopped, plain.stopped)
    np.testing.assert_array_equal(mine.cache.length, plain.cache.length)
    np.testing.assert_allclose(mine.logprobs, plain.logprobs, rtol=0, atol=atol)
    np.testing.assert_allclose(mine.logits, plain.logits, rtol=0, atol=atol)


DRAFTERS = {
    "random trees": Guess(),
    "oracle": Oracle(5),
    "oracle of branches, often wrong": Oracle(4, wrong=3, branches=2),
    "prompt lookup": prompt_lookup(least=1),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", METHODS)
def test_greedy_is_plain_decoding(target, filled, name, drafter):
    logits, cache, plain = filled[name]
    mine = speculate(
        target, cache, logits, NEW, DRAFTERS[drafter],
        prompt=prompts(), constants=answers(plain), stop=STOP,
    )  # fmt: skip
    agree(mine, plain)
    assert (mine.forwards <= mine.count).all() and int(mine.passes) == int(mine.forwards.max())
    # What was committed is what plain decoding would have: both go on alike.
    again = generate(target, mine.cache, mine.logits, 4, stop=STOP)
    np.testing.assert_array_equal(
        again.tokens, generate(target, plain.cache, plain.logits, 4, stop=STOP).tokens
    )


def test_a_perfect_drafter_is_bounded_by_its_depth_and_the_horizon(target, filled):
    passes = {}
    for name in METHODS:
        logits, cache, plain = filled[name]
        mine = speculate(target, cache, logits, NEW, Oracle(5), constants=answers(plain), stop=STOP)
        passes[name] = int(mine.passes)
    assert passes["dense"] == passes["snapkv"] == NEW // 6
    assert NEW // 6 < passes["kivi"] <= NEW // 4  # flushes every 8 tokens
    assert passes["h2o"] == NEW // 4 or passes["h2o"] == NEW // 4 + 1  # 4 leave together
