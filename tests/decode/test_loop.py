"""Prefill, generate and score: the same tokens however they are cut into calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    Window,
    accumulated_attention,
    chain,
    commit,
    first,
    heavy,
    horizon,
    init_cache,
    prune,
    recent,
    store,
    window_attention,
)
from kvjax.codecs import balance, compose, per_kv, quantize
from kvjax.decode import (
    Sampler,
    extend,
    generate,
    host_mask,
    positions_of,
    prefill,
    repetition_penalty,
    score,
)
from kvjax.models import llama
from kvjax.models.config import Config
from kvjax.models.decoder import forward

CONFIG = Config(37, 32, 48, 2, 4, 2, 8)
PROMPT, NEW = 16, 10
LENGTHS = jnp.asarray([16, 9])
kivi = per_kv(k=quantize(2, axis="channel", group=8), v=quantize(4))
METHODS = {
    "dense": chain(store()),
    "h2o": chain(recent(4, release=4), heavy(5, accumulated_attention())),
    "kivi": chain(store(kivi, keys=Window(0, 8), values=Window(8, 8))),
    "snapkv": chain(prune(9, window_attention(4)), recent(30)),
}
run = jax.jit(forward, static_argnames="phase")
write = jax.jit(commit, static_argnames="phase")


@pytest.fixture(scope="module")
def model():
    return llama.init(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, PROMPT), 0, CONFIG.vocab_size)


def whole(model, tokens, out):
    """Log-softmax [N, V] of one row's continuation, by one forward pass without a cache."""
    row = jnp.concatenate([tokens, out])[None]
    logits, _ = run(model, row, positions_of(row), phase="prefill")
    return jax.nn.log_softmax(logits[0, len(tokens) - 1 : -1])


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow("dense"), slow("h2o"), slow("kivi"), "snapkv"])
def test_batch_equals_each_prompt_alone(model, tokens, name):
    logits, cache = prefill(model, tokens, METHODS[name], lengths=LENGTHS, new_tokens=NEW)
    both = generate(model, cache, logits, NEW)
    for b in range(2):
        logits, cache = prefill(
            model, tokens[b : b + 1], METHODS[name], lengths=LENGTHS[b : b + 1], new_tokens=NEW
        )
        alone = generate(model, cache, logits, NEW)
        np.testing.assert_array_equal(alone.tokens[0], both.tokens[b])
        np.testing.assert_allclose(alone.logprobs[0], both.logprobs[b], rtol=1e-4, atol=1e-5)


def test_dense_generation_is_forward(model, tokens):
    logits, cache = prefill(model, tokens, METHODS["dense"], lengths=LENGTHS, new_tokens=NEW)
    out = generate(model, cache, logits, NEW)
    for b in range(2):
        want = whole(model, tokens[b, : LENGTHS[b]], out.tokens[b])
        np.testing.assert_array_equal(out.tokens[b], jnp.argmax(want, -1))
        np.testing.assert_allclose(out.logprobs[b], jnp.max(want, -1), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out.cache.length, LENGTHS + NEW)
    np.testing.assert_array_equal(cache.length, LENGTHS)  # not donated: still there


def test_score_is_forward(model, tokens):
    logits, cache = prefill(model, tokens, METHODS["dense"], lengths=LENGTHS, new_tokens=NEW)
    given = jax.random.randint(jax.random.key(2), (2, NEW), 0, CONFIG.vocab_size)
    given = given.at[1, 7:].set(-1)
    logprobs, before, after, more = score(
        model, cache, logits, given, keep_logits=True, next_logits=True
    )
    for b, n in enumerate((NEW, 7)):
        want = whole(model, tokens[b, : LENGTHS[b]], given[b, :n])
        picked = jnp.take_along_axis(want, given[b, :n, None], 1)[:, 0]
        np.testing.assert_allclose(logprobs[b, :n], picked, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.nn.log_softmax(before[b, :n]), want, rtol=1e-4, atol=1e-5)
    assert (logprobs[1, 7:] == 0).all()
    np.testing.assert_array_equal(after.length, LENGTHS + jnp.asarray([NEW, 7]))
    assert more.shape == logits.shape


@pytest.mark.parametrize("name", [slow("dense"), "h2o", slow("snapkv")])
def test_chunked_prefill_is_whole_prefill(model, tokens, name):
    """Exact until `finish`, or streamed exactly: chunks (the last one padded) change nothing."""
    outs = []
    for chunk in (None, 6):
        logits, cache = prefill(
            model, tokens, METHODS[name], lengths=LENGTHS, new_tokens=NEW, chunk=chunk
        )
        outs.append((logits, generate(model, cache, logits, NEW)))
    np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outs[0][1].tokens, outs[1][1].tokens)


