"""Laws of the single codecs: error bounds, projections, rotations, isolation of channels."""

import jax.numpy as jnp
import numpy as np
import pytest
from codec_zoo import decode, encode, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.codecs import (
    as_pair,
    codebook,
    compose,
    dense,
    gaussian_levels,
    low_rank,
    per_kv,
    projection,
    quantize,
    residual,
    rotate,
    walsh_hadamard,
    with_outliers,
)

HALF = 2.0**-11  # relative rounding of float16
TINY = 2.0**-25  # half of the smallest float16


def through(codec, x, valid=None):
    return np.asarray(decode(codec, encode(codec, x, valid)), np.float64)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    axis=st.sampled_from(["token", "channel"]),
    magnitude=st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 10.0]),
    seed=st.integers(0, 999),
)
def test_affine_error_is_at_most_half_a_step(bits, axis, magnitude, shift, seed):
    """And what float16 loses of the minimum and of the step, which clip at the ends."""
    x = magnitude * (np.random.default_rng(seed).standard_normal((1, 32, 16)) + shift)
    x = x.astype(np.float32)
    y = through(quantize(bits, axis, 16), x)
    groups = x.reshape(1, 2, 16, 16) if axis == "channel" else x[..., None, :]
    low, high = (
        groups.min(-2 if axis == "channel" else -1),
        groups.max(-2 if axis == "channel" else -1),
    )
    low, high = (np.expand_dims(a, -2 if axis == "channel" else -1) for a in (low, high))
    step = (high - low) / (2**bits - 1)
    bound = step / 2 + HALF * (np.abs(low) + high - low) + 2**bits * TINY
    # Below float16's smallest step a group has no range and reads back as its minimum.
    bound = np.where(step < 2.0**-24, high - low + HALF * np.abs(low) + TINY, bound)
    error = np.abs(x - y).reshape(groups.shape)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_symmetric_error_and_exact_zero(bits):
    x = np.asarray(sample()).copy()
    x[..., ::5] = 0.0
    y = through(quantize(bits, group=8, symmetric=True), x)
    top = np.abs(x).reshape(2, 64, 4, 8).max(-1, keepdims=True)
    step = top / (2 ** (bits - 1) - 1)
    assert (np.abs(x - y).reshape(2, 64, 4, 8) <= step / 2 + HALF * top).all()
    assert not y[..., ::5].any()


def test_constant_groups_read_back_exactly():
    x = np.full((1, 32, 8), 3.140625, np.float32)  # a float16
    for codec in (quantize(2), quantize(3, "channel", 16), quantize(8)):
        np.testing.assert_array_equal(through(codec, x), x)


def test_equally_spaced_values_read_back_exactly():
    x = np.random.default_rng(0).integers(0, 4, (1, 32, 16)).astype(np.float32) - 1.5
    x[:, ::16], x[:, 1::16] = -1.5, 1.5
    np.testing.assert_array_equal(through(quantize(2, "channel", 16), x), x)


def test_values_beyond_float16_saturate_or_take_another_scale_dtype():
    x = np.linspace(-1e6, 1e6, 16, dtype=np.float32)[None, None]
    assert np.isfinite(through(quantize(4), x)).all()
    y = through(quantize(4, scale_dtype="float32"), x)
    np.testing.assert_allclose(y, x, rtol=1e-6, atol=0.1)


def test_scaling_one_key_channel_leaves_the_others():
    x = np.asarray(sample())
    big = x * np.where(np.arange(32) == 5, 1000, 1).astype(np.float32)
    y, z = (through(quantize(2, "channel", 32), v) for v in (x, big))
    np.testing.assert_array_equal(np.delete(y, 5, -1), np.delete(z, 5, -1))
    y, z = (through(quantize(2), v) for v in (x, big))
    assert (np.delete(y, 5, -1) != np.delete(z, 5, -1)).mean() > 0.5


@pytest.mark.parametrize(("width", "seed"), [(32, 3), (256, 0), (48, 1), (64, "hadamard")])
def test_rotation_is_orthogonal(width, seed):
    r = rotate(seed)
    matrix = np.asarray(encode(r, jnp.eye(width)), np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=2e-6)
    x = np.asarray(sample(width=width))
    np.testing.assert_allclose(through(r, x), x, atol=1e-5 * np.abs(x).max())


