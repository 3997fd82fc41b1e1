"""Where tokens are, by position: against caches whose contents are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    best_pages,
    chain,
    chosen,
    first,
    heavy,
    nearest,
    prune,
    random,
    recency,
    recent,
    store,
    window_attention,
)
from kvjax.cache.budgets import adaptive
from kvjax.cache.look import placed, reads
from kvjax.codecs import quantize
from kvjax.decode import prefill
from kvjax.models.decoder import forward
from tests.compress.harness import CONFIG, held, model

T, LENGTHS = 24, (24, 15)


def filled(transform):
    tokens = jax.random.randint(jax.random.key(3), (2, T), 0, 50)
    return prefill(model(), tokens, transform, lengths=jnp.asarray(LENGTHS), new_tokens=2)[1]


def positions(where):
    return [
        [[np.flatnonzero(h).tolist() for h in row] for row in layer] for layer in where.held
    ]  # fmt: skip


@pytest.mark.parametrize(
    "transform",
    [
        store(),
        chain(first(2), recent(3), heavy(4, random()), store(quantize(4))),
        chain(prune(9, window_attention(3)), store()),
        chain(prune(9, window_attention(3), budget=adaptive(0.2, 3)), store(quantize(4))),
        chain(chosen(5, window_attention(2)), recent(4)),
    ],
    ids=["dense", "four stages", "pruned", "ragged", "chosen"],
)
def test_positions_are_those_held(transform):
    cache = filled(transform)
    assert positions(placed(cache)) == held(cache)


def test_stages_and_forms():
    where = placed(filled(chain(first(2), recent(3), store(quantize(4)))))
    for row, n in enumerate(LENGTHS):
        want = [0, 0] + [2] * (n - 5) + [1] * 3 + [-1] * (T + 2 - n)
        assert (where.stage[:, row] == want).all()
        assert (where.coded[:, row] == (np.asarray(want) == 2)).all()
    ring = placed(filled(store(quantize(4, "channel", 4))))  # keys wait until four are there
    assert ring.coded[0, 1, 0].tolist() == [True] * 12 + [False] * (T + 2 - 12)
    assert not placed(filled(store())).coded.any()
    assert placed(filled(heavy(5, recency(), codec=quantize(8)))).coded.sum() == 2 * 2 * 2 * 5


def test_merged_tokens_are_counted():
    cache = filled(chain(heavy(6, random(), absorb=nearest(-1.0))))
    where = placed(cache)
    per_head = (where.held + where.others).sum(-1)
    np.testing.assert_allclose(per_head, np.broadcast_to(np.asarray(LENGTHS)[:, None], (2, 2, 2)))
    assert (where.others[~where.held] == 0).all()


@jax.jit
def _step(model, cache, pos):
    return forward(model, jnp.full((2, 1), 7), pos, cache, statistics=True)


def test_reads_what_the_reader_chose():
    cache = filled(chain(recent(2), store(reader=best_pages(2, 4))))
    new = _step(model(), cache, cache.length[:, None])[1]
    got = reads(cache, new)
    own, stage = cache.state[0][1], cache.transforms[0].stages[1]
    q = np.asarray(new.seen.q).reshape(CONFIG.layers, 2, CONFIG.kv_heads, -1, CONFIG.head_dim)
    for l, b, h in np.ndindex(CONFIG.layers, 2, CONFIG.kv_heads):
        n = LENGTHS[b] - 2
        score = (q[l, b, h] @ np.asarray(own.index)[l, b, h, : n // 4].T).max(0)
        pages = np.argsort(-score, kind="stable")[:2]
        want = {p * 4 + i for p in pages for i in range(4)} | set(range(n // 4 * 4, n + 2))
        assert set(np.flatnonzero(got[l, b, h]).tolist()) == want
    assert stage.reader.pages == 2
    assert not (got & ~placed(cache).held).any() and (placed(cache).held & ~got).any()


def test_everything_is_read_where_there_is_no_reader():
    cache = filled(chain(prune(9, window_attention(3)), store()))
    new = _step(model(), cache, cache.length[:, None])[1]
    np.testing.assert_array_equal(reads(cache, new), placed(cache).held)
