"""Reading by spans: what the monoid of stages and the loops around it may do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import Query, best_spans, chain, ends_every, first, layer_bases, recent, store
from kvjax.cache.readers.spans import Spans

B, H, S, D = 1, 2, 6, 4
ENDS = ends_every(3)


def query(q, ended=0.0):
    zero = jnp.zeros((B,), jnp.int32)
    flat = q.reshape(B, -1, 1, D)
    return Query(
        flat, flat, zero[:, None], None, None, {}, zero, columns={"ends": jnp.full((B, 1), ended)}
    )


@st.composite
def states(draw):
    """Lengths of spans of each head, and what is read."""
    lengths = [draw(st.lists(st.integers(1, 7), min_size=1, max_size=S)) for _ in range(H)]
    first, recent = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    more, writing = draw(st.integers(1, 20)), draw(st.booleans())
    return lengths, first, recent, more, writing, draw(st.integers(0, 10**6))


@settings(max_examples=12, deadline=None)
@given(states())
def test_what_is_chosen(case):
    """Against a loop: best spans first, in order, the last one cut; each token once; all where all
    fit."""
    lengths, low, late, more, writing, seed = case
    rng = np.random.default_rng(seed)
    reader = best_spans(low + late + more, ENDS, first=low, recent=late)
    count = np.zeros((B, H, S), np.int32)
    start = np.full((B, H, S), 10**6, np.int32)
    total = np.zeros((B, H, S, D), np.float32)
    for h, own in enumerate(lengths):
        count[0, h, : len(own)] = own
        start[0, h, : len(own)] = np.cumsum([0, *own[:-1]])
        total[0, h, : len(own)] = rng.standard_normal((len(own), D)) * np.asarray(own)[:, None]
    newest = np.asarray([[len(own) - 1 for own in lengths]])
    asked = rng.standard_normal((B, H, D)).astype(np.float32)
    index = Spans(
        total, start, count, newest, np.zeros((B, H), bool), np.full((B, H), writing), asked,
        np.ones((1, 1), np.int32), 0,
    )  # fmt: skip
    q = rng.standard_normal((B, H, 2, D)).astype(np.float32)
    held = count.sum(-1)
    chosen = np.asarray(
        reader.select(jax.tree.map(jnp.asarray, index), query(q), jnp.asarray(q), jnp.asarray(held))
    )
    for h, own in enumerate(lengths):
        n = int(held[0, h])
        near = [total[0, h, s] / own[s] @ (asked[0, h] + q[0, h].sum(0)) for s in range(len(own))]
        order = sorted(range(len(own)), key=lambda s: (writing and s == len(own) - 1, -near[s], s))
        a, z = min(low, n), max(n - late, min(low, n))
        inside = [
            i for s in order for i in range(start[0, h, s], start[0, h, s] + own[s]) if a <= i < z
        ]
        want = [*range(a), *inside[:more], *range(z, n)]
        got = sorted(int(i) for i in chosen[0, h] if i >= 0)
        assert got == sorted(want) and len(set(got)) == len(got) <= reader.pages
        assert len(got) == min(n, reader.pages)


def test_spans_of_marks():
    """A span ends with a marked token; of a finished prompt, the count of ends before each."""
    pos = jnp.asarray([[0, 1, 2, 3, 4, 5, 6, -1]])
    ends = ENDS.of_tokens(None, pos, {})
    assert ends[0, :7].tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert ENDS.complete(ends[None, :, None], pos[None, :, None])[0, 0, 0, :7].tolist() == [
        0, 0, 0, 1, 1, 1, 2
    ]  # fmt: skip


def test_where_it_does_not_fit():
    reader = best_spans(9, ENDS)
    with pytest.raises(ValueError, match="one of pages"):
        layer_bases(4, 4, 1, reader=reader)
    assert chain(first(2), recent(3), store(reader=reader)).token_marks == (ENDS,)
