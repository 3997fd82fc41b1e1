"""D2O, EMS, Chelsea and PrefixKV against NumPy: who stays, where, and into what others melt."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    KV,
    Commit,
    Rope,
    Spec,
    accumulated_attention,
    chain,
    cluster,
    global_local,
    prune,
    store,
)
from kvjax.compress import parse
from tests.compress import reference as ref
from tests.compress.harness import held
from tests.compress.reference import HQ, LENGTHS, STEPS, B, G, H, L, by_group, row, top
from tests.compress.test_reference_evict import ALL, Tokens


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# --- D2O ---


class D2O(Tokens):
    """One layer of one row; `size` of it is known once all layers have been seen."""

    def __init__(self, l, b, merge, sinks, rate):
        super().__init__(l, b)
        self.merge, self.sinks, self.rate, self.t = merge, sinks, rate, None
        self.k, self.v = self.row.k.copy(), self.row.v.copy()
        received = by_group(self.row.attention.sum(1))
        self.score = [dict(enumerate(received[h])) for h in range(H)]
        self.unevenness = np.mean([received[h, sinks:].var() for h in range(H)])

    def read(self, h):
        return self.k[h, self.kept[h]], self.v[h, self.kept[h]]

    def drop(self):
        newest = min(self.size // 2, self.size - self.sinks)
        found = []
        for h in range(H):
            always = [p for p in self.kept[h] if p < self.sinks or p >= self.n - newest]
            rest = [p for p in self.kept[h] if p not in always]
            values = np.array([self.score[h][p] for p in rest])
            best = [rest[i] for i in top(values, max(self.size - len(always), 0))]
            stay = sorted(always + best)
            gone = [p for p in self.kept[h] if p not in stay]
            u = unit(self.k[h, gone]) @ unit(self.k[h, stay]).T
            found.append((stay, gone, u))
        means = np.concatenate([u.max(1) for _, gone, u in found if gone] or [[]])
        if self.merge and len(means):
            mean = means.mean()
            self.t = mean if self.t is None else self.rate * mean + (1 - self.rate) * self.t
        for h, (stay, gone, u) in enumerate(found):
            self.kept[h] = stay
            if not (self.merge and gone):
                continue
            near, to = u.max(1) >= self.t, u.argmax(1)
            for j, at in enumerate(stay):
                join = [i for i in range(len(gone)) if near[i] and to[i] == j]
                w = np.exp([1.0, *u[join, j]])
                for x in (self.k, self.v):
                    rows = x[h, [at, *(gone[i] for i in join)]]
                    x[h, at] = w @ rows / w.sum()

    def step(self):
        p = [ref.softmax(x) for x in self.logits()]
        self.take()
        for h in range(H):
            for at, a in zip(self.kept[h], np.mean(p[h * G : (h + 1) * G], 0)):
                self.score[h][at] = self.score[h].get(at, 0.0) + a
        self.drop()


def d2o_sides(mean, merge, layers=True, sinks=2, rate=0.5):
    sides = {at: D2O(*at, merge, sinks, rate) for at in ALL}
    for b in range(B):
        f = np.array([sides[l, b].unevenness for l in range(L)])
        share = np.exp(-f) / np.exp(-f).sum() * L * mean if layers else np.full(L, float(mean))
        # Two layers: the smaller gets at least sinks + 1, the larger at most twice the mean.
        first = int(np.floor(np.clip(share[0], sinks + 1, L * mean - sinks - 1) + 0.5))
        for l, n in enumerate((first, L * mean - first)):
            sides[l, b].size = n
            sides[l, b].drop()
    return sides


@pytest.mark.parametrize("merge", [True, False])
def test_d2o(merge):
    """keep=0.4 of 24: 9 per head on average, 18 in the two layers together."""
    sides = d2o_sides(9, merge)
    sizes = {side.size for side in sides.values()}
    assert len(sizes) > 1
    cache = ref.ours(f"d2o(keep=0.4, sinks=2, merge={merge})")
    follow(cache, sides)


def test_d2o_without_layers_or_merging_is_h2o_by_sizes():
    """All layers alike, nothing merged, no sinks: H2O's 6 newest and 6 heavy ones."""
    cache = ref.ours("d2o(tokens=12, sinks=0, layers=False, merge=False)")
    assert held(cache) == held(ref.ours("h2o(tokens=12)"))
    follow(cache, d2o_sides(12, False, layers=False, sinks=0))


