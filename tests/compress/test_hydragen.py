"""Hydragen: prefixes that rows share, against attention over copies and the whole model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import KV, New, Query, attend, commit, init_cache, nbytes, start
from kvjax.compress import dense, hydragen, parse, snapkv, streaming_llm
from kvjax.decode import extend, generate, positions_of, prefill, share
from kvjax.models import llama
from kvjax.models.config import Config
from tests.models.recurrent_zoo import CONFIGS

CONFIG = Config(50, 32, 48, 2, 4, 2, 8)
B, L, HQ, H, D = 4, 2, 4, 2, 8


# --- attention alone, against NumPy ---


FAR = 10**6


@functools.partial(jax.jit, static_argnames="span")
def probe(cache, new, q, pos, span):
    """Partials over a cache into which `new` was committed, queries already rotated."""
    cache = commit(cache, new)

    def layer(l):
        query = Query(
            q[l], q[l], pos, cache.constants["rope"][l], jnp.asarray(span), cache.constants,
            jnp.zeros((B,), jnp.int32), window=span < FAR,
        )  # fmt: skip
        return attend(cache, jnp.asarray(l), query, start(cache, pos))[0]

    parts = [layer(l) for l in range(L)]
    return jnp.stack([p.out for p in parts]), jnp.stack([p.lse for p in parts])


def parts_of(q, sets):
    """(out, lse) over several sets of keys and values as the paper joins them, natural logarithms.

    q [n, D]; sets of (K, V), [m, D] each, some of them empty.
    """
    outs, lses = [], []
    for k, v in sets:
        s = q @ k.T
        e = np.exp(s)
        lses.append(np.log(e.sum(-1)) if len(k) else np.full(len(q), -np.inf))
        outs.append(e @ v / e.sum(-1, keepdims=True) if len(k) else np.zeros((len(q), D)))
    top = np.max(lses, 0)
    w = np.exp(np.asarray(lses) - top)
    out = (w[..., None] * np.asarray(outs)).sum(0) / w.sum(0)[..., None]
    return out, top + np.log(w.sum(0))


@pytest.mark.parametrize(
    ("sizes", "span"),
    [
        ([[10]], FAR),
        ([[3], [6, 7]], FAR),
        ([[7, 0], [9, 10, 4, 1]], FAR),  # one sequence of the first level is empty
        ([[2], [5], [3, 4]], FAR),
        ([[1500]], FAR),  # more than one block
        ([[6, 9]], 7),  # a sliding window, which every row has for itself
    ],
)
def test_what_rows_read(sizes, span):
    rng = np.random.default_rng(len(sizes) + sizes[0][0])
    shared, levels = {}, []
    for number, lengths in enumerate(sizes):
        s, n = len(lengths), max(lengths)
        k, v = rng.standard_normal((2, L, s, H, n, D))
        there = np.arange(n) < np.asarray(lengths)[:, None]
        hide = lambda x, there=there: np.where(there[None, :, None, :, None], x, 9.0)  # noqa: E731
        pos = np.where(there, np.arange(n), -1)[None, :, None]
        shared[f"prefix_{number}" if number else "prefix"] = KV(
            jnp.asarray(hide(k), jnp.float32), jnp.asarray(hide(v), jnp.float32),
            jnp.asarray(pos, jnp.int32),
        )  # fmt: skip
        levels.append((k, v, lengths))
    own = 3
    most = sum(max(lengths) for lengths in sizes)
    before = [sum(x[j * len(x) // B] for x in sizes) for j in range(B)]
    cache = init_cache(CONFIG, hydragen(len(sizes)), B, most + own, constants=shared)
    np.testing.assert_array_equal(cache.length, before)
    k, v = rng.standard_normal((2, L, B, H, own, D)).astype(np.float32)
    pos = np.asarray(before)[:, None] + np.arange(own)
    # Rotary angle zero: keys here are what is compared, not where they stand.
    still = dataclasses.replace(
        cache.constants["rope"], freq=jnp.zeros_like(cache.constants["rope"].freq)
    )
    cache = cache.replace(constants={**cache.constants, "rope": still})
    q = rng.standard_normal((L, B, HQ, 2, D)).astype(np.float32)
    new = New(KV(jnp.asarray(k), jnp.asarray(v), jnp.asarray(pos, jnp.int32)[None, :, None]))
    after = jnp.asarray(pos[:, -1:] + np.arange(1, 3), jnp.int32)
    out, lse = probe(cache, new, jnp.asarray(q), after, span)
    for l, b, h, t in np.ndindex(L, B, HQ, 2):
        g = h // (HQ // H)
        sets = [
            (ks[l, j, g, : x[j]], vs[l, j, g, : x[j]])
            for ks, vs, x in levels
            for j in [b * len(x) // B]
        ]
        sets.append((k[l, b, g], v[l, b, g]))
        near = int(after[b, t]) - span  # keys at this position and before are not seen
        if span < FAR:  # one level, so that a key's place is its position
            sets = [
                (x[max(near - at + 1, 0) :], y[max(near - at + 1, 0) :])
                for (x, y), at in zip(sets, (0, before[b]))
            ]
        row = q[l, b, h, t : t + 1].astype(float)
        want = parts_of(row, sets)
        np.testing.assert_allclose(out[l, b, h, t], want[0][0], atol=1e-5)
        np.testing.assert_allclose(lse[l, b, h, t], want[1][0], atol=1e-5)
        # and that is plain attention over all of them
        keys, values = (np.concatenate(x) for x in zip(*sets))
        plain = np.exp(row @ keys.T)
        np.testing.assert_allclose(want[0], plain / plain.sum() @ values, atol=1e-6)


# --- through the model ---


@pytest.fixture(scope="module")
def model():
    return llama.init(CONFIG, jax.random.key(0))


TOKENS = np.random.default_rng(3).integers(0, 50, (B, 28)).astype(np.int32)
ROOT, LEAF, OWN = 9, 5, 6  # tokens of the two levels and of each row; then answers


def sequences():
    """Rows of which all share 9 tokens, and the two halves 5 more each."""
    rows = TOKENS.copy()
    rows[:, :ROOT] = rows[0, :ROOT]
    for half in (0, 2):
        rows[half : half + 2, ROOT : ROOT + LEAF] = rows[half, ROOT : ROOT + LEAF]
    return rows[:, : ROOT + LEAF + OWN]


@pytest.fixture(scope="module")
def copies(model):
    """(logits, tokens) from a cache that holds every row whole."""
    logits, cache = prefill(model, sequences(), dense(), new_tokens=8)
    out = generate(model, cache, logits, 8, stop=())
    return np.asarray(logits), np.asarray(out.tokens), np.asarray(out.logits), nbytes(cache)


def same(model, logits, cache, copies, go_on=True):
    np.testing.assert_allclose(logits, copies[0], atol=2e-5, rtol=0)
    if not go_on:
        return
    out = generate(model, cache, logits, 8, stop=())
    np.testing.assert_array_equal(out.tokens, copies[1])
    np.testing.assert_allclose(out.logits, copies[2], atol=2e-5, rtol=0)


def tree(model, chunk=None):
    rows = sequences()
    shared = share(model, rows[0, :ROOT], chunk=chunk)
    return share(model, rows[[0, 2], ROOT : ROOT + LEAF], under=shared)


def own(rows=slice(None)):
    return sequences()[rows, ROOT + LEAF :]


@pytest.mark.parametrize(
    ("method", "go_on"),
    [
        (hydragen(levels=2), True),
        # The prompt of a row is held whole until it is finished: prefixes are read meanwhile too.
        (hydragen(levels=2, storage=snapkv(keep=1.0, window=4, kernel=3)), False),
        # Positions by slot count what is shared: nothing was evicted, so none is moved.
        (hydragen(levels=2, storage=streaming_llm(tokens=16, sinks=2)), True),
    ],
)
def test_a_tree_equals_copies(model, copies, method, go_on):
    found = prefill(model, own(), method, new_tokens=8, constants=tree(model))
    same(model, *found, copies, go_on)


def test_levels_chunks_and_groups_of_one(model, copies):
    """Where a prefix is split, how it is run and how many rows share it changes nothing."""
    rows = sequences()
    shared = share(model, rows[:, :4], chunk=3)  # groups of one
    for cut in (slice(4, 5), slice(5, 9)):
        shared = share(model, rows[:, cut], under=shared)
    found = prefill(model, rows[:, 9:], hydragen(levels=3), new_tokens=8, chunk=4, constants=shared)
    same(model, *found, copies, go_on=False)


def test_prefixes_of_unlike_length(model, copies):
    """Two prefixes of 9 and 14 tokens side by side, padded; rows begin where theirs ends."""
    rows = sequences()
    padded = np.zeros((2, 14), np.int32)
    padded[0, :9], padded[1] = rows[0, :9], rows[2, :14]
    shared = share(model, padded, lengths=jnp.asarray([9, 14]))
    mine = np.zeros((B, 11), np.int32)
    mine[:2], mine[2:, :6] = rows[:2, 9:], rows[2:, 14:]
    lengths = jnp.asarray([11, 11, 6, 6])
    logits, cache = prefill(
        model, mine, hydragen(), lengths=lengths, new_tokens=8, constants=shared
    )
    same(model, logits, cache, copies)


def test_one_row_and_a_second_turn(model, copies):
    """A batch of one, begun with one token, its other tokens as a later turn."""
    shared = share(model, sequences()[0, : ROOT + LEAF])
    mine = own(slice(1))
    _, cache = prefill(model, mine[:, :1], hydragen(), new_tokens=16, constants=shared)
    assert int(cache.length[0]) == ROOT + LEAF + 1
    at = positions_of(mine[:, 1:]) + cache.length[:, None]
    logits, cache = extend(model, cache, mine[:, 1:], at)
    np.testing.assert_allclose(logits[0], copies[0][0], atol=2e-5, rtol=0)
    out = generate(model, cache, logits, 8, stop=())
    np.testing.assert_array_equal(out.tokens[0], copies[1][0])


def test_without_a_prefix_it_is_dense(model, copies):
    logits, cache = prefill(model, sequences(), hydragen(levels=2), new_tokens=8)
    np.testing.assert_array_equal(logits, copies[0])
    np.testing.assert_array_equal(generate(model, cache, logits, 8, stop=()).logits, copies[2])


def test_bytes(model, copies):
    """What is shared is counted once, whatever the batch; rows have room for their own alone."""
    shared = tree(model)
    each = 2 * L * H * D * 4  # of a token
    for batch in (2, 4, 32):
        cache = init_cache(CONFIG, hydragen(levels=2), batch, 28, prompt=6, constants=shared)
        counts = ROOT + 2 * LEAF  # tokens shared
        alone = nbytes(init_cache(CONFIG, dense(), batch, 14, prompt=6))
        assert nbytes(cache) == counts * (each + 4) + alone + 2 * 4 * batch
    _, cache = prefill(model, own(), hydragen(levels=2), new_tokens=8, constants=shared)
    assert nbytes(cache) < 0.8 * copies[3]


# --- what is refused ---


def test_refuses(model):
    for levels in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"hydragen\(levels=.*\): expected an integer"):
            hydragen(levels=levels)
    shared = share(model, sequences()[[0, 2], :4])
    with pytest.raises(ValueError, match=r"'prefix'\] holds 2 sequences.*batch=3"):
        init_cache(CONFIG, hydragen(), 3, 20, constants=shared)
    with pytest.raises(ValueError, match=r"max_length=8: 4 tokens .* and 5 of a prompt"):
        init_cache(CONFIG, hydragen(), 2, 8, prompt=5, constants=shared)
    with pytest.raises(ValueError, match=r"shared prefixes \['prefix'\], which .* never reads"):
        init_cache(CONFIG, dense(), 2, 20, constants=shared)
    deep = {**shared, "prefix_1": shared["prefix"]}
    with pytest.raises(ValueError, match=r"shared prefixes \['prefix_1'\]"):
        init_cache(CONFIG, parse("hydragen")[0][1], 2, 20, constants=deep)
    with pytest.raises(ValueError, match="not empty"):
        share(model, np.zeros((1, 0), np.int32))
    with pytest.raises(ValueError, match=r"under has \['prefix_1'\]: expected what `share` gave"):
        share(model, sequences()[:2, :4], under={"prefix_1": shared["prefix"]})


def test_refuses_recurrent_layers():
    shared = KV(jnp.zeros((2, 1, 2, 3, 8)), jnp.zeros((2, 1, 2, 3, 8)), jnp.zeros((1, 1, 1, 3)))
    with pytest.raises(ValueError, match="recurrent layers, whose state"):
        init_cache(CONFIGS["hybrid"], hydragen(), 1, 20, constants={"prefix": shared})