def test_walsh_hadamard_is_the_kronecker_power():
    h = np.ones((1, 1))
    for _ in range(8):
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    np.testing.assert_allclose(walsh_hadamard(jnp.eye(256)), h / 16, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), magnitude=st.sampled_from([1e-7, 1.0, 1e3]))
def test_low_rank_never_adds_error(seed, magnitude):
    x = magnitude * np.asarray(sample(seed))
    exact = np.linalg.norm(x)
    ranks = [np.linalg.norm(x - through(low_rank(r, 32), x)) for r in (1, 4)]
    assert ranks[0] <= exact * (1 + 1e-6) and ranks[1] <= exact * (1 + 1e-6)
    backbone = quantize(2, "channel", 32)
    with_low_rank = through(residual(backbone, low_rank(4, 32)), x)
    error = np.linalg.norm(x - through(backbone, x))
    assert np.linalg.norm(x - with_low_rank) <= error * (1 + 1e-6)


def test_low_rank_nears_the_truncated_svd():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 32)) * np.exp(-0.3 * np.arange(32))
    x = (x @ np.linalg.qr(rng.standard_normal((32, 32)))[0]).astype(np.float32)
    best = np.sqrt((np.linalg.svd(x)[1][4:] ** 2).sum())
    errors = [
        np.linalg.norm(x - through(low_rank(4, iterations=i, dtype="float32"), x))
        for i in (1, 2, 12)
    ]
    assert best * (1 - 1e-5) <= errors[2] <= errors[1] * 1.001 <= errors[0] * 1.002
    assert errors[2] <= 1.01 * best


def test_full_rank_is_exact():
    x = np.asarray(sample())
    y = through(residual(quantize(2), low_rank(32, 64, dtype="float32")), x)
    np.testing.assert_allclose(y, x, atol=2e-5)


def test_every_entry_an_outlier_is_exact():
    x = np.asarray(sample())
    y = through(with_outliers(quantize(2), 1.0, dtype="float32"), x)
    np.testing.assert_array_equal(y, x)
    assert with_outliers(quantize(2), 0.0) == quantize(2)


@pytest.mark.parametrize(("bits", "mse"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_levels_reach_the_lloyd_max_distortion(bits, mse):
    levels = np.array(gaussian_levels(bits))
    grid = np.linspace(-8, 8, 400_001)
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, grid)]
    assert np.sum((grid - nearest) ** 2 * density) * (grid[1] - grid[0]) == pytest.approx(
        mse, rel=2e-3
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_a_rotated_codebook_is_within_the_turboquant_bounds(bits):
    """4^-b <= |x - x'|^2 / |x|^2 <= sqrt(3) pi / 2 4^-b for random, one-hot and heavy tails."""
    rng, n = np.random.default_rng(0), 60
    x = np.stack([rng.standard_normal((256, n)), np.eye(n)[rng.integers(0, n, 256)] * 7])
    x = np.concatenate([x, rng.standard_t(2, (1, 256, n))]).astype(np.float32)
    c = codebook(gaussian_levels(bits))
    y = through(compose(rotate(0), c), x)
    ratio = (np.square(x - y).sum(-1) / np.square(x).sum(-1)).mean(-1)
    assert (ratio >= 4.0**-bits).all()
    assert (ratio <= np.sqrt(3) * np.pi / 2 * 4.0**-bits).all()
    plain = np.square(x - through(c, x))[1].sum() / np.square(x[1]).sum()
    assert plain > ratio[1] * 3


def test_codebook_is_uniform_quantisation_on_uniform_levels():
    x = np.asarray(sample())
    levels = np.linspace(-3, 3, 16)
    rms = np.sqrt(np.square(x).mean(-1, keepdims=True)).astype(np.float16).astype(np.float32)
    expected = levels[np.abs((x / rms)[..., None] - levels).argmin(-1)] * rms
    np.testing.assert_allclose(through(codebook(tuple(levels)), x), expected, atol=1e-5)


def test_composition_is_a_monoid():
    a, b, c = rotate(0), projection(8), quantize(2)
    assert compose(a, compose(b, c)) == compose(compose(a, b), c) == compose(a, b, c)
    assert compose(dense(), a) == a == compose(a, dense()) and compose() == dense()
    assert residual(residual(c, c), c) == residual(c, c, c) and residual(c) == c


def test_pairs():
    pair = per_kv(k=quantize(2, "channel"), v=quantize(2))
    assert as_pair(pair) == pair and as_pair(pair.k) == per_kv(pair.k, pair.k)
    with pytest.raises(ValueError, match="v is 3: expected a codec"):
        per_kv(dense(), 3)
