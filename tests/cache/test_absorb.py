"""Merging rules and shared budgets: their laws, against plain NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import KV, Spec, coverage, evenness, moving, nearest
from kvjax.cache import given as given_budget
from kvjax.cache.budgets import covered, shared
from kvjax.cache.stages.absorb import WORTH

L, B, H, N, M, D = 2, 1, 2, 5, 7, 4
SPEC = Spec(L, B, H, H, D, N + M)


def tokens(rng, size, start):
    k, v = (rng.standard_normal((L, B, H, size, D)).astype(np.float32) for _ in range(2))
    pos = np.broadcast_to(start + np.arange(size), (L, B, H, size)).astype(np.int32)
    extra = {
        "absorbed": np.zeros((L, B, H, size), np.float32),
        WORTH: rng.random((L, B, H, size)).astype(np.float32),
    }
    return KV(
        jnp.asarray(k),
        jnp.asarray(v),
        jnp.asarray(pos),
        {n: jnp.asarray(x) for n, x in extra.items()},
    )


def both(seed):
    rng = np.random.default_rng(seed)
    return tokens(rng, N, 0), tokens(rng, M, N)


def cos(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


RULES = {
    "count": nearest(0.6),
    "similarity": nearest(moving(0.5), "similarity"),
    "score": nearest(0.05, "score", values=True, direction=True, among=0.8, bias=True),
}


def by_hand(rule, stay, lose, l, h):
    """k, v, absorbed of one head, and who was absorbed."""
    k, v, lk, lv = (
        np.asarray(x)[l, 0, h].astype(np.float64) for x in (stay.k, stay.v, lose.k, lose.v)
    )
    u = np.array([[cos(a, b) for b in k] for a in lk])
    if rule.values:
        u = np.maximum(u, 0) * np.maximum([[cos(a, b) for b in v] for a in lv], 0)
    best, to = u.max(1), u.argmax(1)
    if rule.weight == "similarity":
        every = []
        for g in range(H):
            gk, glk = np.asarray(stay.k)[l, 0, g], np.asarray(lose.k)[l, 0, g]
            every += [max(cos(a, b) for b in gk) for a in glk]
        near = best >= np.mean(every)
        mine, theirs = np.full(N, np.e), np.exp(best)
    else:
        near = best >= rule.threshold
        mine, theirs = np.ones(N), np.ones(M)
    if rule.weight == "score":
        mine, theirs = (
            np.asarray(x.extra[WORTH])[l, 0, h].astype(np.float64) for x in (stay, lose)
        )
        total, before = mine.sum() + theirs.sum(), mine.sum()
        for i in np.argsort(-theirs, kind="stable"):
            near[i] &= before < rule.among * total
            before += theirs[i]
    new_k, new_v = k.copy(), v.copy()
    for j in range(N):
        join = [i for i in range(M) if near[i] and to[i] == j]
        if not join:
            continue
        w = np.array([mine[j], *theirs[join]])
        w /= w.sum()
        new_v[j] = w @ np.concatenate([v[j : j + 1], lv[join]])
        rows = np.concatenate([k[j : j + 1], lk[join]])
        if rule.direction:
            mean = w @ (rows / np.linalg.norm(rows, axis=1, keepdims=True))
            new_k[j] = mean / np.linalg.norm(mean) * np.linalg.norm(k[j])
        else:
            new_k[j] = w @ rows
    joined = np.bincount(to[near], minlength=N)
    return new_k, new_v, joined, near


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_against_numpy(name, seed):
    rule, (stay, lose) = RULES[name], both(seed)
    got, near, _ = rule(stay, lose, rule.init(SPEC))
    for l, h in np.ndindex(L, H):
        k, v, joined, who = by_hand(rule, stay, lose, l, h)
        np.testing.assert_array_equal(near[l, 0, h], who)
        np.testing.assert_array_equal(got.extra["absorbed"][l, 0, h], joined)
        np.testing.assert_allclose(got.k[l, 0, h], k, atol=1e-5)
        np.testing.assert_allclose(got.v[l, 0, h], v, atol=1e-5)
        if rule.bias:
            np.testing.assert_allclose(got.extra["bias"][l, 0, h], np.log(1 + joined), atol=1e-6)
    assert near.any() and not near.all()


@pytest.mark.parametrize("name", RULES)
def test_whom_nobody_joins_stays_in_every_bit(name):
    rule, (stay, lose) = RULES[name], both(5)
    got, _, _ = rule(stay, lose, rule.init(SPEC))
    alone = np.asarray(got.extra["absorbed"]) == 0
    assert alone.any() and not alone.all()
    for a, b in ((got.k, stay.k), (got.v, stay.v)):
        np.testing.assert_array_equal(np.asarray(a)[alone], np.asarray(b)[alone])


@pytest.mark.parametrize("name", RULES)
def test_a_copy_changes_nothing_and_empty_slots_are_not_felt(name):
    rule, (stay, _) = RULES[name], both(6)
    copy = KV(stay.k, stay.v, stay.pos + N, stay.extra)
    got, _, _ = rule(stay, copy, rule.init(SPEC))
    np.testing.assert_allclose(got.k, stay.k, atol=1e-6)
    np.testing.assert_allclose(got.v, stay.v, atol=1e-6)
    none = KV(copy.k, copy.v, copy.pos * 0 - 1, copy.extra)
    got, near, memory = rule(stay, none, rule.init(SPEC))
    np.testing.assert_array_equal(got.k, stay.k)
    assert not near.any()
    # A threshold that has seen nothing knows nothing.
    assert all(np.isneginf(x).all() for x in memory.values())


def test_above_one_none_joins_and_values_stay_in_the_hull():
    stay, lose = both(7)
    got, near, _ = nearest(1.1)(stay, lose, {})
    assert not near.any() and (got.k == stay.k).all()
    got, near, _ = nearest(-1.0, "similarity")(stay, lose, {})
    assert near.all()
    low = jnp.minimum(stay.v.min(3), lose.v.min(3))[..., None, :]
    high = jnp.maximum(stay.v.max(3), lose.v.max(3))[..., None, :]
    assert ((got.v >= low - 1e-5) & (got.v <= high + 1e-5)).all()


def test_threshold_moves():
    rule = nearest(moving(0.25), "similarity")
    memory, means = rule.init(SPEC), []
    for seed in range(3):
        stay, lose = both(seed)
        best = rule._closest((stay.k, stay.v, stay.pos >= 0, lose.k, lose.v))[0]
        means.append(np.asarray(best).mean((2, 3)))
        memory = rule(stay, lose, memory)[2]
    want = 0.25 * means[2] + 0.75 * (0.25 * means[1] + 0.75 * means[0])
    np.testing.assert_allclose(memory["threshold"][..., 0], want, rtol=1e-5)


def test_bulk_goes_layer_by_layer_alike(monkeypatch):
    stay, lose = both(8)
    rule = RULES["score"]
    a = rule(stay, lose, {})
    monkeypatch.setattr("kvjax.cache.stages.absorb.AT_ONCE", 0)
    b = rule(stay, lose, {})
    np.testing.assert_allclose(a[0].k, b[0].k, atol=1e-6)
    np.testing.assert_array_equal(a[1], b[1])


# --- budgets ---


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 30))
def test_shared_is_exact(seed, layers, mean):
    rng = np.random.default_rng(seed)
    share = rng.normal(size=layers) * rng.choice([0.1, 1, 10])
    low, high = rng.integers(0, mean + 1), mean + rng.integers(0, 30)
    got = shared(share, np.asarray(layers * mean), np.asarray(low), np.asarray(high))
    assert got.sum() == layers * mean and (got >= low).all() and (got <= high).all()
    order = np.argsort(share)
    assert (np.diff(got[order]) >= -1).all()  # rounding the running sum


@pytest.mark.parametrize("seed", range(6))
def test_coverage_is_one_share_for_all_layers(seed):
    """Bisection for the share p, as the paper has it, finds the same sizes."""
    rng = np.random.default_rng(seed)
    value = rng.random((4, 1, 2, 20)).astype(np.float32) ** rng.integers(1, 6, (4, 1, 1, 1))
    value = np.broadcast_to(value[:, :, :1], value.shape)
    kept = 9
    got = np.asarray(coverage().heads(jnp.asarray(value), jnp.full((4, 1), kept)))[:, 0]
    assert (got[:, 0] == got[:, 1]).all() and got.sum() == 4 * 2 * kept
    share = -np.sort(-value[:, 0, 0].astype(np.float64), -1)
    share = np.cumsum(share / share.sum(-1, keepdims=True), -1)
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        sizes = (share < p).sum(-1) + 1
        low, high = (p, high) if sizes.sum() <= 4 * kept else (low, p)
    sizes = (share < low).sum(-1) + 1
    np.testing.assert_array_equal(got[:, 0], sizes)


def test_coverage_of_equal_layers_is_uniform_and_grows_nested():
    rng = np.random.default_rng(0)
    same = np.broadcast_to(rng.random((1, 1, 1, 16)), (3, 1, 2, 16)).astype(np.float32)
    heads = lambda v, n: np.asarray(coverage().heads(jnp.asarray(v), jnp.full((3, 1), n)))  # noqa: E731
    assert (heads(same, 5) == 5).all()
    other = rng.random((3, 1, 2, 16)).astype(np.float32)
    other[..., 0] = np.inf
    sizes = [heads(other, n) for n in range(2, 17)]
    assert all((b >= a).all() for a, b in itertools.pairwise(sizes)) and (sizes[-1] == 16).all()
    line = np.asarray(covered(jnp.asarray(other)))
    assert np.isposinf(line[..., 0]).all() and (line[..., 1:].max(-1) == 0).all()


@pytest.mark.parametrize("statistic", ["variance", "spread"])
def test_evenness(statistic):
    rng = np.random.default_rng(2)
    value = rng.random((4, 2, 2, 40)).astype(np.float32)
    value *= np.array([0.5, 1, 2, 3], np.float32)[:, None, None, None]
    value[..., :3] = np.inf
    value[:, 1, :, 30:] = -np.inf  # a shorter row
    got = np.asarray(evenness(statistic, 2.0).heads(jnp.asarray(value), jnp.full((4, 2), 10)))
    for b, n in enumerate((40, 30)):
        f = value[:, b, :, 3:n].astype(np.float64).var(-1)
        if statistic == "spread":
            f = (f - f.min(1, keepdims=True)) / (np.ptp(f, 1)[:, None] + 1e-6)
        want = np.exp(-f.mean(1))
        want = want / want.sum() * 40
        assert want.max() < 20 and want.min() > 4  # nothing is cut: plain softmax
        assert got[:, b].sum() == 2 * 40 and (np.abs(got[:, b, 0] - want) <= 1).all()
    even = np.broadcast_to(value[:1], value.shape)
    assert (np.asarray(evenness().heads(jnp.asarray(even), jnp.full((4, 2), 10))) == 10).all()
    assert (
        np.asarray(evenness(limit=1).heads(jnp.asarray(value), jnp.full((4, 2), 10))) == 10
    ).all()
    far = value * np.array([1, 100, 100, 100], np.float32)[:, None, None, None]
    cut = np.asarray(evenness("variance", 2.0).heads(jnp.asarray(far), jnp.full((4, 2), 10)))
    assert cut[0, 0, 0] == 20 and cut[:, 0, 0].sum() == 40  # what is cut goes to the others


def test_given_proportions():
    budget = given_budget((3, 2, 1), always=2)
    got = budget.layers(np.asarray(10), np.asarray(100), 3)
    assert got.tolist() == [15, 10, 5]
    got = budget.layers(jnp.asarray([10, 10]), jnp.asarray([12, 100]), 3)
    assert got[:, 0].tolist() == [12, 12, 6] and got[:, 1].tolist() == [15, 10, 5]
    assert budget.layers(np.asarray(12), np.asarray(12), 3).tolist() == [12, 12, 12]
    with pytest.raises(ValueError, match="3 numbers for 4 layers"):
        budget.layers(np.asarray(10), np.asarray(100), 4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nearest(-1.5), "threshold=-1.5"),
        (lambda: nearest(0.5, "mean"), "weight='mean'"),
        (lambda: nearest(among=2), "among=2"),
        (lambda: moving(2.0), "rate=2.0"),
        (lambda: evenness("range"), "statistic='range'"),
        (lambda: evenness(limit=0.5), "limit=0.5"),
        (lambda: given_budget((1, 0)), "parts="),
    ],
)
def test_refuses(make, said):
    with pytest.raises(ValueError, match=said):
        make()
