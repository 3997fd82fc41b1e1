"""xKV against NumPy: what is factored, what a query rebuilds, and what it leaves unread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    Query,
    attend,
    chain,
    commit,
    finish,
    init_cache,
    key_norm,
    layer_bases,
    nbytes,
    prune,
    rotate,
    start,
)
from kvjax.cache.stages.bases import gram, principal, side_by_side
from kvjax.compress import parse, xkv
from kvjax.models.config import Config
from tests.compress import reference as ref
from tests.compress.reference import STEPS, B, D, G, H, L, T, row, softmax, turn
from tests.compress.test_reference_codes import follow


def wide(x):
    """[H, n, D] -> [n, H D]."""
    return np.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def truncated(x, rank):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def rebuilt(layer, b, group, rank_k, rank_v):
    """(keys before rotation, values) [H, n, D] of a layer as xKV gives them back."""
    at = layer // group * group
    rows = [row(l, b) for l in range(at, min(at + group, L))]
    n, out = rows[0].n, []
    for rank, xs in ((rank_k, [r.plain for r in rows]), (rank_v, [r.v for r in rows])):
        x = np.concatenate([wide(x[:, :n]) for x in xs], 1)
        mine = truncated(x, rank)[:, (layer - at) * H * D : (layer - at + 1) * H * D]
        out.append(np.moveaxis(mine.reshape(n, H, D), 1, 0))
    return out


@pytest.mark.parametrize(("group", "rank_k", "rank_v"), [(2, 9, 14), (1, 5, 7), (4, 9, 14)])
def test_what_a_query_reads(group, rank_k, rank_v):
    def read(r, n):
        k, v = rebuilt(r.layer, r.batch, group, rank_k, rank_v)
        k = turn(k, np.arange(r.n))
        return np.concatenate([k, r.k[:, r.n : n]], 1), np.concatenate([v, r.v[:, r.n : n]], 1)

    follow(f"xkv(group={group}, key_rank={rank_k}, value_rank={rank_v})", read)


# --- selective reconstruction ---

CHUNK, LOCAL, OUT, RANKS = 4, 1, 1, (9, 14)


def selected(l, b, raw, budget, pos):
    """(K, V) per KV head that a query [HQ, D] at `pos` reads: chosen, outlier, local tokens."""
    r = row(l, b)
    k_hat, v_hat = rebuilt(l, b, 2, *RANKS)
    k_hat = turn(k_hat, np.arange(r.n))
    chunks = r.n // CHUNK - LOCAL
    q = turn(raw, np.full(1, pos)).reshape(H, G, D)
    out = []
    for h in range(H):
        keys = r.k[h, : chunks * CHUNK].reshape(chunks, CHUNK, D)
        mean = keys.mean(1)
        size = np.linalg.norm(keys, axis=-1) * np.linalg.norm(mean, axis=-1)[:, None]
        cosine = ((keys * mean[:, None]).sum(-1) / size).min(-1)
        apart = list(np.argsort(cosine)[:OUT])
        rest = [c for c in range(chunks) if c not in apart]
        score = softmax(q[h] @ mean[rest].T).max(0)
        best = [rest[i] for i in np.argsort(-score)[: budget // CHUNK]]
        at = lambda cs: [c * CHUNK + i for c in cs for i in range(CHUNK)]  # noqa: E731
        exact = at(apart) + list(range(chunks * CHUNK, r.n))
        out.append((np.concatenate([k_hat[h, at(best)], r.k[h, exact]]),
                    np.concatenate([v_hat[h, at(best)], r.v[h, exact]])))  # fmt: skip
    return out


@jax.jit
def probe(cache, raw, pos):
    """Attention out [L, B, HQ, T, D] of rows raw at pos [B, T] over what is held."""

    def layer(l):
        rope, span = cache.constants["rope"][l], cache.constants["span"][l]
        query = Query(
            rotate(raw[l], pos[:, None], rope), raw[l], pos, rope, span, cache.constants,
            jnp.zeros((B,), jnp.int32),
        )  # fmt: skip
        return attend(cache, jnp.asarray(l), query, start(cache, query.pos))[0].out

    return jnp.stack([layer(l) for l in range(L)])


def selective(budget, more=""):
    return (
        f"xkv(group=2, key_rank={RANKS[0]}, value_rank={RANKS[1]}, budget={budget}, "
        f"chunk={CHUNK}, local={LOCAL}, outliers={OUT}{more})"
    )


@pytest.mark.parametrize("budget", [4, 8])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_query_rebuilds_the_chunks_that_it_attends_to(budget, rows):
    """Each of several rows reads what it would have read alone."""
    cache = ref.ours(selective(budget))
    raw = np.random.default_rng(3).standard_normal((L, B, ref.HQ, rows, D)) * 2
    pos = np.asarray([[n + t for t in range(rows)] for n in ref.LENGTHS])
    out = probe(cache, jnp.asarray(raw, jnp.float32), jnp.asarray(pos, jnp.int32))
    for l, b, t in np.ndindex(L, B, rows):
        read = selected(l, b, raw[l, b, :, t : t + 1], budget, pos[b, t])
        for h in range(ref.HQ):
            k, v = read[h // G]
            q = turn(raw[l, b, h, t : t + 1], pos[b, t : t + 1])
            want = (softmax(q @ k.T) @ v)[0]
            np.testing.assert_allclose(out[l, b, h, t], want, atol=1e-4, rtol=1e-4)


def test_a_budget_of_everything_reads_everything():
    raw = jnp.asarray(np.random.default_rng(3).standard_normal((L, B, ref.HQ, 1, D)), jnp.float32)
    pos = jnp.asarray([[n] for n in ref.LENGTHS], jnp.int32)
    ranks = f"group=2, key_rank={RANKS[0]}, value_rank={RANKS[1]}"
    texts = f"xkv({ranks})", f"xkv({ranks}, budget=24, chunk=4, local=0, outliers=0)"
    plain, chosen = (probe(ref.ours(text), raw, pos) for text in texts)
    # What is left of an incomplete chunk is exact: the first row has none.
    np.testing.assert_allclose(chosen[:, 0], plain[:, 0], atol=1e-5)
    texts = "dense", "xkv(key_rank=1.0, value_rank=1.0, budget=24)"
    dense, full = (probe(ref.ours(text), raw, pos) for text in texts)
    np.testing.assert_allclose(full, dense, atol=1e-4)


def test_many_rows_read_every_token_once():
    """More rows than choose for themselves: all chunks are rebuilt but those held exactly."""
    pos = np.asarray([[n + t for t in range(17)] for n in ref.LENGTHS], np.int32)
    raw = np.random.default_rng(4).standard_normal((L, B, ref.HQ, 17, D)).astype(np.float32)
    ranks = f"key_rank={RANKS[0]}, value_rank={RANKS[1]}"
    texts = "dense", selective(4).replace(ranks, "key_rank=1.0, value_rank=1.0")
    dense, many = (probe(ref.ours(text), jnp.asarray(raw), jnp.asarray(pos)) for text in texts)
    np.testing.assert_allclose(many, dense, atol=1e-4)


# --- laws ---


def layers(x, group):
    """x [L, n, C] -> groups' tokens side by side, as the stage has them: [groups, 1, 1, n, ..]."""
    return side_by_side(jnp.asarray(x, jnp.float32)[:, None, None], group)


