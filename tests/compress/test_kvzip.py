"""KVzip: the replay against NumPy, the budget over all heads and layers, and who must ask."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    chain,
    commit,
    finish,
    init_cache,
    nbytes,
    overall,
    prune,
    replayed_attention,
    store,
    tokens_held,
)
from kvjax.compress import kvzip, parse
from kvjax.decode import Words, prefill, replay
from kvjax.models.decoder import forward
from tests.compress.harness import CONFIG, held, model
from tests.compress.reference import softmax, top

L, H, G = CONFIG.layers, CONFIG.kv_heads, CONFIG.heads // CONFIG.kv_heads
T, LENGTHS = 23, (23, 14)
CHUNK, HINT, SINKS = 9, 3, 2
WORDS = Words((7, 8), (9, 10, 11), (12,))


@functools.cache
def prompt():
    tokens = np.random.default_rng(0).integers(0, 50, (2, T))
    return np.where(np.arange(T) < np.asarray(LENGTHS)[:, None], tokens, 0)


@jax.jit
def _rows(model, tokens, positions):
    _, new = forward(model, tokens, positions, phase="prefill", statistics=True)
    return new.seen.q, new.kv.k


def turn(k, pos):
    freq = 10000.0 ** (-2.0 * np.arange(4) / 8)
    c, s = np.cos(np.outer(pos, freq)), np.sin(np.outer(pos, freq))
    return np.concatenate([k[..., :4] * c - k[..., 4:] * s, k[..., 4:] * c + k[..., :4] * s], -1)


@functools.cache
def scores(row: int, words: Words | None = WORDS, chunk: int = CHUNK, hint: int = HINT):
    """[L, H, n]: one plain sequence per part (prompt, words, hint, words, part), and of its last
    rows the largest probability on the part where it stood first."""
    words = words or Words()
    n, ids = LENGTHS[row], list(map(int, prompt()[row][: LENGTHS[row]]))
    out = np.zeros((L, H, n))
    for first in range(0, n, chunk):
        part = ids[first : first + chunk]
        again = [*words.first] if first == 0 else [*words.later, *ids[first - hint : first]]
        whole = ids + again + [*words.after] + part
        size = len(whole)
        padded = np.zeros((1, 64), np.int32)
        padded[0, :size] = whole
        at = np.where(np.arange(64) < size, np.arange(64), -1)[None]
        q, k = _rows(model(), jnp.asarray(padded), jnp.asarray(at, jnp.int32))
        q, k = (np.asarray(x, np.float64)[:, 0, :, :size] for x in (q, k))
        k = turn(k, np.arange(size))
        stop = first + len(part)
        read = [j for j in range(size) if j < min(SINKS, first) or first <= j < stop or j >= n]
        for l, h in np.ndindex(L, H):
            for g in range(G):
                for i in range(n, size):
                    seen = [j for j in read if j <= i]
                    p = softmax(k[l, h, seen] @ q[l, h * G + g, i])
                    inside = [x for j, x in zip(seen, p) if first <= j < stop]
                    best = out[l, h, first:stop]
                    out[l, h, first:stop] = np.maximum(best, inside)
    out.flags.writeable = False
    return out


def protected(s):
    """Scores with those of the sinks infinite."""
    s = s.copy()
    s[..., :SINKS] = np.inf
    return s


def zipped(text, words=WORDS):
    lengths = jnp.asarray(LENGTHS)
    return prefill(
        model(), jnp.asarray(prompt()), parse(text)[0][1], lengths=lengths, new_tokens=4,
        words=words,
    )[1]  # fmt: skip


HOW = f"chunk={CHUNK}, hint={HINT}, sinks={SINKS}"


@pytest.mark.parametrize("words", [WORDS, None], ids=["asked", "unasked"])
def test_keeps_the_best_of_all_heads_and_layers(words):
    kept = held(zipped(f"kvzip(keep=0.5, {HOW})", words))
    uneven = set()
    for b, n in enumerate(LENGTHS):
        s = protected(scores(b, words))
        number = L * H * (n // 2)
        # Position first, so that the lower one wins among equals.
        order = np.argsort(-np.moveaxis(s, 2, 0).reshape(-1), kind="stable")[:number]
        best = [(i // (L * H), i // H % L, i % H) for i in order]
        want = [[sorted(t for t, a, c in best if (a, c) == (l, h)) for h in range(H)]
                for l in range(L)]  # fmt: skip
        assert [kept[l][b] for l in range(L)] == want
        uneven |= {len(x) for layer in want for x in layer}
    assert len(uneven) > 2


def test_uniform_keeps_as_many_in_every_head():
    kept = held(zipped(f"kvzip(keep=0.5, uniform=True, {HOW})"))
    for b, n in enumerate(LENGTHS):
        s = protected(scores(b))
        for l in range(L):
            assert kept[l][b] == [top(s[l, h], n // 2) for h in range(H)]


def test_whole_prompt_in_one_part():
    kept = held(zipped(f"kvzip(keep=0.5, uniform=True, chunk=100, sinks={SINKS})", None))
    s = protected(scores(0, None, 100))
    assert kept[0][0] == [top(s[0, h], T // 2) for h in range(H)]


@functools.cache
def pending():
    method = kvzip(keep=0.5, chunk=CHUNK, hint=HINT, sinks=SINKS)
    tokens = jnp.asarray(prompt())
    at = np.arange(T)[None]
    at = jnp.asarray(np.where(at < np.asarray(LENGTHS)[:, None], at, -1), jnp.int32)
    cache = init_cache(CONFIG, method, 2, T + 4, prompt=T)

    @jax.jit
    def run(model, cache):
        _, new = forward(model, tokens, at, cache, phase="prefill", logits="none")
        return commit(cache, new, phase="prefill")

    return run(model(), cache), tokens, at


def test_replay_changes_nothing_but_the_column():
    before, tokens, at = pending()
    copy = jax.tree.map(jnp.copy, before)
    after = replay(model(), copy, tokens, at, WORDS)
    a, b = before.state[0], after.state[0]
    for name in ("k", "v", "pos"):
        np.testing.assert_array_equal(getattr(a.kv, name), getattr(b.kv, name))
    assert (after.length == before.length).all() and (b.seen == a.seen).all()
    assert a.due and not b.due
    got = np.asarray(b.kv.extra["replayed"])
    for row, n in enumerate(LENGTHS):
        np.testing.assert_allclose(got[:, row, :, :n], scores(row), rtol=2e-5, atol=1e-6)
        assert (got[:, row, :, n:] == 0).all()


def test_a_prompt_that_was_not_replayed_is_not_finished():
    before, *_ = pending()
    with pytest.raises(ValueError, match=r"finish: .*'replayed'.*kvjax\.decode\.replay"):
        finish(before)


def test_prompt_in_chunks():
    text = f"kvzip(keep=0.5, {HOW})"
    cache = prefill(
        model(), jnp.asarray(prompt()), parse(text)[0][1], lengths=jnp.asarray(LENGTHS),
        new_tokens=4, words=WORDS, chunk=8,
    )[1]  # fmt: skip
    assert held(cache) == held(zipped(text))


def test_two_replays_in_one_chain():
    """Each column has its own parts; the last one lets the prompt be finished."""
    one, two = replayed_attention(9, 3, 2), replayed_attention(100, 0, 2)
    two = dataclasses.replace(two, column=dataclasses.replace(two.column, name="other"))
    both = chain(prune(12, one), prune(6, two), store())
    cache = prefill(model(), jnp.asarray(prompt()[:1]), both, new_tokens=1)[1]
    first, whole = protected(scores(0, None)), protected(scores(0, None, 100))
    kept = held(cache)
    for l, h in np.ndindex(L, H):
        a, b = first[l, h].copy(), whole[l, h].copy()
        survivors = top(a, 12)
        b[[t for t in range(T) if t not in survivors]] = -np.inf
        assert kept[l][0][h] == top(b, 6)


def test_allocates_what_it_keeps():
    """Whichever layers it falls to: half of a prompt is half of the bytes, and a page a head."""
    big = dataclasses.replace(CONFIG, head_dim=64)

    def size(text):
        cache = init_cache(big, parse(text)[0][1], 1, 1024, prompt=1024)
        return nbytes(jax.eval_shape(finish, cache))

    page = L * H * 16 * (2 * 64 + 1) * 4
    # Positions are counted per head here, once for all in dense.
    assert size("kvzip(keep=0.5)") <= 0.5 * size("dense") * (1 + 1 / 64) + page + 4096
    cache = zipped(f"kvzip(keep=0.5, {HOW})")
    assert tokens_held(cache) == L * H * sum(n // 2 for n in LENGTHS)


@pytest.mark.parametrize("seed", range(20))
def test_overall_budget_is_the_best_of_all(seed):
    random = np.random.default_rng(seed)
    value = random.integers(0, 6, (3, 2, 2, 11)).astype(np.float32)  # ties
    value[random.random(value.shape) < 0.2] = -np.inf
    value[..., :2] = np.inf
    each = random.integers(2, 11, 2)
    got = overall().heads(jnp.asarray(value), jnp.broadcast_to(jnp.asarray(each), (3, 2)))
    for row in range(2):
        line = [
            (-value[l, row, h, t], t, l, h)
            for l, h, t in np.ndindex(3, 2, 11)
            if value[l, row, h, t] > -np.inf
        ]
        best = sorted(line)[: each[row] * 6]
        want = np.zeros((3, 2), int)
        for _, _, l, h in best:
            want[l, h] += 1
        np.testing.assert_array_equal(got[:, row], want)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kvzip(chunk=0)", "chunk=0"),
        ("kvzip(hint=-1)", "hint=-1"),
        ("kvzip(tokens=3)", "tokens=3"),
        ("kvzip(keep=0.5, tokens=9)", "give one of them"),
    ],
)
def test_refuses(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)
