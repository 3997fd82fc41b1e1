"""ZipVL against NumPy: whom the probes choose, what a layer computes, what is stored how."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    LayerMark,
    Query,
    chain,
    covering,
    later,
    recent,
    rope_of,
    sift,
    store,
)
from kvjax.compress import parse, zipvl
from kvjax.decode import prefill
from kvjax.models import forward
from tests.compress import plain_model
from tests.compress.harness import CONFIG as MODEL
from tests.compress.harness import LENGTHS as SIZES
from tests.compress.harness import PROMPT, held, inputs, model
from tests.compress.reference import (
    LENGTHS,
    STEPS,
    B,
    G,
    L,
    T,
    advance,
    agree,
    ours_chain,
    per_channel,
    per_token,
    row,
    softmax,
)  # fmt: skip

TAU, PROBES, DRAWN = 0.6, 4, 6
RULE = covering(TAU, recent=PROBES, drawn=DRAWN)


def luck(layer, n, seed=0):
    """The draw of each position; which generator is no part of the method."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    return np.asarray(jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key, p)))(
        jnp.arange(n)))  # fmt: skip


def important(layer, q, k, tau=TAU, probes=PROBES, drawn=DRAWN, ratio=None, last=1):
    """bool [n], and normalised scores: steps 1 to 5 on q [Hq, n, D], k [H, n, D]."""
    n = q.shape[1]
    late = list(range(max(n - probes, 0), n))
    early = sorted(range(n - len(late)), key=lambda j: -luck(layer, n)[j])[:drawn]
    asks = sorted(late + early)
    p = plain_model.probabilities(q, k)[:, asks]
    a = p.sum((0, 1))
    ordered = np.sort(a)[::-1]
    number = next(c for c in range(1, n + 1) if ordered[:c].sum() >= tau * a.sum() - 1e-12)
    number = number if ratio is None else int(np.ceil(ratio * n))
    number = min(max(number, last), n)
    seen_by = np.asarray([sum(i >= j for i in asks) for j in range(n)])
    value = a / np.maximum(seen_by, 1)
    best = value.copy()
    best[n - last :] = np.inf
    rows = np.zeros(n, bool)
    rows[np.argsort(-best, kind="stable")[:number]] = True
    return rows, value


@functools.cache
def plainly(index, **how):
    """(logits, rows by layer, scores by layer) of one sequence."""
    n, chosen, scores = SIZES[index], [], []

    def attention(l, q, k, v):
        rows, value = important(l, q, k, **how)
        chosen.append(rows)
        scores.append(value)
        return plain_model.mix(plain_model.probabilities(q, k, rows[:, None] & rows), v)

    out = plain_model.run(inputs()[0][index, :n], np.arange(n), attention)
    return out, chosen, scores


@functools.partial(jax.jit, static_argnames="rule")
def under(model, x, pos, rule):
    return forward(model, None, pos, phase="prefill", embeddings=x, rule=rule)


@pytest.mark.parametrize(
    "how", [{}, {"tau": 0.3, "probes": 1, "drawn": 0}, {"ratio": 0.4, "last": 3}], ids=str
)
def test_layers_choose_and_compute_as_stated(how):
    names = {"tau": "cover", "probes": "recent"}
    settings = {"cover": TAU, "recent": PROBES, "drawn": DRAWN}
    settings |= {names.get(n, n): x for n, x in how.items()}
    x, pos, *_ = inputs(fill=np.nan)
    logits, new = under(model(), x, pos, covering(**settings))
    counts = set()
    for b, n in enumerate(SIZES):
        want, chosen, scores = plainly(b, **how)
        np.testing.assert_allclose(logits[b, :n], want, atol=2e-5)
        for l in range(MODEL.layers):
            note = np.asarray(new.kv.extra["important"][l, b, 0, :n])
            np.testing.assert_array_equal(note > -np.inf, chosen[l])
            np.testing.assert_allclose(note[chosen[l]], scores[l][chosen[l]], rtol=1e-4)
            assert chosen[l][-1] and 0 < chosen[l].sum() < n
            counts.add(chosen[l].mean())
    assert len(counts) > 2 or "ratio" in how


