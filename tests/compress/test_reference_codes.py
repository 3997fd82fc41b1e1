"""KIVI, GEAR and plain rounding, against NumPy: what is coded when, and what it reads as."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.compress import gear, kivi, parse
from tests.compress import reference as ref
from tests.compress.reference import STEPS, D, H, affine, per_channel, per_token, row

R, GROUP = 8, 4


def follow(text, read, constants=None, extra=None):
    """read(row, n) -> K, V [H, n, D] as they read after n tokens."""
    cache = ref.ours_chain(parse(text)[0][1], constants=constants, extra=extra)
    for i in range(STEPS + 1):
        if i in (0, 1, 7, STEPS):

            def side(l, b, i=i):
                r = row(l, b)
                return list(zip(*read(r, r.n + i)))

            ref.agree(cache, side, i)
        if i < STEPS:  # no attention is asked for: any numbers will do
            cache = ref.advance(cache, i, [[[np.zeros(1)] * ref.HQ] * ref.B] * ref.L)


def join(coded, exact):
    return np.concatenate([coded, exact], 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(bits):
    def read(r, n):
        nk, nv = n // R * R, max(0, n - R)
        k = join(per_channel(r.k[:, :nk], bits, GROUP), r.k[:, nk:n])
        v = join(per_token(r.v[:, :nv], bits, GROUP), r.v[:, nv:n])
        return k, v

    follow(f"kivi(bits={bits}, group={GROUP}, residual={R})", read)


def test_kivi_codes_several_values_together():
    def read(r, n):
        nk, nv = n // R * R, max(0, n - R) // 3 * 3
        k = join(per_channel(r.k[:, :nk], 2, GROUP), r.k[:, nk:n])
        return k, join(per_token(r.v[:, :nv], 2, GROUP), r.v[:, nv:n])

    follow(f"kivi(bits=2, group={GROUP}, residual={R}, release=3)", read)


def test_kivi_boundaries():
    """floor(T / R) R keys and max(0, T - R) values are coded, for every T up to 3 R."""
    stage = kivi(group=GROUP, residual=R).stages[0]
    seen = np.arange(3 * R + 1)
    assert (stage.keys.left(jnp.asarray(seen)) == seen // R * R).all()
    assert (stage.values.left(jnp.asarray(seen)) == np.maximum(0, seen - R)).all()


def pruned(x, sparsity):
    """Entries below the m-th smallest magnitude of their token, m = max(1, int(s D)), to zero."""
    m = max(1, int(sparsity * D))
    return np.where(abs(x) >= np.sort(abs(x), -1)[..., m - 1 : m], x, 0)


@pytest.mark.parametrize("release", [1, 3])
def test_mustafar(release):
    """One token that leaves the window is pruned after each step, or several together."""

    def read(r, n):
        old = max(0, n - 5) // release * release
        k = join(pruned(r.k[:, :old], 0.7), r.k[:, old:n])
        return k, join(pruned(r.v[:, :old], 0.5), r.v[:, old:n])

    follow(f"mustafar(value_sparsity=0.5, window=5, release={release})", read)


def test_mustafar_prunes_before_it_quantises():
    """Ranges are those of the entries that stay; what is pruned reads exactly zero."""

    def coarse(x):
        out = np.zeros_like(x)
        for at in np.ndindex(x.shape[:2]):
            there = pruned(x[at], 0.7) != 0
            out[at][there] = affine(x[at][there], 4, 0)
        return out

    def read(r, n):
        old = max(0, n - 5)
        return [join(coarse(x[:, :old]), x[:, old:n]) for x in (r.k, r.v)]

    follow("mustafar(window=5, bits=4)", read)


def test_rtn():
    def read(r, n):
        return per_token(r.k[:, :n], 4, GROUP), per_token(r.v[:, :n], 4, GROUP)

    follow(f"rtn(bits=4, group={GROUP})", read)


def sparse_and_coarse(x, bits, axis, backbone, group=GROUP):
    """D + S of one block x [H, n, D]: one outlier per side and vector, its mean in their place."""
    low, high = x.argmin(axis, keepdims=True), x.argmax(axis, keepdims=True)
    rest = x.copy()
    mean = x.mean(axis, keepdims=True)
    for at in (low, high):
        np.put_along_axis(rest, at, mean, axis)
    if backbone == "kivi":
        coarse = per_channel(rest, bits, group) if axis == 1 else per_token(rest, bits, group)
    else:
        coarse = affine(rest, bits, axis)
    for at in (low, high):
        exact = np.take_along_axis(x, at, axis).astype(np.float16)
        np.put_along_axis(coarse, at, exact, axis)
    return coarse


def over_heads(code, x):
    """`code` of x [H, n, D] as one head of H D channels."""
    h, n, d = x.shape
    wide = np.moveaxis(x, 0, 1).reshape(1, n, h * d)
    return np.moveaxis(code(wide).reshape(n, h, d), 1, 0)


SPAN = 16


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("backbone", ["kivi", "kcvt"])
def test_gear_without_low_rank(backbone, across):
    """A prompt in blocks of SPAN, what is left of it and what comes in blocks of R."""

    def read(r, n):
        first = r.n // SPAN * SPAN
        cuts = [(i, i + SPAN) for i in range(0, first, SPAN)]
        m = first + (n - first) // R * R
        cuts += [(i, i + R) for i in range(first, m, R)]

        def value(x):
            code = lambda x: sparse_and_coarse(x, 2, 2, backbone)  # noqa: E731
            return over_heads(code, x) if across else code(x)

        k = [sparse_and_coarse(r.k[:, i:j], 2, 1, backbone) for i, j in cuts]
        v = [value(r.v[:, i:j]) for i, j in cuts]
        return np.concatenate([*k, r.k[:, m:n]], 1), np.concatenate([*v, r.v[:, m:n]], 1)

    follow(
        f"gear(rank=0, prompt_rank=0, outliers=0.02, backbone='{backbone}', group={GROUP}, "
        f"buffer={R}, span={SPAN}, across={across})",
        read,
    )


def power_iteration(e, rank, rounds=3):
    """Q Q' e by the rounds of the paper, from the start that ours draws."""
    p = np.random.default_rng(0).standard_normal((e.shape[1], rank)).astype(np.float32)
    for _ in range(rounds):
        q = e @ np.linalg.qr(p)[0]
        p = e.T @ q
    q = np.linalg.qr(q)[0]
    return q @ (q.T @ e)


