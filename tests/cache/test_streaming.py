"""What declares `streaming` holds the same however one stream of tokens was cut into commits.

Same means the same bits: held positions, keys, values and codes, per layer, row and head. Scores
kept beside tokens are sums over channels and may round differently at another width, so they are
not compared. Commits are of widths 24, 5 and 1; hypothesis decides how many tokens of each row
come with which commit, and where among them padding (NaN) stands.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    KV,
    Window,
    accumulated_attention,
    best_pages,
    chain,
    first,
    heavy,
    key_norm,
    nearest,
    random,
    recency,
    recent,
    rotate,
    store,
)
from kvjax.cache.stage import Commit
from kvjax.cache.stages.store import Stored
from kvjax.cache.stages.windows import Slots
from kvjax.codecs import per_kv, quantize
from tests.cache.harness import BATCH, cut, empty, rows

TOKENS = 24
kivi = per_kv(k=quantize(2, axis="channel", group=8), v=quantize(4))
CHAINS = {
    "first, recent, store": chain(first(3), recent(4, release=3), store()),
    "recent coded": chain(recent(6, release=4, codec=quantize(8)), recent(5)),
    "heavy, heavy": chain(heavy(6, key_norm()), heavy(5, random(1)), store(quantize(4))),
    "recent, heavy coded": chain(recent(3, 2), heavy(7, recency(2), codec=quantize(8))),
    "kivi": chain(first(1), store(kivi, keys=Window(0, 8), values=Window(3, 1))),
    "kivi behind": chain(recent(4, release=8), store(kivi)),
    "groups apart": chain(
        store(quantize(4, axis="channel", group=4), keys=Window(2, 8), values=Window(5, 4))
    ),
    "before rotation": chain(recent(2), store(kivi, keys=Window(3, 8), rope="before")),
    "reader": chain(store(quantize(8), reader=best_pages(2, 4))),
}


@jax.jit
def turned(r, rope):
    """The stream as it enters a chain: rotated once, so that all commits get the same bits."""
    pos = r["pos"]
    there = (pos >= 0)[None, :, None, :, None]
    k, v = (jnp.where(there, r[n], jnp.nan) for n in ("k", "v"))
    return {"k": rotate(k, pos[None, :, None], rope), "v": v, "q": r["q"], "pos": pos}


def _commit(cache, r):
    """`commit` without its rotation: invalid rows are dropped and the others compacted."""
    from kvjax.cache import buffer

    kv = KV(r["k"], r["v"], r["pos"][None, :, None])
    rows, _ = buffer.compact(kv, kv.pos >= 0)
    context = Commit("append", cache.constants["rope"])
    return cache.replace(state=(cache.transforms[0].commit(cache.state[0], rows, context),))


take = jax.jit(_commit)


def by_position(pos, *leaves):
    """Arrays [L, B, H, N, ...] with slots in order of position and zeros in empty slots."""
    order = np.argsort(np.where(pos >= 0, pos, 10**6), -1, kind="stable")
    pos = np.take_along_axis(pos, order, -1)
    out = [pos]
    for x in leaves:
        x = np.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 4)), 3)
        out.append(np.where((pos >= 0).reshape(pos.shape + (1,) * (x.ndim - 4)), x, 0))
    return out


def contents(stage, own):
    """All that a stage holds, in an order that does not depend on slots."""
    if own is None:
        return []
    own = jax.tree.map(np.asarray, own)
    lead = (own.spec.layers, own.spec.batch, own.spec.kv_heads)
    full = lambda x: np.broadcast_to(x, (*lead, x.shape[3]))  # noqa: E731
    if isinstance(own, Slots):
        return by_position(full(own.kv.pos), *jax.tree.leaves((own.kv.k, own.kv.v)))
    assert isinstance(own, Stored)
    seen = np.broadcast_to(own.seen, lead)
    pos = full(own.pos)
    out = by_position(pos)
    pos = np.pad(pos, [(0, 0)] * 3 + [(0, 64)], constant_values=-1)  # units may reach past the end
    for window, codec, code, ring in (
        (stage.keys, stage.codec.k, own.k, own.k_ring),
        (stage.values, stage.codec.v, own.v, own.v_ring),
    ):
        left = np.asarray(window.left(seen)) // codec.block
        for x in jax.tree.leaves(code):
            whole = np.arange(x.shape[3]) < left[..., None]
            if codec.block == 1:
                out += by_position(np.where(whole, pos[..., : x.shape[3]], -1), x)
            else:  # order matters: tokens are coded with their neighbours
                out.append(np.where(whole.reshape(*whole.shape, *(1,) * (x.ndim - 4)), x, 0))
        if ring.shape[3]:
            held = np.asarray(window.held(seen))[..., : ring.shape[3]]
            out.append(np.where((held >= 0)[..., None], ring, 0))
    if own.index is not None:
        pages = np.arange(own.index.shape[3]) < seen[..., None] // stage.reader.page
        out.append(np.round(np.where(pages[..., None], own.index, 0), 5))  # means may round
    return out


def all_contents(cache):
    stages = cache.transforms[0].stages
    return [x for s, own in zip(stages, cache.state[0]) for x in contents(s, own)]


@st.composite
def streams(draw):
    """(seed, how many tokens of each row, the commits: a list of index arrays [B, width])."""
    lengths = [draw(st.integers(0, TOKENS)) for _ in range(BATCH)]
    seed = draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    sent = np.zeros(BATCH, int)
    commits = []
    while (sent < lengths).any():
        width = draw(st.sampled_from([1, 1, 5, 5, TOKENS]))
        index = np.full((BATCH, width), -1)
        for b in range(BATCH):
            n = int(rng.integers(0, min(width, lengths[b] - sent[b]) + 1))
            n = max(n, int(len(commits) > 20 and sent[b] < lengths[b]))
            index[b, np.sort(rng.choice(width, n, replace=False))] = sent[b] + np.arange(n)
            sent[b] += n
        commits.append(index)
    return seed, lengths, commits


def bulk(lengths):
    index = np.arange(TOKENS)
    return [np.where(index < np.asarray(lengths)[:, None], index, -1)]


def singles(lengths):
    return [np.where(i < np.asarray(lengths), i, -1)[:, None] for i in range(max(lengths))]


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=12, deadline=None)
@given(streams())
def test_any_cut_gives_the_same_cache(name, case):
    seed, lengths, commits = case
    transform = CHAINS[name]
    assert transform.streaming
    start = empty(transform, TOKENS, dtype=jnp.float32)
    stream = jax.tree.map(np.asarray, turned(rows(seed, TOKENS), start.constants["rope"]))
    held = []
    for plan in (bulk(lengths), singles(lengths), commits):
        cache = start
        for index in plan:
            cache = take(cache, cut(stream, index))
        held.append(all_contents(cache))
    for other in held[1:]:
        assert len(other) == len(held[0])
        for a, b in zip(held[0], other):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)


def test_ties_do_not_depend_on_order():
    """Equal scores: the lower position stays, also where tokens arrive out of order."""
    transform = chain(heavy(3, random(0)), heavy(4, key_norm()))
    start = empty(transform, TOKENS)
    stream = jax.tree.map(np.array, turned(rows(5, TOKENS), start.constants["rope"]))
    stream["k"][:] = 1.0
    held = []
    for plan in (bulk([TOKENS, 11]), singles([TOKENS, 11])):
        cache = start
        for index in plan:
            cache = take(cache, cut(stream, index))
        held.append(all_contents(cache))
    for a, b in zip(*held):
        np.testing.assert_array_equal(a, b)


def test_what_streams():
    norm = heavy(3, key_norm())
    group = store(quantize(4, axis="channel", group=8))
    yes = [chain(norm, store()), chain(recent(3), norm), chain(norm, norm), chain(group)]
    no = [
        heavy(3, accumulated_attention()),
        heavy(3, key_norm(), recent=1),
        heavy(3, key_norm(), absorb=nearest()),
        # What heavy lets go comes in no order: whoever follows must not depend on it.
        chain(norm, recent(3)),
        chain(norm, first(3)),
        chain(norm, group),
        chain(norm, store(values=Window(4, 1))),
        chain(norm, store(reader=best_pages(2, 4))),
    ]
    assert all(t.streaming for t in yes)
    assert not any(t.streaming for t in no)
