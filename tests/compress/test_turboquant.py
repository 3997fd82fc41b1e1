"""TurboQuant against the figures of its paper and against a Lloyd-Max iteration in NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import codebook, gaussian_levels
from kvjax.compress import turboquant
from tests.compress.reference import D
from tests.compress.test_reference_codes import follow

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # Max, 1960
BITS = pytest.mark.parametrize("bits", LLOYD_MAX)


@functools.partial(jax.jit, static_argnums=0)
def read(codec, x):
    return codec.decode(codec.encode(x))


def error(codec, x):
    """Mean squared error of vectors x [n, D] of norm 1."""
    return float(np.mean(np.sum((np.asarray(read(codec, x)) - x) ** 2, -1)))


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@BITS
def test_levels_are_those_of_a_lloyd_max_iteration(bits):
    """Centroids of a finely sampled Gaussian, alternated with midpoints until nothing moves."""
    x = np.linspace(-6.0, 6.0, 2_000_001)
    weight = np.exp(-(x**2) / 2)
    sums = [np.concatenate([[0.0], np.cumsum(w)]) for w in (weight, weight * x, weight * x**2)]
    levels = np.sort(np.random.default_rng(bits).standard_normal(2**bits))
    for _ in range(3000):
        edge = np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        mass, first, second = (np.diff(s[np.concatenate([[0], edge, [len(x)]])]) for s in sums)
        levels = first / mass
    np.testing.assert_allclose(gaussian_levels(bits), levels, atol=1e-3)
    loss = (second - first**2 / mass).sum() / mass.sum()
    assert abs(loss / LLOYD_MAX[bits] - 1) < 2e-3


@BITS
def test_gaussian_data_has_the_distortion_of_lloyd_max(bits):
    """Of vectors so long that their root mean square is that of the law."""
    x = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
    found = np.asarray(read(codebook(gaussian_levels(bits)), x))
    assert abs(np.sum((found - x) ** 2) / np.sum(x**2) / LLOYD_MAX[bits] - 1) < 0.02


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from(sorted(LLOYD_MAX)),
    kind=st.sampled_from(["gaussian", "one-hot", "heavy"]),
)
def test_distortion_lies_between_the_two_bounds(seed, bits, kind):
    draw = np.random.default_rng(seed)
    x = {
        "gaussian": draw.standard_normal((512, 64)),
        "one-hot": np.eye(64)[draw.integers(0, 64, 512)],
        "heavy": draw.standard_t(1.5, (512, 64)),
    }[kind]
    found = error(turboquant(bits).stages[0].codec.k, unit(x))
    assert found < np.sqrt(3) * np.pi / 2 * 4.0**-bits
    assert found > 4.0**-bits


@BITS
def test_without_the_rotation_one_hot_vectors_break_the_upper_bound(bits):
    x = np.eye(64, dtype=np.float32)
    plain = error(codebook(gaussian_levels(bits)), x)
    assert (
        plain > np.sqrt(3) * np.pi / 2 * 4.0**-bits > error(turboquant(bits).stages[0].codec.k, x)
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_what_a_query_reads(bits):
    """A random rotation, nearest level, one norm in float16: written out again."""
    q, r = np.linalg.qr(np.random.default_rng(3).standard_normal((D, D)))
    turn = q * np.sign(np.diag(r))
    levels = np.asarray(gaussian_levels(bits))

    def coded(x):
        y = x @ turn
        scale = np.float16(np.sqrt(np.mean(y**2, -1, keepdims=True))).astype(np.float64)
        code = np.abs(y[..., None] / scale[..., None] - levels).argmin(-1)
        return levels[code] * scale @ turn.T

    follow(
        f"turboquant(bits={bits}, seed=3)",
        lambda r, n: (coded(r.k[:, :n]), coded(r.v[:, :n])),
    )


def test_a_zero_vector_reads_as_zero():
    assert not np.asarray(read(turboquant(2).stages[0].codec.k, jnp.zeros((3, 64)))).any()


def test_settings_that_make_no_sense_are_refused():
    for bad in (0, 9, 2.5):
        with pytest.raises(ValueError, match=r"turboquant.*bits"):
            turboquant(bits=bad)
