"""Methods that prune a finished prompt, against NumPy: which tokens stay, and what is read."""

import numpy as np
import pytest

from kvjax.cache import chain, heavy, newest_attention, prune, store, window_attention
from tests.compress import reference as ref
from tests.compress.harness import held
from tests.compress.reference import B, H, L, T, W, row, top

VOTE = f"window={W}, kernel=3"


def check(text, policy):
    """policy(row, layer) -> positions per head."""
    cache = ref.ours(text)
    kept = held(cache)
    for l, b in np.ndindex(L, B):
        assert kept[l][b] == policy(row(l, b), l), (l, b)

    def read(l, b):
        r = row(l, b)
        return [(r.k[h, p], r.v[h, p]) for h, p in enumerate(kept[l][b])]

    ref.agree(cache, read)
    return kept


def half(r):
    return max(r.n // 2, W)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_snapkv(pool):
    def policy(r, l):
        vote = ref.snapkv_vote(r, pool=pool)
        return ref.with_window(r, vote, [half(r) - W] * H)

    check(f"snapkv(keep=0.5, {VOTE}, pool='{pool}')", policy)


def test_snapkv_by_number():
    """A prompt of no more tokens than the budget is not compressed; the other one is."""

    def policy(r, l):
        vote = ref.snapkv_vote(r)
        return ref.with_window(r, vote, [min(20, r.n) - W] * H)

    check(f"snapkv(tokens=20, {VOTE})", policy)


def test_expected_attention():
    def policy(r, l):
        score = ref.expected_score(r, 16, 2, 0.01)
        return [[0, 1] + [i + 2 for i in top(score[h], r.n // 2 - 2)] for h in range(H)]

    check("expected_attention(keep=0.5, sinks=2, future=16, epsilon=0.01)", policy)


def test_keydiff():
    check("keydiff(keep=0.5)", lambda r, l: [top(s, r.n // 2) for s in ref.keydiff_score(r)])


def test_knorm():
    def policy(r, l):
        return [top(-np.linalg.norm(r.k[h, : r.n], axis=-1), r.n // 2) for h in range(H)]

    check("knorm(keep=0.5)", policy)


def test_random_eviction():
    cache = ref.ours("random_eviction(keep=0.5)")
    sets = [tuple(h) for layer in held(cache) for h in layer[0]]
    assert len(set(sets)) == L * H and all(len(s) == T // 2 for s in sets)


def pyramid_counts(n, beta):
    """The card's real-valued budgets without the window, mean n // 2 - W."""
    b = n // 2 - W
    low = b / beta
    high = 2 * b - low
    if high > n - W:
        high, low = n - W, 2 * b - (n - W)
    return [high - l * (high - low) / (L - 1) for l in range(L)]


def test_pyramidkv():
    cache = ref.ours(f"pyramidkv(keep=0.5, beta=4, {VOTE})")
    kept = held(cache)
    for b in range(B):
        counts = [len(kept[l][b][0]) - W for l in range(L)]
        n = ref.LENGTHS[b]
        assert all(abs(c - want) <= 1 for c, want in zip(counts, pyramid_counts(n, 4)))
        assert counts == sorted(counts, reverse=True) and max(counts) <= n - W
        assert sum(counts) == L * (n // 2 - W)
        for l in range(L):
            r = row(l, b)
            assert kept[l][b] == ref.with_window(r, ref.snapkv_vote(r), [counts[l]] * H)


def test_pyramidkv_beta_one_is_snapkv():
    equal = [f"{name}(keep=0.5, {VOTE}{more})" for name, more in BETA_ONE]
    assert held(ref.ours(equal[0])) == held(ref.ours(equal[1]))


BETA_ONE = (("snapkv", ""), ("pyramidkv", ", beta=1"))


def ada_counts(vote, b, alpha):
    """Real-valued head budgets, without the window."""
    best = np.sort(vote.reshape(-1))[::-1][: b * H].min()
    return (1 - alpha) * (vote >= best).sum(1) + alpha * b


def mass(kept, r):
    vote = ref.snapkv_vote(r)
    return sum(vote[h, i] for h in range(H) for i in kept[h] if i < r.n - W)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_adakv(alpha):
    cache = ref.ours(f"adakv(keep=0.5, {VOTE}, pool='mean', alpha={alpha})")
    kept = held(cache)
    uneven = False
    for l, b in np.ndindex(L, B):
        r = row(l, b)
        vote, base = ref.snapkv_vote(r), r.n // 2 - W
        counts = [len(k) - W for k in kept[l][b]]
        want = ada_counts(vote, base, alpha)
        assert sum(counts) == H * base
        assert all(abs(c - w) < 1 for c, w in zip(counts, want))
        assert min(counts) >= int(alpha * base)
        assert kept[l][b] == ref.with_window(r, vote, counts)
        uneven |= len(set(counts)) > 1
        # Never less of the vote than with equal budgets; equal where alpha is 1.
        uniform = ref.with_window(r, vote, [base] * H)
        assert mass(kept[l][b], r) >= mass(uniform, r) - 1e-9
        assert alpha < 1 or kept[l][b] == uniform
    assert uneven == (alpha < 1)

    def read(l, b):
        r = row(l, b)
        return [(r.k[h, p], r.v[h, p]) for h, p in enumerate(kept[l][b])]

    ref.agree(cache, read)


def test_every_row_of_a_pool_stays_in_its_room():
    """A prompt within the budget asks a high layer for all of it; the longest one sets its room."""
    kept = held(ref.ours(f"pyramidkv(tokens=17, beta=8, {VOTE})"))
    most = [len(kept[l][0][0]) for l in range(L)]
    for l in range(L):
        assert all(len(head) <= most[l] and head == sorted(set(head)) for head in kept[l][1])
        assert all(head[-W:] == [13, 14, 15, 16] for head in kept[l][1])


def test_one_row_of_votes_ranks_as_the_newest_attention():
    """SnapKV's vote by one row, over all heads, is TOVA's score."""
    one = chain(prune(9, window_attention(1, 1, whole_layer=True)), store())
    two = chain(heavy(9, newest_attention()))
    a, b = (held(ref.ours_chain(c)) for c in (one, two))
    for l, i in np.ndindex(L, B):
        last = ref.LENGTHS[i] - 1
        r = row(l, i)
        score = r.attention[:, -1].mean(0)
        assert b[l][i] == [top(score, 9)] * H
        assert a[l][i] == [top(score[:last], 8) + [last]] * H
