"""Methods that evict or demote at every step, against NumPy, step by step."""

import numpy as np
import pytest

from tests.compress import reference as ref
from tests.compress.harness import held
from tests.compress.reference import HQ, STEPS, B, D, G, H, L, by_group, per_token, row, top

ALL = list(np.ndindex(L, B))


class Tokens:
    """What one layer of one row holds: positions per KV head, and how each token reads."""

    def __init__(self, l, b):
        self.row = row(l, b)
        self.kept = [list(range(self.row.n))] * H
        self.n = self.row.n

    def read(self, h):
        return self.row.k[h, self.kept[h]], self.row.v[h, self.kept[h]]

    def logits(self):
        """Of the coming token's query over what is held and itself, one array per query head."""
        t = self.n
        keys = [np.concatenate([self.read(h)[0], self.row.k[h, t : t + 1]]) for h in range(H)]
        return [keys[j // G] @ self.row.q[j, t] for j in range(HQ)]

    def take(self):
        self.kept = [[*k, self.n] for k in self.kept]
        self.n += 1


class H2O(Tokens):
    def __init__(self, l, b, newest, heavy, release=1):
        super().__init__(l, b)
        self.sizes, self.release = (newest, heavy), release
        received = by_group(self.row.attention.sum(1))
        self.score = [dict(enumerate(received[h])) for h in range(H)]
        self.drop()

    def drop(self):
        newest, heavy = self.sizes
        # The newest grow until `release` more are there, which then leave together.
        gone = max(self.n - newest, 0) // self.release * self.release
        for h in range(H):
            old = [p for p in self.kept[h] if p < gone]
            new = [p for p in self.kept[h] if p >= gone]
            values = np.array([self.score[h][p] for p in old])
            self.kept[h] = [old[i] for i in top(values, heavy)] + new

    def step(self):
        p = [ref.softmax(x) for x in self.logits()]
        self.take()
        for h in range(H):
            # Heads of a group hold the same tokens, so that their rows can be averaged.
            for at, a in zip(self.kept[h], np.mean(p[h * G : (h + 1) * G], 0)):
                self.score[h][at] = self.score[h].get(at, 0.0) + a
        self.drop()


class Tova(Tokens):
    def __init__(self, l, b, size):
        super().__init__(l, b)
        self.size = size
        self.keep(self.row.attention[:, -1])

    def keep(self, p):
        p = np.mean(p, 0)
        kept = [self.kept[0][i] for i in top(p, self.size)]
        self.kept = [kept] * H

    def step(self):
        p = [ref.softmax(x) for x in self.logits()]
        self.take()
        self.keep(p)


class Streaming(Tokens):
    def __init__(self, l, b, sinks, size):
        super().__init__(l, b)
        self.sinks, self.size = sinks, size
        self.drop()

    def drop(self):
        if len(self.kept[0]) > self.size:
            kept = self.kept[0][: self.sinks] + self.kept[0][-(self.size - self.sinks) :]
            self.kept = [kept] * H

    def step(self):
        self.take()
        self.drop()

    def read(self, h):
        """Keys turned to their slots."""
        at = self.kept[h]
        raw = ref.turn(self.row.k[h, at], -np.asarray(at))
        return ref.turn(raw, np.arange(len(at))), self.row.v[h, at]


class MiKV(H2O):
    """H2O's choice, the others at few bits, keys balanced."""

    def __init__(self, l, b, newest, heavy, bits, high=16, balanced=True):
        r = row(l, b)
        q = np.abs(r.q[:, : r.n]).max(1).reshape(H, G, D).max(1)
        self.balance = np.sqrt(q / np.abs(r.k[:, : r.n]).max(1)) if balanced else np.ones((H, D))
        self.bits, self.high = bits, high
        super().__init__(l, b, newest, heavy)

    def read(self, h):
        kept = set(self.kept[h])
        k, v = self.row.k[h : h + 1, : self.n], self.row.v[h : h + 1, : self.n]
        if self.high < 16:  # a demoted token is coded from what its first code reads as
            k, v = per_token(k, self.high, D // 2), per_token(v, self.high, D // 2)
        scale = self.balance[h]
        low = per_token(k * scale, self.bits, D // 2) / scale, per_token(v, self.bits, D // 2)
        important = np.array([i in kept for i in range(self.n)])[:, None]
        return np.where(important, k[0], low[0][0]), np.where(important, v[0], low[1][0])

    def logits(self):
        t = self.n
        keys = [np.concatenate([self.read(h)[0], self.row.k[h, t : t + 1]]) for h in range(H)]
        return [keys[j // G] @ self.row.q[j, t] for j in range(HQ)]

    def step(self):
        p = [ref.softmax(x) for x in self.logits()]
        for h in range(H):
            for at, a in enumerate(np.mean(p[h * G : (h + 1) * G], 0)):
                self.score[h][at] = self.score[h].get(at, 0.0) + a
        self.take()
        self.drop()


def follow(text, make, positions=None, important=False):
    sides = {at: make(*at) for at in ALL}
    cache = ref.ours(text)
    for i in range(STEPS + 1):
        if important:  # the last stage holds the demoted ones
            inside = held(cache.replace(state=((*cache.state[0][:-1], None),)))
        else:
            inside = held(cache)
        for (l, b), side in sides.items():
            assert inside[l][b] == side.kept, (i, l, b)
        if i in (0, 3, STEPS):
            ref.agree(
                cache,
                lambda l, b: [sides[l, b].read(h) for h in range(H)],
                i,
                positions and (lambda l, b: positions(sides[l, b])),
            )
        if i < STEPS:
            logits = [[sides[l, b].logits() for b in range(B)] for l in range(L)]
            for side in sides.values():
                side.step()
            cache = ref.advance(cache, i, logits)
    return sides


def test_h2o():
    """keep=0.5 of a prompt of 24: 6 of the newest, 6 heavy hitters, in every row of the batch."""
    follow("h2o(keep=0.5)", lambda l, b: H2O(l, b, 6, 6))


def test_h2o_releases_several():
    follow("h2o(keep=0.5, release=4)", lambda l, b: H2O(l, b, 6, 6, 4))


def test_h2o_counts_every_row_once():
    """While nothing is evicted, the scores of a head add up to the number of rows."""
    cache = ref.ours("h2o(tokens=24)")
    total = sum(own.kv.extra["attention"].sum(-1) for own in cache.state[0])
    for b, length in enumerate(ref.LENGTHS):
        np.testing.assert_allclose(total[:, b], length, rtol=1e-5)


def test_tova():
    follow("tova(tokens=9)", lambda l, b: Tova(l, b, 9))


def test_streaming_llm():
    """Keys in slot s are read at position s, the query at that of its own slot."""
    follow(
        "streaming_llm(keep=0.5, sinks=2)",
        lambda l, b: Streaming(l, b, 2, 12),
        positions=lambda side: [len(side.kept[0])],
    )


@pytest.mark.parametrize(("high", "balanced"), [(16, True), (16, False), (8, True)])
def test_mikv(high, balanced):
    follow(
        f"mikv(keep=0.5, bits=2, important_bits={high}, balanced={balanced})",
        lambda l, b: MiKV(l, b, 6, 6, 2, high, balanced),
        important=True,
    )


class GrowingMiKV(MiKV):
    """The important ones stay half of all tokens, rounded down; a demoted token stays demoted."""

    def drop(self):
        self.sizes = (6, max(self.n // 2 - 6, 1))
        super().drop()


def test_mikv_grows():
    sides = follow(
        "mikv(keep=0.5, bits=2, grow=True)",
        lambda l, b: GrowingMiKV(l, b, 6, 6, 2),
        important=True,
    )
    assert {len(side.kept[0]) for side in sides.values()} == {(24 + STEPS) // 2, (17 + STEPS) // 2}


def test_balancer_evens_the_maxima():
    """max |q / b| = max |k b| per channel, over the prompt."""
    cache = ref.ours("mikv(keep=0.5)")
    b = np.asarray(cache.state[0][-1].fitted["balance"])
    for l, i in ALL:
        r = row(l, i)
        q = np.abs(r.q[:, : r.n]).max(1).reshape(H, G, D).max(1)
        k = np.abs(r.k[:, : r.n]).max(1)
        np.testing.assert_allclose(q / b[l, i], k * b[l, i], rtol=1e-5)
