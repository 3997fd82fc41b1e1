"""Position-indexed caches, trees, and commits of chosen rows in any order."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import by_position, chain, commit, first, heavy, key_norm, recent, store
from tests.cache.harness import (
    BATCH,
    HEADS,
    KV_HEADS,
    LAYERS,
    _look,
    close,
    cut,
    dense,
    empty,
    look,
    rows,
    step,
    turn,
)

LENGTH = 12
take = jax.jit(commit)


@jax.jit
def look_full(cache, r):
    return _look(cache, r, "full")


def put_back(r, fresh, where):
    """The stream r with the rows of `fresh` at positions `where` [B, K] in place of the old."""
    out = {n: x.copy() for n, x in r.items()}
    for b in range(BATCH):
        for j, p in enumerate(where[b]):
            if p >= 0:
                for name in ("q", "k", "v"):
                    out[name][:, b, :, p] = fresh[name][:, b, :, j]
    return out


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_a_token_committed_again_replaces_itself(seed):
    """Diffusion: any positions are forwarded with a full mask, some of them committed. A row sees
    every held position that is not among the new rows, and all new rows."""
    draw = np.random.default_rng(seed)
    r = rows(seed, LENGTH)
    cache = empty(by_position(LENGTH), LENGTH)
    held = np.full((BATCH, LENGTH), False)
    for again in range(3):
        where = np.stack([draw.permutation(LENGTH)[:4] for _ in range(BATCH)])
        where[draw.random(where.shape) < 0.2] = -1
        fresh = rows(seed + again + 1, 4, where)
        out, new = look_full(cache, fresh)
        # A stream in which the new rows stand in place of those they supersede.
        now = put_back(r, fresh, where)
        seen = held.copy()
        for b in range(BATCH):
            seen[b, where[b][where[b] >= 0]] = True
        want = full_attention(now, seen)
        at = np.maximum(where, 0)[None, :, None, :, None]
        close(out, np.take_along_axis(want, at, 3), where)
        keep = np.where(draw.random((BATCH, 3)) < 0.8, draw.permuted(
            np.tile(np.arange(4), (BATCH, 1)), axis=1)[:, :3], -1)  # fmt: skip
        cache = take(cache, new, jnp.asarray(keep))
        kept = np.where(keep >= 0, np.take_along_axis(where, np.maximum(keep, 0), 1), -1)
        chosen = {n: x for n, x in cut(fresh, keep).items()}
        r = put_back(r, chosen, kept)
        for b in range(BATCH):
            held[b, kept[b][kept[b] >= 0]] = True
    pos = np.asarray(cache.state[0][0].kv.pos)[0, :, 0]
    np.testing.assert_array_equal(pos, np.where(held, np.arange(LENGTH), -1))
    np.testing.assert_array_equal(cache.length, np.max(np.where(held, np.arange(12) + 1, 0), 1))


def full_attention(r, seen):
    """Attention of all rows to the positions where `seen` [B, P], earlier or later, in float64."""
    pos = np.where(seen, r["pos"], -1)
    clean = {n: np.nan_to_num(r[n]).astype(np.float64) for n in ("q", "k", "v")}
    q, k = (turn(clean[n], pos[None, :, None]) for n in ("q", "k"))
    k, v = (np.repeat(x, HEADS // KV_HEADS, 2) for x in (k, clean["v"]))
    logits = np.where((pos >= 0)[None, :, None, None, :], q @ np.swapaxes(k, -1, -2), -np.inf)
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - np.where(np.isinf(top), 0, top))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300) @ v


TREES = chain(first(2), recent(3, release=8), store())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5))
def test_a_tree_then_its_path_is_plain_decoding(seed, prompt):
    """Forward on a random tree: a row sees the cache and its ancestors. Then the commit of one
    path, in any order and with -1 between, is plain decoding of that path."""
    draw = np.random.default_rng(seed)
    size, longest = 6, 4
    parent = np.array([[-1] + [int(draw.integers(0, i)) for i in range(1, size)]] * BATCH)
    depth = np.zeros((BATCH, size), int)
    sees = np.zeros((BATCH, size, size), bool)
    for b in range(BATCH):
        for i in range(size):
            sees[b, i, i] = True
            if i:
                depth[b, i] = depth[b, parent[b, i]] + 1
                sees[b, i] |= sees[b, parent[b, i]]
    r = rows(seed, LENGTH)
    cache = empty(TREES, LENGTH)
    for i in range(prompt):
        _, cache = step(cache, cut(r, np.full((BATCH, 1), i)))
    tree = cut({**r, "pos": r["pos"] * 0 + 1}, prompt + np.tile(np.arange(size), (BATCH, 1)))
    tree["pos"] = (prompt + depth).astype(np.int32)
    out, new = look(cache, tree, jnp.asarray(sees))
    path, keep = np.full((BATCH, longest), -1), np.full((BATCH, longest + 1), -1)
    for b in range(BATCH):
        leaf = int(draw.choice(np.nonzero(depth[b] < longest)[0]))
        nodes = np.nonzero(sees[b, leaf])[0]
        path[b, : len(nodes)] = nodes
        keep[b, draw.permutation(longest + 1)[: len(nodes)]] = nodes
    plain = cache
    for i in range(longest):
        one, plain = step(plain, cut(tree, path[:, i : i + 1]))
        at = np.maximum(path[:, i], 0)[None, :, None, None, None]
        close(np.take_along_axis(np.asarray(out), at, 3), one, cut(tree, path[:, i : i + 1])["pos"])
    got = take(cache, new, jnp.asarray(keep))
    probe = rows(seed + 1, 1, np.full((BATCH, 1), prompt + longest))
    close(look(got, probe)[0], look(plain, probe)[0], probe["pos"])
    np.testing.assert_array_equal(got.length, plain.length)


def test_commit_takes_rows_in_any_order():
    r = rows(0, 6)
    cache = empty(chain(heavy(4, key_norm()), store()), 6)
    _, new = look(cache, r)
    probe = rows(1, 1, np.full((BATCH, 1), 6))
    want = None
    for keep in ([5, 0, -1, 3, 1], [0, 1, 3, 5, -1], [-1, 3, 5, 1, 0]):
        got = take(cache, new, jnp.asarray([keep] * BATCH))
        out = np.asarray(look(got, probe)[0])
        want = out if want is None else want
        np.testing.assert_array_equal(out, want)
    kept = np.isin(np.arange(7), [0, 1, 3, 5, 6])
    both = {n: np.concatenate([r[n], probe[n]], 1 if n == "pos" else 3) for n in r}
    mask = np.broadcast_to(kept, (LAYERS, BATCH, 2, 7, 7))
    close(want, dense(both, keep=mask)[0][:, :, :, 6:], probe["pos"])
