"""Reading a buffer block by block gives what reading it whole gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import KV, New, Window, attention, chain, commit, init_cache, recent, store
from kvjax.cache.cache import attend, start
from kvjax.cache.types import Query
from kvjax.codecs import per_kv, quantize
from kvjax.models.config import Config

CONFIG = Config(vocab_size=8, width=16, mlp_width=16, layers=1, heads=2, kv_heads=1, head_dim=8)
ROOM = 400
# 20 tokens are coded together: no power of two is a whole number of such groups.
GROUPED = store(per_kv(k=quantize(8, "channel", group=20), v=quantize(8)), values=Window(20))


def read(transform, held: int, numbers: int, differentiable: bool, monkeypatch) -> np.ndarray:
    monkeypatch.setattr(attention, "NUMBERS", numbers)
    key = jax.random.key(held)
    kv = KV(
        jax.random.normal(key, (1, 1, 1, ROOM, 8)),
        jax.random.normal(jax.random.fold_in(key, 1), (1, 1, 1, ROOM, 8)),
        jnp.where(jnp.arange(ROOM) < held, jnp.arange(ROOM), -1)[None, None, None],
    )

    @jax.jit
    def run(kv, q):
        cache = init_cache(CONFIG, chain(transform), 1, ROOM)
        cache = commit(cache, New(kv))
        pos = jnp.full((1, 1), ROOM, jnp.int32)
        rope = cache.constants["rope"][0]
        query = Query(
            q, q, pos, rope, jnp.int32(2**30), cache.constants, jnp.zeros((1,), jnp.int32),
            differentiable=differentiable,
        )  # fmt: skip
        return attend(cache, jnp.int32(0), query, start(cache, pos))[0]

    part = run(kv, jax.random.normal(jax.random.fold_in(key, 2), (1, 2, 1, 8)))
    return np.concatenate([np.asarray(x).ravel() for x in dataclasses.astuple(part)])


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("transform", [store(), GROUPED, recent(ROOM)], ids=str)
@pytest.mark.parametrize("held", [60, 399])
def test_blocks_read_what_the_whole_holds(transform, held, differentiable, monkeypatch):
    whole = read(transform, held, 2**20, differentiable, monkeypatch)
    blocks = read(transform, held, 1, differentiable, monkeypatch)
    np.testing.assert_allclose(blocks, whole, rtol=2e-6, atol=2e-6)


def test_block_size_is_whole_units():
    for row in (1, 192, 1536, 10**6):
        for unit in (1, 16, 20, 32, 64, 96, 2000):
            size = attention.block_size(row, unit)
            assert size % unit == 0 and (unit <= size <= max(unit, 1024))


@pytest.mark.parametrize("mask", ["causal", "window", "full", "tree"])
@pytest.mark.parametrize("rows, padded", [(9, 9), (40, 40), (61, 61), (40, 3), (61, 3)])
def test_new_rows_in_blocks_see_each_other_as_at_once(rows, padded, mask, monkeypatch):
    """Rows in two to eight blocks of 8, an odd and an even number, with padding anywhere or among
    the first alone, where later blocks need no mask."""
    monkeypatch.setattr(attention, "ROWS", 8)
    draw = np.random.default_rng(rows)
    q, k, v = (draw.standard_normal((2, h, rows, 8)).astype(np.float32) for h in (6, 3, 3))
    gone = (draw.random((2, rows)) < 0.2) & (np.arange(rows) < padded)
    pos = np.where(gone, -1, 5 + np.arange(rows)).astype(np.int32)
    ok = np.broadcast_to((pos >= 0)[:, None, :], (2, rows, rows))
    given = draw.random((2, rows, rows)) < 0.5
    if mask == "tree":
        ok = ok & given
    elif mask != "full":
        ok = ok & (pos[:, None, :] <= pos[:, :, None])
    if mask == "window":
        ok = ok & (pos[:, :, None] - pos[:, None, :] < 11)
    logits = np.einsum("bhgtd,bhnd->bhgtn", q.reshape(2, 3, 2, rows, 8).astype(float), k)
    weights = np.where(ok[:, None, None], np.exp(logits - 40), 0)
    total = weights.sum(-1, keepdims=True)
    out = np.einsum("bhgtn,bhnd->bhgtd", weights / np.where(total > 0, total, 1), v)
    query = Query(
        jnp.asarray(q), jnp.asarray(q), jnp.asarray(pos), None, jnp.int32(11), {},
        jnp.zeros((2,), jnp.int32), window=mask == "window",
    )  # fmt: skip
    rule = {"tree": jnp.asarray(given), "window": "causal"}.get(mask, mask)
    got = jax.jit(lambda *x: attention.attend_new(*x, rule))(query, jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(got.out, out.reshape(2, 6, rows, 8), rtol=2e-5, atol=2e-6)
    lse = (np.log(np.maximum(total, 1e-300)) + 40).reshape(2, 6, rows)
    seen = np.broadcast_to(ok.any(-1)[:, None], lse.shape)
    np.testing.assert_allclose(np.asarray(got.lse)[seen], lse[seen], rtol=2e-6, atol=2e-5)
    assert np.all(np.asarray(got.sum)[~seen] == 0)