def error(x, group, rank):
    """Squared error of x [L, n, C] in bases of `rank` per group."""
    x = layers(x, group)
    v = principal(gram(x))[..., :rank]
    return float(jnp.sum((x - x @ v @ jnp.matrix_transpose(v)) ** 2))


def test_error_is_what_the_truncated_svd_leaves_out():
    x = np.random.default_rng(0).standard_normal((4, 40, 8)) * np.geomspace(4, 0.1, 8)
    last = np.inf
    for rank in (1, 4, 9, 16):
        found = error(x, 2, rank)
        left = sum(
            (np.linalg.svd(np.concatenate(x[i : i + 2], 1))[1][rank:] ** 2).sum() for i in (0, 2)
        )
        np.testing.assert_allclose(found, left, rtol=1e-3, atol=1e-3)
        assert found < last
        last = found


def test_grouping_never_loses_at_equal_ranks_per_layer():
    rng = np.random.default_rng(1)
    common = rng.standard_normal((60, 6))
    x = np.stack([common @ rng.standard_normal((6, 8)) for _ in range(4)])
    x += 0.3 * rng.standard_normal(x.shape)
    apart, pairs, all_ = (error(x, g, 2 * g) for g in (1, 2, 4))
    assert all_ < pairs < apart
    noise = rng.standard_normal((4, 60, 8))
    assert error(noise, 4, 8) <= error(noise, 2, 4) * (1 + 1e-5) <= error(noise, 1, 2) * (1 + 2e-5)