@pytest.mark.parametrize("name", [slow("dense"), "kivi", "balanced"])
def test_fold_is_forward_then_commit(model, tokens, name):
    method, given = METHODS.get(name), None
    if name == "balanced":  # a codec with constants of its own for every layer and head
        codec = compose(balance(), quantize(8))
        method = chain(store(codec))
        given = {
            n: 1.0 + jax.random.uniform(jax.random.key(8), (2, 1, 2, *spec.shape))
            for n, spec in codec.constants_spec(8).items()
        }
    logits, folded = prefill(
        model, tokens, method, lengths=LENGTHS, new_tokens=NEW, constants=given
    )
    cache = init_cache(CONFIG, method, 2, PROMPT + NEW, PROMPT, constants=given)
    out, new = run(model, tokens, positions_of(tokens, LENGTHS), cache, phase="prefill")
    cache = write(cache, new, phase="prefill")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (cache.state, cache.length), (folded.state, folded.length),
    )  # fmt: skip
    last = jnp.take_along_axis(out, (LENGTHS - 1)[:, None, None], 1)[:, 0]
    np.testing.assert_allclose(logits, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", [slow(None), Sampler(temperature=1.0, top_k=9)])
def test_resume_is_one_longer_call(model, tokens, sampler):
    logits, cache = prefill(model, tokens, METHODS["h2o"], lengths=LENGTHS, new_tokens=NEW)
    how = dict(sampler=sampler, key=jax.random.key(3), processor=repetition_penalty(1.3),
               prompt=tokens)  # fmt: skip
    once = generate(model, cache, logits, NEW, **how)
    half = generate(model, cache, logits, 5, **how)
    rest = generate(model, half.cache, half.logits, 5, resume=half, **how)
    np.testing.assert_array_equal(jnp.concatenate([half.tokens, rest.tokens], 1), once.tokens)
    np.testing.assert_allclose(rest.logits, once.logits, rtol=1e-5, atol=1e-5)
    assert int(rest.drawn) == int(once.drawn) == NEW
    again = generate(model, cache, logits, NEW, **how)
    np.testing.assert_array_equal(again.tokens, once.tokens)


def test_stop_limit_and_mask(model, tokens):
    logits, cache = prefill(model, tokens, METHODS["dense"], lengths=LENGTHS, new_tokens=NEW)
    free = generate(model, cache, logits, NEW)
    ends = int(free.tokens[0, 3])
    out = generate(model, cache, logits, NEW, stop=(ends,))
    for b in range(2):
        own = list(np.asarray(free.tokens[b]))
        n = own.index(ends) + 1 if ends in own else NEW
        np.testing.assert_array_equal(out.tokens[b], own[:n] + [-1] * (NEW - n))
        assert int(out.count[b]) == n and bool(out.stopped[b]) == (ends in own)
        assert (np.asarray(out.logprobs[b])[n:] == 0).all()
        # A stop token is not committed.
        assert int(out.cache.length[b]) == int(LENGTHS[b]) + n - (ends in own)
    out = generate(model, cache, logits, NEW, limit=jnp.asarray([2, 0]))
    np.testing.assert_array_equal(out.count, [2, 0])
    np.testing.assert_array_equal(out.tokens[0, :2], free.tokens[0, :2])
    assert (np.asarray(out.tokens[1]) == -1).all() and not out.stopped.any()

    calls = []

    def even(last):
        calls.append(last.copy())
        return np.broadcast_to(np.arange(CONFIG.vocab_size) % 2 == 0, (2, CONFIG.vocab_size))

    out = generate(model, cache, logits, 4, processor=host_mask(even))
    assert (np.asarray(out.tokens) % 2 == 0).all()
    np.testing.assert_array_equal(calls[0], [-1, -1])
    np.testing.assert_array_equal(np.stack(calls[1:], 1), out.tokens[:, :3])


def test_append_is_a_second_turn(model, tokens):
    logits, cache = prefill(model, tokens, METHODS["dense"], lengths=LENGTHS, max_length=40)
    turn = jax.random.randint(jax.random.key(4), (2, 5), 0, CONFIG.vocab_size)
    positions = LENGTHS[:, None] + jnp.arange(5)
    logits, cache = extend(model, cache, turn, positions, chunk=3)
    for b in range(2):
        row = jnp.concatenate([tokens[b, : LENGTHS[b]], turn[b]])[None]
        want, _ = run(model, row, positions_of(row), phase="prefill")
        np.testing.assert_allclose(logits[b], want[0, -1], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.length, LENGTHS + 5)


@pytest.mark.parametrize("name", ["h2o", "kivi", slow("snapkv")])
def test_accepting_horizon_tokens_is_plain_decoding(model, tokens, name):
    """tests/cache/test_horizon.py through a model: logits of verified rows, row by row."""
    _, cache = prefill(model, tokens, METHODS[name], lengths=LENGTHS, new_tokens=24)
    given = jax.random.randint(jax.random.key(6), (2, 24), 0, CONFIG.vocab_size)
    done = np.zeros(2, int)
    most = 0
    for _ in range(4):
        several = np.minimum(np.asarray(horizon(cache)), 4)
        most = max(most, several.max())
        index = np.where(np.arange(4) < several[:, None], done[:, None] + np.arange(4), -1)
        ids = jnp.take_along_axis(given, jnp.maximum(index, 0), 1)
        pos = jnp.where(index >= 0, LENGTHS[:, None] + index, -1)
        verified, new = run(model, ids, pos, cache)
        plain = cache
        for i in range(4):
            one, row = run(model, ids[:, i : i + 1], pos[:, i : i + 1], plain)
            plain = write(plain, row)
            there = index[:, i] >= 0
            np.testing.assert_allclose(verified[there, i], one[there, 0], rtol=1e-5, atol=1e-5)
        cache = write(cache, new)
        done += several
    assert most > 1


def test_no_room_and_no_key(model, tokens):
    logits, cache = prefill(model, tokens, METHODS["dense"], lengths=LENGTHS, new_tokens=3)
    with pytest.raises(ValueError, match=r"max_length=19 .* 4 more"):
        generate(model, cache, logits, 4)
    with pytest.raises(ValueError, match="key"):
        generate(model, cache, logits, 2, sampler=Sampler(temperature=1.0))
    with pytest.raises(ValueError, match="exactly one"):
        prefill(model, tokens, METHODS["dense"])
    with pytest.raises(ValueError, match=r"shape \(16,\)"):
        prefill(model, tokens[0], chain(first(3)), new_tokens=1)
