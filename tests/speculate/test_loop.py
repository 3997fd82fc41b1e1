"""Speculation says what plain decoding says, whatever the drafts, the cache and the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.decode import Sampler, generate, host_mask, positions_of, prefill, repetition_penalty
from kvjax.models.decoder import forward
from kvjax.speculate import loop, prompt_lookup, speculate, token_recycling
from tests.speculate.harness import (
    BATCH,
    CONFIG,
    LENGTHS,
    METHODS,
    NEW,
    PROMPT,
    ROOM,
    Guess,
    Oracle,
    Scratch,
    Witness,
    model,
    prompts,
)

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def target():
    return model()


@pytest.fixture(scope="module")
def filled(target):
    """By name: logits and cache after the prompts, and the plain continuation."""

    @functools.cache
    def of(name):
        logits, cache = prefill(
            target, jnp.maximum(prompts(), 0), METHODS[name], lengths=LENGTHS, max_length=ROOM
        )
        return logits, cache, generate(target, cache, logits, NEW, stop=())

    return of


def answers(plain):
    """int32 [B, PROMPT + NEW]: plain decoding's tokens at their positions."""
    whole = jnp.zeros((BATCH, PROMPT + NEW), jnp.int32)
    row = jnp.arange(BATCH)[:, None]
    return whole.at[row, LENGTHS[:, None] + jnp.arange(NEW)].set(plain.tokens)


def agree(mine, plain, atol=2e-4):
    """Tokens equal, log-probabilities and what comes next up to float32 sums in another order."""
    for name in ("tokens", "count", "stopped"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(plain, name))
    np.testing.assert_array_equal(mine.cache.length, plain.cache.length)
    np.testing.assert_allclose(mine.logprobs, plain.logprobs, rtol=0, atol=atol)
    np.testing.assert_allclose(mine.logits, plain.logits, rtol=0, atol=atol)


HALF = Oracle(4, wrong=3, branches=2)  # right and wrong by turns
DRAFTERS = {
    "random": Guess(),
    "oracle": Oracle(5),
    "half": HALF,
    "lookup": prompt_lookup(least=1),
    "recycling": token_recycling(9),
}
DRAFTERS["scratch"] = Scratch(4, wrong=3)
QUICK = {("dense", "scratch")} | {
    ("dense", "random"),
    ("dense", "lookup"),
    ("dense", "recycling"),
    ("h2o", "half"),
}
QUICK |= {("kivi", "half")}


@pytest.mark.parametrize(
    ("name", "drafter"),
    [pytest.param(n, d, marks=() if (n, d) in QUICK else slow) for n in METHODS for d in DRAFTERS],
)
def test_greedy_is_plain_decoding(target, filled, name, drafter):
    logits, cache, plain = filled(name)
    mine = speculate(
        target, cache, logits, NEW, DRAFTERS[drafter],
        prompt=prompts(), constants=answers(plain), stop=(),
    )  # fmt: skip
    agree(mine, plain)
    assert (mine.forwards <= mine.count).all() and int(mine.passes) == int(mine.forwards.max())
    # What was committed is what plain decoding would have: both go on alike.
    again = generate(target, mine.cache, mine.logits, NEW, stop=())
    other = generate(target, plain.cache, plain.logits, NEW, stop=())
    np.testing.assert_array_equal(again.tokens, other.tokens)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    # 6 tokens per pass; 4 where 4 leave together; keys flush every 8 tokens: 6, 2, 6, 2, ...
    [("dense", 4, 4), ("h2o", 6, 7), pytest.param("kivi", 6, 7, marks=slow)],
)
def test_a_perfect_drafter_is_bounded_by_its_depth_and_the_horizon(
    target, filled, name, least, most
):
    logits, cache, plain = filled(name)
    mine = speculate(target, cache, logits, NEW, Oracle(5), constants=answers(plain), stop=())
    agree(mine, plain)
    assert least <= int(mine.passes) <= most


SAMPLER = Sampler(0.7, top_k=9, top_p=0.9)


def test_sampled_tokens_are_those_of_plain_decoding(target, filled):
    """The same key, the same tokens; with a processor, limits, and in two parts."""
    logits, cache, _ = filled("dense")
    how = {
        "sampler": SAMPLER, "key": jax.random.key(4), "processor": repetition_penalty(1.3),
        "prompt": prompts(), "stop": (),
    }  # fmt: skip
    limit = jnp.asarray([NEW, 11, 6])
    whole = generate(target, cache, logits, NEW, limit=limit, **how)
    how |= {"constants": answers(whole), "drafter": HALF}
    first = jnp.asarray([NEW - 3, 5, 0])
    mine = speculate(target, cache, logits, NEW, limit=first, **how)
    assert mine.count.tolist() == first.tolist() and int(mine.passes) < NEW - 3
    # What is left draws what would have been drawn in one go.
    last = speculate(target, mine.cache, mine.logits, NEW, limit=limit - first, resume=mine, **how)
    assert (last.drawn == whole.count).all()
    for row in range(BATCH):
        cut = int(first[row])
        both = [*mine.tokens[row, :cut].tolist(), *last.tokens[row].tolist()]
        assert both[:NEW] == whole.tokens[row].tolist()
    np.testing.assert_allclose(last.logits, whole.logits, rtol=0, atol=2e-4)
    np.testing.assert_allclose(mine.logprobs[0, : NEW - 3], whole.logprobs[0, : NEW - 3], atol=2e-4)
    known = jnp.arange(ROOM) < last.cache.length[:, None]
    np.testing.assert_array_equal(last.history >= 0, known)