@pytest.mark.parametrize("backbone", ["kivi", "kcvt"])
def test_gear_ranks_of_prompt_and_of_what_follows(backbone):
    """D + S + L of a prompt's block at rank 3 and of a later one at rank 1, keys and values."""
    method = gear(group=GROUP, buffer=R, span=SPAN, rank=1, prompt_rank=3, backbone=backbone)
    for codec, rank, size in (
        (method.stages[0].inner.codec, 3, SPAN), (method.stages[1].codec, 1, R)
    ):  # fmt: skip
        r = row(1, 0)
        for side, x, axis in ((codec.k, r.k, 1), (codec.v, r.v, 2)):
            x = x[:, :size]
            code = lambda x, axis=axis: sparse_and_coarse(x, 2, axis, backbone)  # noqa: E731
            rest = over_heads(code, x) if axis == 2 else code(x)
            want = rest + np.stack([power_iteration(e, rank) for e in x - rest])
            got = side.decode(side.encode(jnp.asarray(x[None], jnp.float32)))[0]
            np.testing.assert_allclose(got, want, atol=5e-3)  # factors in float16


def test_gear_low_rank_is_the_best_of_the_error():
    """With enough rounds L is as good as the truncated SVD of what D and S leave; with few, never
    worse than nothing."""
    x = row(0, 0).k[:, :R].astype(np.float32)
    rest = x - sparse_and_coarse(x.astype(np.float64), 2, 1, "kivi")
    u, s, vt = np.linalg.svd(rest)
    best = np.einsum("hti,hi,hid->htd", u[..., :2], s[:, :2], vt[:, :2])

    def left(**how):
        codec = gear(group=GROUP, buffer=R, **how).stages[-1].codec.k
        return x - np.asarray(codec.decode(codec.encode(jnp.asarray(x))))

    size, long = np.linalg.norm(rest), left(iterations=40)
    for h in range(H):  # directions of near singular values may mix: the error tells
        floor = np.linalg.norm(rest[h] - best[h])
        assert floor * (1 - 1e-3) <= np.linalg.norm(long[h]) <= floor * 1.01
    errors = [np.linalg.norm(left(rank=rank)) for rank in (0, 1, 2, 4, D)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 5e-3 * size
    assert np.linalg.norm(left(outliers=0.0, rank=0)) > errors[0]