def follow(cache, sides):
    for i in range(STEPS + 1):
        inside = held(cache)
        for (l, b), side in sides.items():
            assert inside[l][b] == side.kept, (i, l, b)
        if i in (0, 3, STEPS):
            ref.agree(cache, lambda l, b: [sides[l, b].read(h) for h in range(H)], i)
        if i < STEPS:
            logits = [[sides[l, b].logits() for b in range(B)] for l in range(L)]
            for side in sides.values():
                side.step()
            cache = ref.advance(cache, i, logits)


# --- EMS ---


def ems_score(r, window, terms):
    whole = by_group(r.attention.sum(1))
    local = by_group(r.attention[:, r.n - window :].sum(1))
    if terms in ("global", "local"):
        return whole if terms == "global" else local
    local = local * whole.mean(-1, keepdims=True) / local.mean(-1, keepdims=True)
    return whole + local if terms == "sum" else np.maximum(whole, local)


def ems_by_hand(r, number, window, theta, among, terms):
    """Per head: positions kept, keys, values, and how many others each stands for."""
    out = []
    for h, s in enumerate(ems_score(r, window, terms)):
        late = list(range(r.n - window, r.n))
        stay = top(s[: r.n - window], number - window) + late
        gone = [p for p in range(r.n) if p not in stay]
        k, v = r.k[h], r.v[h]
        alike = np.maximum(unit(k[gone]) @ unit(k[stay]).T, 0)
        alike = alike * np.maximum(unit(v[gone]) @ unit(v[stay]).T, 0)
        zero = np.full((len(gone), 1), theta)
        to = np.argmax(np.concatenate([alike, zero], 1), 1)  # the last class is dropped
        before = s[stay].sum()
        for p in sorted(gone, key=lambda p: (-s[p], p)):
            if before >= among * s.sum():
                to[gone.index(p)] = len(stay)
            before += s[p]
        keys, values, others = [], [], []
        for j, c in enumerate(stay):
            group = [c, *(gone[i] for i in np.flatnonzero(to == j))]
            w = s[group] / s[group].sum()
            keys.append(np.linalg.norm(k[c]) * unit(w @ unit(k[group])))
            values.append(w @ v[group])
            others.append(len(group) - 1)
        out.append((stay, np.array(keys), np.array(values), others))
    return out