def test_all_positions_as_probes_give_exact_column_sums():
    pos = inputs()[1]
    rule = covering(0.5, recent=PROMPT, drawn=0)
    q, k = (np.random.default_rng(5).standard_normal((3, h, PROMPT, 8)) for h in (4, 2))
    q, k = q.astype(np.float32), k.astype(np.float32)
    zero = jnp.zeros(())
    query = Query(q, q, jnp.asarray(pos), rope_of(MODEL, 8)[0], zero, {}, zero)
    got, seers = rule.received(jnp.asarray(0), query, k)
    for b, n in enumerate(SIZES):
        p = plain_model.probabilities(q[b, :, :n], k[b, :, :n])
        np.testing.assert_allclose(got[b, :n], p.sum((0, 1)), rtol=1e-5)
        np.testing.assert_array_equal(seers[b, :n], n - np.arange(n))
        assert (got[b, n:] == 0).all()


@jax.jit
def _choose(q, k, pos):
    zero = jnp.zeros(())
    query = Query(q, q, pos, rope_of(MODEL, 8)[0], zero, {}, zero)
    taus = (0.1, 0.5, 0.8, 0.95, 0.999, 1.0)
    return [covering(t, recent=4, drawn=4).choose(jnp.asarray(1), query, k, ())[0].rows
            for t in taus]  # fmt: skip


def test_more_are_important_the_more_they_are_to_hold():
    draw = np.random.default_rng(0)
    q, k = (2 * draw.standard_normal((3, h, PROMPT, 8)).astype(np.float32) for h in (4, 2))
    pos = inputs()[1]
    sets = [np.asarray(rows) for rows in _choose(q, k, pos)]
    counts = np.asarray([rows.sum(1) for rows in sets])
    assert (np.diff(counts, axis=0) >= 0).all() and (counts[0] < counts[2]).all()
    np.testing.assert_array_equal(sets[-1], pos >= 0)
    for rows in sets:
        assert all(rows[b, n - 1] and not rows[b, n:].any() for b, n in enumerate(SIZES))


SETTINGS = dict(probes=PROBES, drawn=DRAWN, interval=5, group=4)


def test_a_prompt_is_split_as_its_layers_chose():
    tokens = np.random.default_rng(1).integers(0, 50, (3, PROMPT))
    text = dict(tau=TAU, **SETTINGS)
    logits, cache = prefill(
        model(), jnp.asarray(tokens), zipvl(**text), lengths=jnp.asarray(SIZES), new_tokens=8
    )
    table = np.asarray(model().embed[...], np.float64)
    for b, n in enumerate(SIZES):
        chosen = []

        def attention(l, q, k, v):
            rows, _ = important(l, q, k)
            chosen.append(rows)  # noqa: B023
            return plain_model.mix(plain_model.probabilities(q, k, rows[:, None] & rows), v)

        want = plain_model.run(table[tokens[b, :n]], np.arange(n), attention)
        np.testing.assert_allclose(logits[b], want[-1], atol=2e-5)
        for l in range(MODEL.layers):
            for stage, rows in ((2, chosen[l]), (3, ~chosen[l])):
                own = np.asarray(cache.state[0][stage].pos[l, b, 0])
                assert sorted(own[own >= 0]) == np.flatnonzero(rows).tolist()
    # Forgetting: the same choice, nothing else.
    _, cache = prefill(
        model(), jnp.asarray(tokens), zipvl(tau=TAU, probes=PROBES, drawn=DRAWN, evict=True),
        lengths=jnp.asarray(SIZES), new_tokens=8,
    )  # fmt: skip
    for l in range(MODEL.layers):
        assert held(cache)[l][2][0] == np.flatnonzero(chosen[l]).tolist()


def coded(k, v, at, bits):
    """What is read of positions `at`: keys in blocks of 4 by arrival, the rest of them exactly."""
    m = len(at) // 4 * 4
    k, v = k[:, at], v[:, at]
    if bits == 16:
        return k, v
    keys = np.concatenate([per_channel(k[:, :m], bits, 4), k[:, m:]], 1)
    return keys, per_token(v, bits, 4)