@slow
def test_a_mask_from_the_host_is_obeyed(target, filled):
    """Asked with the last token of each row, -1 where nothing new was drawn."""

    def allowed(last):
        mask = np.zeros((BATCH, CONFIG.vocab_size), bool)
        mask[np.arange(BATCH), (last + 2) % CONFIG.vocab_size] = True
        return mask

    logits, cache, _ = filled("dense")
    how = {"stop": (), "processor": host_mask(allowed), "prompt": prompts()}
    plain = generate(target, cache, logits, NEW, **how)
    assert plain.tokens[0, :4].tolist() == [1, 3, 5, 7]
    how["constants"] = answers(plain)
    mine = speculate(target, cache, logits, NEW, HALF, **how)
    np.testing.assert_array_equal(mine.tokens, plain.tokens)
    assert int(mine.passes) < NEW


def test_stop_tokens(target, filled):
    """One row stops at its first token, one within a draft, the stop token drafted."""
    logits, cache, plain = filled("dense")
    first, others = int(plain.tokens[0, 0]), plain.tokens[1].tolist()
    place = next(i for i in range(1, 6) if others[i] not in others[:i])
    assert first not in others[: place + 1]
    how = {"stop": (first, others[place])}
    one = generate(target, cache, logits, NEW, **how)
    assert one.count[0] == 1 and one.count[1] == place + 1 and one.stopped[:2].all()
    mine = speculate(target, cache, logits, NEW, Oracle(5), constants=answers(plain), **how)
    agree(mine, one)
    assert mine.forwards[0] == 0 and mine.forwards[1] == 1


@slow
def test_rows_do_not_feel_each_other(target, filled):
    logits, cache, plain = filled("dense")
    drafter, row = prompt_lookup(least=1), 1
    prompt = prompts()[row : row + 1, : int(LENGTHS[row])]
    alone, own = prefill(target, prompt, METHODS["dense"], max_length=ROOM)
    mine = speculate(target, own, alone, NEW, drafter, prompt=prompt, stop=())
    np.testing.assert_array_equal(mine.tokens[0], plain.tokens[row])
    both = speculate(target, cache, logits, NEW, drafter, prompt=prompts(), stop=())
    assert int(mine.forwards[0]) == int(both.forwards[row]) < NEW


def test_drafters_see_what_the_target_computed(target, filled):
    """Logits and hidden states of all nodes; the state comes back and goes on."""
    logits, cache, _ = filled("dense")
    limit = jnp.asarray([1, 1, 0])
    one = speculate(target, cache, logits, NEW, Witness(), prompt=prompts(), stop=(), limit=limit)
    state = one.drafter
    assert int(state["calls"]) == int(one.passes) == 1
    # The root alone after the prompt, run plainly.
    tokens = jnp.concatenate([jnp.maximum(prompts(), 0), one.tokens[:, :1]], 1)
    positions = jnp.concatenate([positions_of(prompts(), LENGTHS), LENGTHS[:, None]], 1)
    out, new = run(target, tokens, positions, hidden=(1, CONFIG.layers))
    for row in (0, 1):
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
        close(state["logits"][row, 0], out[row, -1])
        for layer in (1, CONFIG.layers):
            close(state["hidden"][layer][row, 0], new.hidden[layer][row, -1])
    two = speculate(target, one.cache, one.logits, NEW, Witness(), resume=one, stop=(), limit=limit)
    assert int(two.drafter["calls"]) == 2


run = jax.jit(forward, static_argnames=("hidden",))


def test_equal_drafters_compile_once_and_the_cache_is_donated(target, filled):
    logits, cache, plain = filled("dense")
    copy = jax.tree.map(jnp.copy, cache)
    how = {"constants": answers(plain), "stop": (), "donate": True}
    before = loop._speculate_donating._cache_size()
    speculate(target, copy, logits, NEW, Oracle(5), **how)
    assert all(x.is_deleted() for x in jax.tree.leaves((copy.state, copy.length)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(copy.constants))
    speculate(target, jax.tree.map(jnp.copy, cache), logits, NEW, Oracle(5), **how)
    assert loop._speculate_donating._cache_size() == before + 1


def test_errors(target, filled):
    logits, cache, _ = filled("dense")
    with pytest.raises(ValueError, match="needs key"):
        speculate(target, cache, logits, NEW, Guess(), sampler=Sampler(1.0))
    with pytest.raises(ValueError, match="new_tokens=0"):
        speculate(target, cache, logits, 0, Guess())
    with pytest.raises(ValueError, match="room"):
        speculate(target, cache, logits, ROOM, Guess())
    with pytest.raises(ValueError, match="expected a Drafter"):
        speculate(target, cache, logits, NEW, "lookup")
