"""ActQKV against NumPy: representatives, probes, budgets from layer to layer, what is read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    Query,
    attend,
    best_blocks,
    commit,
    first,
    horizon,
    init_cache,
    rotate,
    start,
    store,
)
from kvjax.cache.look import reads
from kvjax.cache.readers.probe import Running, flatness, row_weights
from kvjax.cache.ring import Window
from kvjax.compress import actqkv
from kvjax.models import forward
from tests.compress import harness
from tests.compress import reference as ref
from tests.compress.harness import model
from tests.compress.reference import HQ, LENGTHS, STEPS, B, D, G, L, row, softmax, turn
from tests.compress.test_common import SETTINGS

SINKS, LOCAL, BLOCK, FAR = 2, 4, 2, 3
HOW = dict(blocks=3, block=BLOCK, sinks=SINKS, local=LOCAL, least=1, representatives=1, warmup=6)


# --- the method in NumPy, one layer of one sequence, no loop of commits but for what closes ---


def closed(n):
    """Blocks closed when n tokens have come: remainder beyond the window, a block at a time."""
    rest, blocks = max(n - SINKS, 0), 0
    while rest - BLOCK >= LOCAL:
        rest, blocks = rest - BLOCK, blocks + 1
    return blocks


def attention(r, n):
    """Causal attention among the first n tokens, [HQ, n, n]."""
    s = np.einsum("hid,hjd->hij", r.q[:, :n], np.repeat(r.k[:, :n], G, 0))
    return softmax(np.where(np.tril(np.ones((n, n), bool)), s, -np.inf))


def far(raw):
    """Queries [..., D] as they look at keys FAR tokens back."""
    return turn(raw.reshape(-1, 1, D), np.array([FAR])).reshape(raw.shape)


def representatives(r, n, tokens):
    """[HQ, blocks, D]."""
    p = attention(r, n)
    i, j = np.mgrid[:n, :n]
    got = np.where((i - j >= 0) & (i - j < LOCAL), p, 0).sum(1)  # [HQ, n]
    out = np.zeros((HQ, closed(n), D))
    for h, b in np.ndindex(*out.shape[:2]):
        at = np.arange(SINKS + b * BLOCK, SINKS + (b + 1) * BLOCK)
        best = at[np.argsort(-got[h, at], kind="stable")[:tokens]]
        out[h, b] = r.plain[h // G, best].mean(0)
    return out


def scores(probe, reps):
    """Cosines over all heads together: probe [HQ, D], reps [HQ, N, D]."""
    flat = reps.transpose(1, 0, 2).reshape(reps.shape[1], -1)
    probe = probe.reshape(-1)
    return flat @ probe / np.linalg.norm(flat, axis=1) / np.linalg.norm(probe)


def entropy(s):
    p = softmax(s)
    return -(p * np.log(p + 1e-10)).sum() / np.log(len(s))


def probe_of(h, before, how="activation"):
    """h, before [HQ, rows, D]: this window's and all earlier rows'; two passes over all of them."""
    whole = np.concatenate([before, h], 1)
    mean, var = whole.mean(1, keepdims=True), whole.var(1, ddof=1, keepdims=True)
    a = ((h - mean) ** 2 / (var + var.mean() / 100)).mean((0, 2))
    w = {"activation": a, "mean": np.ones(len(a)), "largest": (a == a.max()) * 1.0}[how]
    return np.einsum("t,htd->hd", w / w.sum(), h)


def samples(r, n, tokens):
    """How flat the scores of each row after the prompt were, of n tokens in all."""
    found = []
    for m in range(r.n, n):  # row m chose when m tokens had come
        if closed(m) > 1:
            found.append(entropy(scores(far(r.raw[:, m]), representatives(r, m, tokens))))
    return found


def budgets(flat, blocks, most, least, there):
    """Blocks of each layer; flat: of each layer, or None: all alike."""
    left, out = blocks * L, []
    for layer in range(L):
        part = 1 / (L - layer) if flat is None else flat[layer] / sum(flat[layer:])
        k = np.clip(np.round(part * left), min(there, least), min(there, most))
        out.append(int(k))
        left -= int(k)
    return out


def read(r, n, q, raw, pos, chosen, h, constant=True):
    """(out, lse) of one row of head h that reads the window, the first tokens and some blocks."""
    blocks = [SINKS + b * BLOCK + i for b in chosen for i in range(BLOCK)]
    at = np.array([*range(SINKS), *blocks, *range(SINKS + closed(n) * BLOCK, n)])
    near = q @ r.k[h // G, at].T
    away = far(raw) @ r.plain[h // G, at].T
    s = np.where((pos - at < FAR) | (not constant), near, away)
    lse = np.log(np.exp(s - s.max()).sum()) + s.max()
    return softmax(s) @ r.v[h // G, at], lse


# --- our side ---


@jax.jit
def asked(cache, raw, pos):
    """Rows raw [L, B, HQ, R, D] at pos [B, R]: what all layers read, one after the other."""

    def layer(carry, xs):
        l, raw = xs
        rope, span = cache.constants["rope"][l], cache.constants["span"][l]
        q = rotate(raw, pos[:, None], rope)
        query = Query(q, raw, pos, rope, span, cache.constants, jnp.zeros((B,), jnp.int32))
        part, carry = attend(cache, l, query, carry)
        return carry, (part.out, part.lse)

    carry, parts = jax.lax.scan(layer, start(cache, pos), (jnp.arange(L), raw))
    return *parts, carry[0][-1]["left"]


def grown(how, steps):
    """Our cache after the prompt and so many steps, whose rows saw everything."""
    cache = ref.ours_chain(actqkv(**how))
    for i in range(steps):
        seen = [
            [[row(l, b).q[h, n + i] @ row(l, b).k[h // G, : n + i + 1].T for h in range(HQ)]
             for b, n in enumerate(LENGTHS)]
            for l in range(L)
        ]  # fmt: skip
        cache = ref.advance(cache, i, seen)
    return cache


def index_of(cache):
    """The index of our reader."""
    return cache.state[0][-1].index


def with_samples(cache, flat):
    """Our cache as if all samples of each layer had been `flat` [L]."""
    index = index_of(cache)
    x = jnp.broadcast_to(jnp.asarray(flat)[:, None, None, None], index.samples.shape)
    held = cache.state[0][-1].replace(index=dataclasses.replace(index, samples=x))
    return cache.replace(state=((*cache.state[0][:-1], held),))


def queries(rows, step):
    raw = np.random.default_rng(7).standard_normal((L, B, HQ, rows, D)).astype(np.float32)
    raw += 3 * np.random.default_rng(8).standard_normal((L, 1, HQ, 1, D)).astype(np.float32)
    return raw, np.asarray([[n + step + t for t in range(rows)] for n in LENGTHS])


CASES = [  # what differs from HOW, steps, samples set by hand
    (dict(), 0, None),
    (dict(), STEPS, None),
    (dict(), STEPS, (0.3, 0.9)),  # 6 blocks are read as 2 and 4 by single rows
    (dict(representatives=2, dynamic=False, constant=False), STEPS, (0.3, 0.9)),
]


@pytest.mark.parametrize(("change", "steps", "given"), CASES)
def test_rows_read_what_the_method_says(change, steps, given):
    """Three rows at once (each alone) and a window of 18 (one choice for all), in every layer."""
    how = dict(dynamic=True, constant=True) | HOW | change
    cache = grown(HOW | change, steps)
    for b, l in np.ndindex(B, L):
        taken = samples(row(l, b), LENGTHS[b] + steps, how["representatives"])
        index, count = index_of(cache), len(taken)
        assert int(index.count[l, b, 0]) == count
        for i, value in list(enumerate(taken))[-how["warmup"] :]:
            ours = index.samples[l, b, 0, i % how["warmup"]]
            np.testing.assert_allclose(ours, value, atol=1e-5)
    full = steps == STEPS and how["warmup"] <= STEPS
    flat = given
    if given is not None:
        cache = with_samples(cache, given)
    elif full:
        flat = np.asarray(index_of(cache).samples).mean((1, 2, 3))
    flat = flat if full and how["dynamic"] else None
    most, least = (6, 1) if how["dynamic"] else (3, 3)
    for rows in (3, 18):
        raw, pos = queries(rows, steps)
        out, lse, left = asked(cache, jnp.asarray(raw), jnp.asarray(pos, jnp.int32))
        for b in range(B):
            n = LENGTHS[b] + steps
            k = budgets(flat if rows == 3 else None, how["blocks"], most, least, closed(n))
            if given is not None:
                assert k == ([2, 4] if rows == 3 and how["dynamic"] else [3, 3])
            assert (np.asarray(left)[b] == how["blocks"] * L - sum(k)).all()
            reps = {l: representatives(row(l, b), n, how["representatives"]) for l in range(L)}
            for l in range(L):
                r, h_all = row(l, b), far(raw[l, b].astype(np.float64))
                window = probe_of(h_all, far(r.raw[:, :n]))
                for t in range(rows):
                    s = scores(h_all[:, t] if rows == 3 else window, reps[l])
                    chosen = np.argsort(-s, kind="stable")[: k[l]]
                    for h in range(HQ):
                        q = turn(raw[l, b, h], pos[b])[t]
                        want, weight = read(
                            r, n, q, raw[l, b, h, t], pos[b, t], chosen, h,
                            how["constant"],
                        )  # fmt: skip
                        np.testing.assert_allclose(out[l, b, h, t], want, atol=3e-5, rtol=3e-5)
                        np.testing.assert_allclose(lse[l, b, h, t], weight, atol=3e-5, rtol=3e-5)


# --- laws ---

values = st.integers(0, 2**31 - 1)


@settings(max_examples=10, deadline=None)
@given(values, st.lists(st.integers(1, 9), min_size=1, max_size=4), values)
def test_running_statistics_are_those_of_two_passes(seed, sizes, drop):
    """However rows are cut into windows of the shape 9, and whatever stands in padding."""
    rng = np.random.default_rng(seed)
    running, kept = Running.empty((1, 2, 3)), []
    for size in sizes:
        h = rng.standard_normal((1, 2, 9, 3)).astype(np.float32) * 3 + 5
        valid = rng.permutation(np.arange(9) < size)[None]
        running = running.take_up(jnp.asarray(h), jnp.asarray(valid))
        kept.append(h[:, :, valid[0]])
    kept = np.concatenate(kept, 2).astype(np.float64)
    assert int(running.count[0, 0]) == kept.shape[2]
    np.testing.assert_allclose(running.mean, kept.mean(2), rtol=1e-5, atol=1e-5)
    if kept.shape[2] > 1:
        np.testing.assert_allclose(running.variance, kept.var(2, ddof=1), rtol=1e-4, atol=1e-4)


def test_equal_windows_follow_the_update_of_the_released_code():
    """Its formulas, window by window, for windows of one size."""
    rng, m = np.random.default_rng(3), 6
    running = Running.empty((1, 2, 3))
    for n in range(4):
        h = rng.standard_normal((1, 2, m, 3)).astype(np.float32)
        u, v = h.mean(2), h.var(2)
        if n == 0:
            var, mean = v * m / (m - 1), u
        else:
            var = (var * (n - 1 / m) + v + (u - mean) ** 2 / (1 + 1 / n)) / (n + 1 - 1 / m)
            mean = (n * mean + u) / (n + 1)
        running = running.take_up(jnp.asarray(h), jnp.ones((1, m), bool))
        np.testing.assert_allclose(running.variance, var, rtol=1e-5)
        np.testing.assert_allclose(running.mean, mean, rtol=1e-4, atol=1e-6)


def test_weights_of_rows():
    rng = np.random.default_rng(4)
    h = rng.standard_normal((1, 2, 9, 3)).astype(np.float32)
    valid, pos = jnp.asarray(np.arange(9)[None] < 7), jnp.arange(9)[None]
    of = lambda h, how="activation": np.asarray(  # noqa: E731
        row_weights(Running.empty((1, 2, 3)).take_up(h, valid), h, valid, pos, how)
    )
    for how in ("activation", "largest", "mean", "random"):
        w = of(jnp.asarray(h), how)
        assert abs(w.sum() - 1) < 1e-6 and (w >= 0).all() and (w[:, 7:] == 0).all()
    np.testing.assert_allclose(of(h), of(h * 37), rtol=1e-5)  # units do not matter
    assert of(h, "largest")[0, of(h)[0].argmax()] == 1
    alike = np.where(np.arange(9)[:, None] % 2, 1.0, -1.0) * np.ones((1, 2, 9, 3))
    even = row_weights(Running(jnp.ones((1, 1)), jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))),
                       alike, valid, pos)  # fmt: skip
    np.testing.assert_allclose(even, of(alike, "mean"), rtol=1e-6)  # equal deviations: the mean
    h[:, 1, 4] += 20
    assert of(h).argmax() == 4  # an unusual row
    same = jnp.ones((1, 2, 9, 3))
    np.testing.assert_allclose(of(same), of(same, "mean"))  # no spread at all


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 12))
@settings(max_examples=20, deadline=None)
def test_flatness_lies_between_zero_and_one(score, more):
    x = np.full(24, np.nan, np.float32)
    x[: len(score)] = score
    found = float(flatness(jnp.asarray(x), jnp.arange(24) < len(score)))
    assert -1e-6 <= found <= 1 + 1e-6
    if len(set(score)) == 1:
        assert abs(found - 1) < 1e-5


# --- a prompt in windows, through a model ---


@jax.jit
def window(cache, x, pos):
    logits, new = forward(model(), None, pos, cache, phase="prefill", embeddings=x, logits="last")
    return logits[:, 0], commit(cache, new, phase="prefill")


def in_windows(lengths, **how):
    """Last logits of prompts [3, 32] of these lengths, in windows of 17 rows and what is left."""
    cache = init_cache(harness.CONFIG, actqkv(block=2, representatives=1, **how), 3, 34, prompt=34)
    x = np.pad(harness.rows(), ((0, 0), (0, 2), (0, 0)), constant_values=np.nan)
    pos = np.where(np.arange(34) < np.asarray(lengths)[:, None], np.arange(34), -1)
    found = []
    for at in (slice(0, 17), slice(17, 34)):
        logits, cache = window(cache, jnp.asarray(x[:, at]), jnp.asarray(pos[:, at], jnp.int32))
        found.append(np.asarray(logits))
    return [found[int(n > 17)][i] for i, n in enumerate(lengths)]


def test_windows_of_a_prompt():
    """All blocks read where they stand: dense, whatever the lengths."""
    lengths = (32, 29, 17)
    pos = np.tile(np.arange(32, dtype=np.int32), (3, 1))
    want = np.asarray(harness.plain(model(), harness.rows(), pos))
    want = [want[i, n - 1] for i, n in enumerate(lengths)]
    everything = dict(blocks=40, sinks=1, local=6, constant=False)
    np.testing.assert_allclose(in_windows(lengths, **everything), want, atol=2e-5)


def test_horizon():
    """Until samples are complete a block must close; after that every row counts."""
    assert np.asarray(horizon(grown(HOW, 0))).tolist() == [2, 1]
    assert np.asarray(horizon(grown(HOW, STEPS))).tolist() == [1, 1]
    equal = actqkv(**(HOW | dict(dynamic=False)))
    index = index_of(init_cache(ref.CONFIG, equal, B, 36, prompt=24))
    assert equal.stages[1].reader.horizon(index) is None


@jax.jit
def one_row(cache, at, x):
    return forward(model(), None, at, cache, embeddings=x, statistics=True, logits="none")[1]


@pytest.mark.slow
def test_a_look_at_what_is_read():
    _, cache = harness.base(SETTINGS["actqkv, layers alike"])
    found = reads(cache, one_row(cache, cache.length[:, None], jnp.asarray(harness.rows()[:, :1])))
    for b, length in enumerate(np.asarray(harness.LENGTHS) + harness.STEPS):
        some = 2 + 2 * 2 + length - 2 - 2 * ((length - 2 - 4) // 2)
        assert (found[:, b].sum(-1) == some).all()
        assert found[:, b, :, :2].all() and found[:, b, :, length - 4 : length].all()
        assert (found[:, b] == found[:, b, :1]).all()  # one choice for all heads


# --- what is refused ---


def test_refused():
    window = Window(8, 4)
    reader = best_blocks(2, 4, window=8)
    for how in (
        dict(rope="after", keys=window, values=window),
        dict(rope="before", keys=window, values=Window(9, 4)),
        dict(rope="before", keys=Window(8, 1), values=Window(8, 1)),
        dict(rope="before", keys=Window(7, 4), values=Window(7, 4)),
    ):
        with pytest.raises(ValueError, match="expected rope='before' and keys and values"):
            store(reader=reader, **how)
    for how in (dict(reach=8), dict(reach=9, rope="before", keys=window, values=window)):
        with pytest.raises(ValueError, match="at least so many exact tokens"):
            store(**how)
    with pytest.raises(ValueError, match="expected 'true', 'slot' or a distance"):
        first(4, -1)
    with pytest.raises(ValueError, match="least <= blocks"):
        best_blocks(4, least=5)
    with pytest.raises(ValueError, match=r"actqkv\(least=50"):
        actqkv(least=50)
    with pytest.raises(ValueError, match="expected one of activation"):
        actqkv(probe="median")