def split(a, tau):
    """Indices of the fewest largest of a that hold tau of its sum."""
    order = np.argsort(-a, kind="stable")
    number = next(c for c in range(1, len(a) + 1) if a[order[:c]].sum() >= tau * a.sum() - 1e-12)
    return sorted(order[:number].tolist())


@pytest.mark.parametrize(
    ("bits", "limit"), [((4, 2), 1.0), ((4, 2), 0.25), ((16, 16), 1.0)], ids=str
)
def test_decoding_splits_every_interval(bits, limit):
    """Prompts with random marks; then the newest of 5 tokens says which of them are important."""
    tau = 0.7
    draw = np.random.default_rng(2)
    marks = np.where(draw.random((L, B, T + STEPS)) < 0.5, draw.random((L, B, T + STEPS)), -np.inf)
    how = dict(tau=tau, bits=bits[0], low_bits=bits[1], limit=limit, **SETTINGS)
    cache = ours_chain(chain(*zipvl(**how).stages), extra={"important": marks})
    room = int(np.ceil(limit * (T + STEPS)))
    high, low, tail = {}, {}, {}
    for l, b in np.ndindex(L, B):
        n = LENGTHS[b]
        good = np.flatnonzero(marks[l, b, :n] > -np.inf)
        best = sorted(good[np.argsort(-marks[l, b, good], kind="stable")[:room]].tolist())
        high[l, b], low[l, b], tail[l, b] = best, sorted(set(range(n)) - set(best)), []

    def reads(l, b):
        r = row(l, b)
        parts = [coded(r.k, r.v, high[l, b], bits[0]), coded(r.k, r.v, low[l, b], bits[1]),
                 coded(r.k, r.v, tail[l, b], 16)]  # fmt: skip
        return tuple(np.concatenate(x, 1) for x in zip(*parts))

    heads = lambda l, b: list(zip(*reads(l, b)))  # noqa: E731
    agree(cache, heads)
    for i in range(STEPS):
        logits = {l: [None] * B for l in range(L)}
        for l, b in np.ndindex(L, B):
            r, n = row(l, b), LENGTHS[b] + i
            k, _ = reads(l, b)
            k = np.concatenate([k, r.k[:, n : n + 1]], 1)
            s = np.einsum("hd,hjd->hj", r.q[:, n], np.repeat(k, G, 0))
            logits[l][b] = s
            tail[l, b].append(n)
            if len(tail[l, b]) == 5:
                a = softmax(s).mean(0)[-5:]  # the newest row's, of the tail
                mine = [tail[l, b][j] for j in split(a, tau)]
                free = room - len(high[l, b])
                order = sorted(mine, key=lambda p: -a[p - n + 4])
                mine = sorted(order[:free])
                high[l, b] += mine
                low[l, b] += [p for p in tail[l, b] if p not in mine]
                tail[l, b] = []
        cache = advance(cache, i, logits)
        agree(cache, heads, i + 1)
    assert STEPS >= 10 and len(high[0, 0]) + len(low[0, 0]) == T + 10


def test_no_slot_is_lost():
    tokens = jnp.zeros((3, PROMPT), int)
    _, cache = prefill(model(), tokens, zipvl(**SETTINGS), new_tokens=8)
    counts = [np.asarray(own.seen) for own in cache.state[0][2:]]
    assert (counts[0] + counts[1] == PROMPT).all() and (counts[0] > 0).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zipvl(tau=0)", "tau=0"),
        ("zipvl(limit=1.5)", "limit=1.5"),
        ("zipvl(bits=9)", "bits=9"),
        ("zipvl(low_bits=0)", "low_bits=0"),
        ("zipvl(interval=1)", "interval=1"),
        ("zipvl(probes=0)", "probes=0"),
        ("zipvl(group=0)", "group=0"),
    ],
)
def test_refuses(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)


def test_parts_refuse():
    for bad in ({"cover": 1.2}, {"recent": 0}, {"sizes": -1}):
        with pytest.raises(ValueError, match="covering"):
            covering(**bad)
    with pytest.raises(ValueError, match="sift"):
        sift(LayerMark("x"), limit=0)
    with pytest.raises(ValueError, match="later"):
        later(parse("snapkv")[0][1].stages[0])
    with pytest.raises(ValueError, match="n must be at least 1"):
        recent(0)
    assert later(store()) == later(store())