@pytest.mark.parametrize("terms", ["sum", "max", "local"])
def test_ems(terms):
    theta, among, window = 0.05, 0.9, 4
    how = f"window={window}, threshold={theta}, among={among}, terms='{terms}'"
    cache = ref.ours(f"ems(keep=0.5, {how})")
    sides = {
        (l, b): ems_by_hand(row(l, b), LENGTHS[b] // 2, window, theta, among, terms) for l, b in ALL
    }
    kept = held(cache)
    merged = 0
    for (l, b), heads in sides.items():
        assert kept[l][b] == [stay for stay, *_ in heads]
        merged += sum(sum(others) for *_, others in heads)
    lost = sum(n - n // 2 for n in LENGTHS) * L * H
    assert 0 < merged < lost  # some merge, some are dropped
    own = cache.state[0][-1]
    assert float(own.extra["absorbed"].sum()) == merged
    ref.agree(cache, lambda l, b: [(k, v) for _, k, v, _ in sides[l, b]])


def test_ems_where_nothing_merges_is_eviction():
    alone = ref.ours("ems(keep=0.5, window=4, merge=False)")
    for how in ("threshold=1.1", "among=0"):
        cache = ref.ours(f"ems(keep=0.5, window=4, {how})")
        for a, b in ((cache.state[0][-1].k, alone.state[0][-1].k),):
            np.testing.assert_array_equal(a, b)
        assert held(cache) == held(alone)


def test_with_the_whole_prompt_as_window_both_scores_rank_alike():
    both = ref.ours_chain(chain(prune(9, global_local(24)), store()))
    assert held(both) == held(ref.ours_chain(chain(prune(9, accumulated_attention()), store())))


def test_ems_bias_is_the_log_of_the_number():
    own = ref.ours("ems(keep=0.5, window=4, threshold=0.05, bias=True)").state[0][-1]
    bias, number = np.asarray(own.extra["bias"]), np.asarray(own.extra["absorbed"])
    np.testing.assert_allclose(bias, np.log1p(number), atol=1e-6)
    assert number.max() >= 1


# --- Chelsea ---


class Chelsea(Tokens):
    """Per head, slots in order: position, key, value, number of tokens."""

    def __init__(self, l, b, n, chunk, sinks, recent, release, bias=True):
        super().__init__(l, b)
        self.sizes, self.bias = (n, chunk, sinks, recent, release), bias
        r = self.row
        self.slots = [[(p, r.k[h, p], r.v[h, p], 1) for p in range(r.n)] for h in range(H)]
        self.drop()

    def read(self, h):
        return np.array([s[1] for s in self.slots[h]]), np.array([s[2] for s in self.slots[h]])

    def weight(self, h):
        return np.log([s[3] for s in self.slots[h]]) if self.bias else 0.0

    @property
    def positions(self):
        return [[s[0] for s in head] for head in self.slots]

    def drop(self):
        n, chunk, sinks, recent, release = self.sizes
        for slots in self.slots:
            if len(slots) < n + release:
                continue
            while len(slots) > n:
                edges = []
                for start in range(sinks, len(slots) - recent, chunk):
                    stop = min(start + chunk, len(slots) - recent)
                    odd = range(start + 1, stop, 2)
                    for a in range(start, stop, 2):
                        alike = [unit(slots[a][1]) @ unit(slots[o][1]) for o in odd]
                        if alike:
                            edges.append((max(alike), a, odd[int(np.argmax(alike))]))
                edges.sort(key=lambda e: (-e[0], e[1]))
                into = {}
                for _, a, o in edges[: len(slots) - n]:
                    into.setdefault(o, []).append(a)
                for o, joined in into.items():
                    group = [slots[i] for i in (o, *joined)]
                    number = sum(g[3] for g in group)
                    k, v = (sum(g[3] * g[i] for g in group) / number for i in (1, 2))
                    slots[o] = (slots[o][0], k, v, number)
                gone = {a for joined in into.values() for a in joined}
                slots[:] = [s for i, s in enumerate(slots) if i not in gone]

    def step(self):
        for h in range(H):
            t = self.n
            self.slots[h].append((t, self.row.k[h, t], self.row.v[h, t], 1))
        self.n += 1
        self.drop()


@pytest.mark.parametrize("bias", [True, False])
def test_chelsea(bias):
    """24 and 17 tokens into 7 slots take two passes; 3 more come before the next."""
    how = dict(chunk=6, sinks=2, recent=3, release=3, bias=bias)
    arguments = ", ".join(f"{name}={value}" for name, value in how.items())
    cache = ref.ours(f"chelsea(tokens=7, {arguments})")
    sides = {at: Chelsea(*at, 7, *how.values()) for at in ALL}
    for i in range(STEPS + 1):
        inside = held(cache)
        for (l, b), side in sides.items():
            assert inside[l][b] == side.positions, (i, l, b)
        if i in (0, 3, STEPS):
            read = lambda l, b: [sides[l, b].read(h) for h in range(H)]  # noqa: E731
            ref.agree(cache, read, i, bias=lambda l, b, h: sides[l, b].weight(h))
        if i < STEPS:
            for side in sides.values():
                side.step()
            rows = [[[np.zeros(1)] * HQ for _ in range(B)] for _ in range(L)]  # no one looks
            cache = ref.advance(cache, i, rows)
    own = cache.state[0][0].kv
    number = np.where(np.asarray(own.pos) >= 0, 1 + np.asarray(own.extra["absorbed"]), 0).sum(-1)
    assert (number == np.asarray(LENGTHS)[:, None] + STEPS).all()  # each token is in one slot
    assert ("bias" in own.extra) == bias


def test_chelsea_of_equal_keys_and_values_is_exact():
    """Groups of copies: what joins is equal, so log N makes attention over slots that over all."""
    stage = cluster(6, chunk=4, first=0, recent=0)
    spec = Spec(1, 1, 1, 1, 8, 12, 12)
    rng = np.random.default_rng(0)
    k, v = (np.repeat(rng.standard_normal((6, 8)), 2, 0).astype(np.float32) for _ in range(2))
    kv = KV(jnp.asarray(k[None, None, None]), jnp.asarray(v[None, None, None]),
            jnp.arange(12, dtype=jnp.int32)[None, None, None])  # fmt: skip
    rope = Rope(jnp.zeros((1, 4)), jnp.ones((1,)))
    state, _ = stage.commit(stage.init(spec), kv, Commit("prefill", rope))
    there = np.asarray(state.kv.pos[0, 0, 0]) >= 0
    assert there.sum() == 6
    q = rng.standard_normal(8)
    logits = (
        np.asarray(state.kv.k[0, 0, 0])[there] @ q
        + np.asarray(state.kv.extra["bias"])[0, 0, 0, there]
    )
    out = ref.softmax(logits) @ np.asarray(state.kv.v[0, 0, 0])[there]
    np.testing.assert_allclose(out, ref.softmax(k @ q) @ v, atol=1e-5)


# --- PrefixKV ---


def prefix_counts(rows, kept, ends):
    """Tokens of each layer beside the protected ends, by bisection on the common share."""
    curves = []
    for r in rows:
        s = r.attention.mean(0).sum(0)
        s = -np.sort(-s[ends[0] : r.n - ends[1]])
        curves.append(np.cumsum(s) / s.sum())
    total = L * (kept - sum(ends))
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        sizes = [int((c < p).sum()) + 1 for c in curves]
        low, high = (p, high) if sum(sizes) <= total else (low, p)
    return [int((c < low).sum()) + 1 for c in curves]


@pytest.mark.parametrize("ends", [(1, 1), (1, 4)])
def test_prefixkv(ends):
    cache = ref.ours(f"prefixkv(keep=0.5, sinks={ends[0]}, last={ends[1]})")
    kept = held(cache)
    uneven = set()
    for b, n in enumerate(LENGTHS):
        rows = [row(l, b) for l in range(L)]
        counts = prefix_counts(rows, n // 2, ends)
        assert sum(counts) == L * (n // 2 - sum(ends))
        for l, r in enumerate(rows):
            s = r.attention.mean(0).sum(0)
            s[: ends[0]] = s[n - ends[1] :] = np.inf
            assert kept[l][b] == [top(s, counts[l] + sum(ends))] * H
        uneven |= {counts[0] - counts[1]}
    assert uneven != {0}
    ref.agree(cache, lambda l, b: [(row(l, b).k[h, p], row(l, b).v[h, p])
                                   for h, p in enumerate(kept[l][b])])  # fmt: skip


def test_prefixkv_offline_has_the_sizes_it_is_given():
    kept = held(ref.ours("prefixkv(keep=0.5, parts=(2, 1))"))
    for b, n in enumerate(LENGTHS):
        for l, r in enumerate(row(l, b) for l in range(L)):
            s = r.attention.mean(0).sum(0)
            s[0] = s[n - 1] = np.inf
            size = (16, 8)[l] if n == 24 else None
            found = kept[l][b]
            assert found[0] == found[1] == top(s, len(found[0]))
            assert size is None or len(found[0]) == size
        assert sum(len(kept[l][b][0]) for l in range(L)) == L * (n // 2)


def test_prefixkv_offline_is_online_on_the_prompt_that_it_was_measured_on():
    online = held(ref.ours("prefixkv(keep=0.5)"))
    parts = tuple(len(online[l][0][0]) for l in range(L))
    offline = held(ref.ours(f"prefixkv(keep=0.5, parts={parts})"))
    assert [layer[0] for layer in offline] == [layer[0] for layer in online]


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("d2o(keep=0.5, tokens=9)", "give one of them"),
        ("d2o(tokens=4)", r"d2o\(tokens=4\): .* at least 5"),
        ("d2o(recent_part=1)", r"d2o\(recent_part=1\).*\(0, 1\)"),
        ("d2o(rate=2)", "rate=2"),
        ("d2o(statistic='mean')", "statistic='mean'"),
        ("ems(tokens=31)", r"ems\(tokens=31\): .* at least 32"),
        ("ems(terms='all')", "terms='all'"),
        ("ems(among=1.5)", "among=1.5"),
        ("chelsea(tokens=36)", r"chelsea\(tokens=36\): .* at least 37"),
        ("chelsea(chunk=3)", "chunk=3"),
        ("chelsea(release=0)", r"chelsea\(release=0\)"),
        ("prefixkv(sinks=-1)", "first=-1"),
        ("prefixkv(tokens=1)", r"prefixkv\(tokens=1\): .* at least 2"),
        ("prefixkv(parts=(1, 0))", "parts="),
    ],
)
def test_refuses(text, said):
    with pytest.raises(ValueError, match=said):
        parse(text)
