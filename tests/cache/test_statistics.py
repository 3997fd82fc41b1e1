"""Attention statistics at commit, against the attention matrix that is never stored."""

import numpy as np
import pytest

from kvjax.cache import (
    accumulated_attention,
    chain,
    heavy,
    newest_attention,
    prune,
    store,
    window_attention,
)
from kvjax.models.config import Config
from tests.cache.harness import (
    BATCH,
    CONFIG,
    HEADS,
    KV_HEADS,
    LAYERS,
    dense,
    empty,
    part,
    ragged_positions,
    rows,
    step,
)

PROMPT = 24
HARD = Config(
    29, 16, 16, LAYERS, HEADS, KV_HEADS, CONFIG.head_dim,
    attention_softcap=3.0, windows=(7, None),
)  # fmt: skip


def grouped(p):
    """[L, B, Hq, R, T] -> mean over the query heads of each key-value head."""
    return p.reshape(LAYERS, BATCH, KV_HEADS, HEADS // KV_HEADS, *p.shape[3:]).mean(3)


def prefilled(transform, r, chunk, config):
    cache = empty(transform, PROMPT, PROMPT, config)
    for first in range(0, PROMPT, chunk):
        _, cache = step(cache, part(r, first, first + chunk), "prefill", config)
    return cache


@pytest.mark.parametrize("chunk", [PROMPT, 8])
@pytest.mark.parametrize("config", [CONFIG, HARD], ids=["plain", "window and softcap"])
def test_accumulated_attention_is_column_sums(config, chunk):
    r = rows(1, PROMPT, ragged_positions(1, PROMPT, 0))
    score = accumulated_attention()
    cache = prefilled(chain(prune(3, score), store()), r, chunk, config)
    held = cache.state[0].kv
    sums = grouped(dense(r, config)[1]).sum(3)
    for b in range(BATCH):
        valid = r["pos"][b] >= 0
        n = valid.sum()
        np.testing.assert_array_equal(held.pos[0, b, 0, :n], r["pos"][b][valid])
        got = np.asarray(held.extra["attention"])[:, b, :, :n]
        np.testing.assert_allclose(got, sums[:, b][..., valid], rtol=1e-5, atol=1e-5)


def test_accumulated_attention_of_evicted_tokens_goes_on():
    """heavy's sums run over rows since arrival, normalised over what each row really saw."""
    r = rows(2, PROMPT)
    cache = empty(chain(heavy(PROMPT, newest_attention(whole_layer=False)), store()), PROMPT)
    for i in range(PROMPT):
        _, cache = step(cache, part(r, i, i + 1))
    p = grouped(dense(r)[1])[..., -1, :]
    got = np.asarray(cache.state[0][0].kv.extra["newest_attention_per_head"])
    at = np.asarray(cache.state[0][0].kv.pos)
    np.testing.assert_allclose(got, np.take_along_axis(p, at, -1), rtol=1e-5, atol=1e-6)


def test_window_queries_of_chunks_are_those_of_the_whole():
    r = rows(3, PROMPT, ragged_positions(3, PROMPT, 0))
    transform = chain(prune(6, window_attention(6)), store())
    whole, chunked = (prefilled(transform, r, c, CONFIG).state[0].stats for c in (PROMPT, 8))
    a, b = whole["last_6_rows"], chunked["last_6_rows"]
    np.testing.assert_array_equal(a.pos, b.pos)
    for row in range(BATCH):
        valid = r["pos"][row][r["pos"][row] >= 0]
        want = np.full(6, -1)
        want[6 - min(6, len(valid)) :] = valid[-6:]
        np.testing.assert_array_equal(a.pos[row], want)
        there = want >= 0
        for x, y in ((a.q, b.q), (a.max, b.max), (a.sum, b.sum)):
            x, y = (np.asarray(z)[:, row][:, :, there] for z in (x, y))
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
