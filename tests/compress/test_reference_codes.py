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


def test_rtn():
    def read(r, n):
        return per_token(r.k[:, :n], 4, GROUP), per_token(r.v[:, :n], 4, GROUP)

    follow(f"rtn(bits=4, group={GROUP})", read)


def sparse_and_coarse(x, bits, axis, backbone):
    """D + S of one block x [H, n, D]: one outlier per side and vector, its mean in their place."""
    low, high = x.argmin(axis, keepdims=True), x.argmax(axis, keepdims=True)
    rest = x.copy()
    mean = x.mean(axis, keepdims=True)
    for at in (low, high):
        np.put_along_axis(rest, at, mean, axis)
    if backbone == "kivi":
        coarse = per_channel(rest, bits, GROUP) if axis == 1 else per_token(rest, bits, GROUP)
    else:
        coarse = affine(rest, bits, axis)
    for at in (low, high):
        exact = np.take_along_axis(x, at, axis).astype(np.float16)
        np.put_along_axis(coarse, at, exact, axis)
    return coarse


@pytest.mark.parametrize("backbone", ["kivi", "kcvt"])
def test_gear_without_low_rank(backbone):
    def read(r, n):
        m = n // R * R

        def blocks(x, axis):
            cut = [x[:, i : i + R] for i in range(0, m, R)]
            return join(
                np.concatenate([sparse_and_coarse(c, 2, axis, backbone) for c in cut], 1), x[:, m:n]
            )

        return blocks(r.k, 1), blocks(r.v, 2)

    follow(f"gear(rank=0, outliers=0.02, backbone='{backbone}', group={GROUP}, buffer={R})", read)


def test_gear_low_rank_is_the_best_of_the_error():
    """With enough rounds L is as good as the truncated SVD of what D and S leave; with few, never
    worse than nothing."""
    x = row(0, 0).k[:, :R].astype(np.float32)
    rest = x - sparse_and_coarse(x.astype(np.float64), 2, 1, "kivi")
    u, s, vt = np.linalg.svd(rest)
    best = np.einsum("hti,hi,hid->htd", u[..., :2], s[:, :2], vt[:, :2])

    def left(**how):
        codec = gear(group=GROUP, buffer=R, **how).stages[0].codec.k
        return x - np.asarray(codec.decode(codec.encode(jnp.asarray(x))))

    size = np.linalg.norm(rest)
    for h in range(H):  # directions of near singular values may mix: the error tells
        floor = np.linalg.norm(rest[h] - best[h])
        assert floor * (1 - 1e-3) <= np.linalg.norm(left(iterations=40)[h]) <= floor * 1.01
    errors = [np.linalg.norm(left(rank=rank)) for rank in (0, 1, 2, 4, D)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 5e-3 * size
    assert np.linalg.norm(left(outliers=0.0, rank=0)) > errors[0]
