"""SentenceKV against NumPy: what is kept, which sentences are read at each step; and its marks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    Query,
    attend,
    best_spans,
    chain,
    commit,
    ends_every,
    ends_in,
    finish,
    horizon,
    init_cache,
    nbytes,
    rotate,
    start,
    store,
)
from kvjax.cache.look import reads
from kvjax.compress import dense, parse, sentencekv
from kvjax.compress.sentencekv import ENDINGS, ENDS
from kvjax.decode import generate, token_lists
from kvjax.models import forward
from tests.compress import harness
from tests.compress import reference as ref
from tests.compress.harness import model
from tests.compress.reference import HQ, LENGTHS, STEPS, B, D, G, H, L, T, row, softmax
from tests.experiments.conftest import tiny_tokenizer

# Some ends stand where the prompt is pruned, some together, some in what is written.
FLAGS = np.random.default_rng(3).random((B, T + STEPS)) < 0.25
FLAGS[:, T:] = np.random.default_rng(4).random((B, STEPS)) < 0.3
LIST = {ENDS: jnp.zeros((1, ref.CONFIG.vocab_size), bool)}  # not read: the columns are given


class Plain:
    """One KV head of one row, step by step, as the method is stated."""

    def __init__(self, l, b, h, how):
        self.r, self.h, self.flags, self.how = row(l, b), h, FLAGS[b], how
        n = self.r.n
        kept = min(int(how["factor"] * how["tokens"]), n)
        vote = ref.snapkv_vote(self.r, ref.W, how["kernel"], "max")[h]
        self.slots = [*ref.top(vote, kept - ref.W), *range(n - ref.W, n)]
        if how["chunk"]:
            self.flags = np.arange(T + STEPS) % how["chunk"] == how["chunk"] - 1
        starts = [0, *(p + 1 for p in range(n) if self.flags[p])]
        number = [sum(s <= p for s in starts) - 1 for p in self.slots]
        self.buckets = [
            [i for i, m in enumerate(number) if m == s] for s in range(len(starts)) if s in number
        ]
        self.asked, self.written = [], []

    def keys(self, slots):
        return self.r.k[self.h, [self.slots[i] for i in slots]]

    def q(self, p):
        return self.r.q[self.h * G : (self.h + 1) * G, p]

    def read(self, p, g):
        """Slots that the token at p reads beside itself with query head g of this head."""
        how, held = self.how, len(self.slots)
        asked = [*self.asked, self.q(p)]
        asked = [q[g] if how["each_query"] else q.sum(0) for q in asked]
        if (0 if self.flags[p] else len(asked)) < how["dense_steps"]:
            return list(range(held))
        mean = asked[-1] if how["query"] == "token" else np.mean(asked, 0)
        low, high = how["first"], held + 1 - how["recent"]
        near = [float(self.keys(bucket).mean(0) @ mean) for bucket in self.buckets]
        order = [self.buckets[i] for i in np.argsort(-np.asarray(near), kind="stable")]
        room = how["tokens"] - how["first"] - how["recent"]
        found = [i for bucket in [*order, self.written] for i in bucket if low <= i < high]
        return sorted({*range(min(low, held)), *found[:room], *range(max(high, 0), held)})

    def write(self, p):
        self.slots.append(p)
        self.asked.append(self.q(p))
        self.written.append(len(self.slots) - 1)
        if self.flags[p]:
            self.buckets.append(self.written)
            self.asked, self.written = [], []


@jax.jit
def probe(cache, raw, pos, ended):
    """What rows read of the cache: out [L, B, HQ, T, D], lse."""
    columns = {m.name: ended for m in cache.transforms[0].token_marks}

    def layer(l):
        rope, span = cache.constants["rope"][l], cache.constants["span"][l]
        q = rotate(raw[l], pos[:, None], rope)
        none = jnp.zeros((B,), jnp.int32)
        query = Query(q, raw[l], pos, rope, span, cache.constants, none, columns=columns)
        return attend(cache, jnp.asarray(l), query, start(cache, query.pos))[0]

    parts = [layer(l) for l in range(L)]
    return jnp.stack([p.out for p in parts]), jnp.stack([p.lse for p in parts])


def flags_of(how):
    every = np.arange(T + STEPS) % (how["chunk"] or 1) == (how["chunk"] or 1) - 1
    flags = np.tile(every, (B, 1)) if how["chunk"] else FLAGS
    name = "ends" if how["chunk"] else ENDS
    return flags, {name: np.tile(flags, (L, 1, 1))}


def filled(how):
    flags, extra = flags_of(how)
    cache = ref.ours_chain(sentencekv(**how), constants=None if how["chunk"] else LIST, extra=extra)
    return cache, flags, extra


def rows_at(at, extra):
    return ref.new_rows(at, np.zeros((L, B, HQ, at.shape[1])), np.ones((L, B, HQ, 1)), extra)


DEFAULTS = dict(
    tokens=10, factor=1.6, first=2, recent=3, window=ref.W, kernel=3, dense_steps=2,
    query="sentence", chunk=None, shortest=1, each_query=False,
)  # fmt: skip
SETTINGS = [
    dict(),
    dict(dense_steps=0, tokens=9, first=0, recent=1),
    dict(dense_steps=1, query="token", kernel=1),
    dict(dense_steps=0, each_query=True),
    dict(dense_steps=0, chunk=4),
    dict(dense_steps=0, factor=5),  # nothing is pruned
]


@pytest.mark.parametrize("how", SETTINGS)
def test_what_each_step_reads(how):
    how = DEFAULTS | how
    cache, flags, extra = filled(how)
    plain = {(l, b, h): Plain(l, b, h, how) for l, b, h in np.ndindex(L, B, H)}
    raw = ref.stream()[0]
    sizes, fewer = set(), 0
    for i in range(STEPS):
        at = np.asarray([[n + i] for n in LENGTHS])
        own = np.take_along_axis(raw, at[None, :, None, :, None], 3)
        ended = np.take_along_axis(flags, at, 1).astype(np.float32)
        out, lse = probe(cache, jnp.asarray(own), jnp.asarray(at, jnp.int32), jnp.asarray(ended))
        for (l, b, h), one in plain.items():
            p = int(at[b, 0])
            for g in range(G):
                read = one.read(p, g)
                k, v = one.keys(read), one.r.v[h, [one.slots[i] for i in read]]
                s = k @ one.q(p)[g]
                np.testing.assert_allclose(
                    out[l, b, h * G + g, 0], softmax(s) @ v, atol=2e-5, rtol=2e-5
                )
                want = np.log(np.exp(s - s.max()).sum()) + s.max()
                np.testing.assert_allclose(lse[l, b, h * G + g, 0], want, atol=2e-5, rtol=2e-5)
                sizes.add(len(read))
                fewer += len(read) < len(one.slots)
            one.write(p)
        cache = ref._step(cache, rows_at(at, extra))
    # Steps that are not dense read as many as said: the new token is one of them.
    assert how["tokens"] - 1 in sizes and fewer > STEPS
    if not how["dense_steps"]:
        assert sizes == {how["tokens"] - 1}


def spans_of(cache):
    return cache.state[0][-1].index


def test_the_index():
    """Spans are runs of slots that cover all; sums are those of their keys; several tokens at once
    leave what one after the other leaves."""
    how = DEFAULTS | dict(tokens=8, factor=2)
    cache, _, extra = filled(how)
    single, several = cache, cache
    for i in range(STEPS):
        single = ref._step(single, rows_at(np.asarray([[n + i] for n in LENGTHS]), extra))
    for cut in ((0, 5), (5, STEPS)):
        at = np.asarray([[n + i for i in range(*cut)] for n in LENGTHS])
        several = ref._step(several, rows_at(at, extra))
    for a, b in zip(jax.tree.leaves(spans_of(single)), jax.tree.leaves(spans_of(several))):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
    index, own = spans_of(single), single.state[0][-1]
    for l, b, h in np.ndindex(L, B, H):
        one = Plain(l, b, h, how)
        for i in range(STEPS):
            one.write(LENGTHS[b] + i)
        buckets = [*one.buckets, one.written] if one.written else one.buckets
        assert [int(x) for x in own.pos[l, b, h][: len(one.slots)]] == one.slots
        count = np.asarray(index.count[l, b, h])
        assert count[: len(buckets)].tolist() == list(map(len, buckets)) and count.sum() == 28
        assert index.first[l, b, h][: len(buckets)].tolist() == [x[0] for x in buckets]
        for s, bucket in enumerate(buckets):
            want = one.keys(bucket).sum(0)
            np.testing.assert_allclose(index.total[l, b, h, s], want, atol=1e-4, rtol=1e-4)
        assert int(index.times[0, b, 0]) == len(one.asked)
        np.testing.assert_allclose(
            index.asked[l, b, h],
            np.sum(one.asked, (0, 1)) if one.asked else 0,
            atol=2e-5,
            rtol=2e-5,
        )


def test_more_sentences_than_there_is_room_for():
    """Neighbours of the prompt are one, evenly, so that what is written has room of its own."""
    how = DEFAULTS | dict(shortest=9, dense_steps=0)
    cache, _, extra = filled(how)  # 36 / 9 spans, of which 12 / 9 for what is written
    for i in range(STEPS):
        cache = ref._step(cache, rows_at(np.asarray([[n + i] for n in LENGTHS]), extra))
    index = spans_of(cache)
    assert index.count.shape[-1] == 4 and index.later == 2
    for l, b, h in np.ndindex(L, B, H):
        buckets = Plain(l, b, h, how).buckets
        count = [0, 0]
        for i, bucket in enumerate(buckets):
            count[i * 2 // len(buckets)] += len(bucket)
        written = np.flatnonzero(FLAGS[b, LENGTHS[b] : LENGTHS[b] + STEPS])
        count += [int(written[0]) + 1, STEPS - int(written[0]) - 1]  # later ones with the last
        assert index.count[l, b, h].tolist() == count
        assert index.first[l, b, h].tolist() == np.cumsum([0, *count[:-1]]).tolist()


# --- from tokens ---


def test_token_lists():
    """Which tokens end a sentence is read off their texts; the cache finds them by id."""
    tokenizer = tiny_tokenizer("One. Two? Three!\n\nFour... 'Five.' e.g. 3.14 . \n\n  six\n" * 9)
    method = sentencekv()
    found = token_lists(tokenizer, method)
    assert found.keys() == {ENDS} and found[ENDS].shape == (1, len(tokenizer))
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    for text, ends in zip(texts, np.asarray(found[ENDS][0])):
        assert ends == (text.rstrip(" ")[-1:] in set(".!?…。") or "\n\n" in text), text
    assert 3 < found[ENDS].sum() < len(texts) / 2
    assert token_lists(tokenizer, dense()) == {}
    assert ends_in(*ENDINGS).listed(["\uff01", "\n\n  ", "\n", "a. b"])[0].tolist() == [1, 1, 0, 0]


@functools.partial(jax.jit, static_argnames="phase")
def take(model, cache, tokens, pos, phase):
    _, new = forward(model, tokens, pos, cache, phase=phase, logits="none")
    return commit(cache, new, phase=phase)


def test_marks_come_with_tokens():
    """Of a prompt that is stored as it comes, whole or in chunks; of a later turn, of decoding."""
    tokens = np.random.default_rng(2).integers(0, 50, (2, 36))
    ends = np.arange(50) % 6 == 0
    given = {ENDS: jnp.asarray(ends[None])}
    how = dict(tokens=9, first=1, recent=2, dense_steps=0, shortest=1)
    empty = init_cache(
        harness.CONFIG, sentencekv(keep=1.0, **how), 2, 48, prompt=36, constants=given
    )
    assert not empty.foldable  # columns do not come along there
    pos = np.where(np.arange(36) < np.asarray([[36], [29]]), np.arange(36), -1)
    whole = take(model(), empty, tokens, pos, "prefill")
    parts = empty
    for start_ in (0, 18):
        at = slice(start_, start_ + 18)
        parts = take(model(), parts, tokens[:, at], pos[:, at], "prefill")
    for x, y in zip(jax.tree.leaves(spans_of(whole)), jax.tree.leaves(spans_of(parts))):
        np.testing.assert_allclose(x, y, atol=2e-4)
    before = [int(ends[t[: n - 1]].sum()) for t, n in zip(tokens, (36, 29))]
    assert spans_of(whole).newest[0, :, 0].tolist() == before
    more = np.asarray([[1, 6, 2], [12, 3, 4]])
    asked = spans_of(take(model(), whole, more, whole.length[:, None] + np.arange(3), "append"))
    assert asked.times[0, :, 0].tolist() == [1, 2] and asked.writing.all()  # since the last end
    assert asked.newest[0, :, 0].tolist() == [n + 2 for n in before]  # a later turn begins anew
    method = sentencekv(factor=1.5, window=4, **how)
    pruned = init_cache(harness.CONFIG, method, 2, 48, prompt=36, constants=given)
    pruned = jax.jit(finish)(take(model(), pruned, tokens, pos, "prefill"))
    out = generate(model(), pruned, jnp.zeros((2, 50)), 8, stop=())
    assert (horizon(out.cache) == 1).all()
    for b, written in enumerate(np.asarray(out.tokens)):
        since = np.flatnonzero(ends[written])
        since = 8 if not len(since) else 7 - since[-1]
        assert int(spans_of(out.cache).times[0, b, 0]) == since


@jax.jit
def one_row(model, cache, at, x, ended):
    return forward(
        model, None, at, cache, embeddings=x, statistics=True, logits="none",
        columns={ENDS: ended},
    )[1]  # fmt: skip


def test_a_look_at_what_is_read():
    _, cache = harness.base("sentencekv(tokens=8, factor=2, first=2, recent=2, window=4, kernel=3)")
    at = cache.length[:, None]
    ended = jnp.asarray([[1.0], [0.0], [0.0]])
    read = reads(cache, one_row(model(), cache, at, jnp.asarray(harness.rows()[:, :1]), ended))
    # The first row's next token ends a sentence, the second's begins one: these read everything.
    assert spans_of(cache).times[0, :, 0].tolist() == [2, 0, 4]
    held = np.minimum(harness.LENGTHS, 16) + harness.STEPS
    assert (read.sum(-1) == np.asarray([held[0], held[1], 7])[:, None]).all()


# --- cost, and what is refused ---


def test_bytes():
    size = lambda chain, given=None: nbytes(  # noqa: E731
        jax.eval_shape(lambda: init_cache(ref.CONFIG, chain, B, 40, prompt=0, constants=given))
    )
    spans = 40 // 5
    index = L * B * H * (spans + 1) * D * 4 + B * (2 * spans * 4 + 4 + 2 + 4)
    how = dict(tokens=9, first=1, recent=2, shortest=5, keep=1.0)
    assert size(sentencekv(chunk=3, **how)) == size(dense()) + index
    assert size(sentencekv(**how), LIST) == size(dense()) + index + 10  # the list of 10 tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sentencekv(tokens=64)", r"tokens=64\): first=32 and recent=32"),
        ("sentencekv(first=-1)", r"first=-1\): expected an integer of at least 0"),
        ("sentencekv(recent=0)", r"recent=0\): .* at least 1"),
        ("sentencekv(chunk=0)", r"chunk=0\): .* at least 1"),
        ("sentencekv(factor=0.5)", r"factor=0.5\): .* at least 1"),
        ("sentencekv(query='mean')", r"query='mean'\): expected 'sentence' or 'token'"),
        ("sentencekv(storage=kivi)", "coded by itself"),
        ("sentencekv(tokens=80, factor=1, window=90)", r"factor=1\) keeps 80 .* window=90"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_refuses_what_is_missing():
    for call, message in (
        (lambda: best_spans(4, ends_every(2), first=2, recent=2), "expected more"),
        (lambda: best_spans(9, ends_every(2), shortest=0), "shortest=0"),
        (lambda: ends_every(0), "at least 1"),
        (ends_in, "at least one character"),
        (lambda: init_cache(ref.CONFIG, sentencekv(), B, 99), f"{ENDS}.*token_lists"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    cache = init_cache(ref.CONFIG, chain(store(reader=best_spans(9, ends_every(2)))), B, 9)
    new = rows_at(np.asarray([[0], [0]]), {})
    with pytest.raises(ValueError, match="'ends' of new tokens: call forward"):
        commit(cache, new)
    with pytest.raises(ValueError, match="embeddings alone: give columns"):
        harness_cache = harness.cache_of("sentencekv(tokens=8, keep=1.0, first=2, recent=2)")
        forward(
            model(), None, jnp.zeros((3, 1), int), harness_cache, embeddings=jnp.zeros((3, 1, 32))
        )
    assert dataclasses.replace(new).kv.size == 1