def test_layers_that_hold_the_same_need_its_rank_once():
    rng = np.random.default_rng(2)
    one = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 8))
    assert error(np.stack([one] * 4), 4, 3) < 1e-6 * 4 * (one**2).sum()


# --- sizes and refusals ---


@jax.jit
def _all(cache, new):
    return finish(commit(cache, new, phase="prefill"))


def test_exact_layers_are_left_alone():
    cache = init_cache(ref.CONFIG, xkv(), B, T + STEPS, prompt=T, exact_layers=(1,))
    new = ref.new_rows(*ref.prompt_rows())
    cache = _all(cache, new)
    held = cache.state[1][0]
    for b, n in enumerate(ref.LENGTHS):
        want = turn(ref.stream()[1][1, b].astype(np.float64), np.arange(T + STEPS))[:, :n]
        np.testing.assert_allclose(held.k[0, b, :, :n], want, atol=1e-5)
        np.testing.assert_array_equal(held.v[0, b, :, :n], ref.stream()[2][1, b, :, :n])


@pytest.mark.parametrize(("group", "rank_k", "rank_v"), [(1, 24, 36), (2, 48, 72), (4, 96, 144)])
def test_bytes_are_those_of_the_formula(group, rank_k, rank_v):
    config = Config(50, 64, 48, 6, 3, 3, 64)
    n, more = 1024, 64
    text = f"xkv(group={group}, key_rank={rank_k}, value_rank={rank_v})"
    cache = init_cache(config, parse(text)[0][1], 1, n + more, prompt=n)
    size = nbytes(jax.eval_shape(finish, cache))
    ranks = rank_k + rank_v
    numbers = -(-6 // group) * n * ranks + 6 * 3 * 64 * ranks + 2 * 6 * 3 * 64 * more
    assert size == 4 * (numbers + n + more + 2)  # positions, and two counts


def test_codes_of_coordinates_take_their_bits():
    config = Config(50, 64, 48, 4, 2, 2, 64)

    def size(text):
        cache = init_cache(config, parse(text)[0][1], 1, 4096, prompt=4096)
        return nbytes(jax.eval_shape(finish, cache).state[0][0].k)

    assert size("xkv(key_rank=64, bits=4)") == size("xkv(key_rank=64)") * (4 + 0.5) / 32


def test_coarse_coordinates_are_near_exact_ones():
    raw = jnp.asarray(np.random.default_rng(3).standard_normal((L, B, ref.HQ, 1, D)), jnp.float32)
    pos = jnp.asarray([[n] for n in ref.LENGTHS], jnp.int32)

    def read(more):
        return np.asarray(probe(ref.ours(f"xkv(key_rank=16, value_rank=16{more})"), raw, pos))

    exact, fine, coarse = read(""), read(", bits=8"), read(", bits=2")
    assert np.abs(fine - exact).max() < 0.05 < np.abs(coarse - exact).max() < 2


def test_what_makes_no_sense_is_refused():
    for bad in (
        {"group": 0}, {"key_rank": 0}, {"value_rank": 1.5}, {"bits": 9}, {"budget": 12},
        {"budget": 16, "local": -1}, {"outliers": 3}, {"key_rank": True},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"xkv.{list(bad)[-1]}"):
            xkv(**bad)
    behind = chain(prune(8, key_norm()), xkv())
    with pytest.raises(ValueError, match="other ones in each"):
        init_cache(ref.CONFIG, behind, 1, 32, prompt=16)
    with pytest.raises(ValueError, match="only where a reader"):
        layer_bases(4, 4, apart=2)
