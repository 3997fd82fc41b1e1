"""Pruning by magnitude: what stays, what it costs, and why no other mask is better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_zoo import decode, encode, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.codecs import quantize, sparse

SHARES = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)


def pruned(x, sparsity):
    """The published rule, one token at a time."""
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:-1]):
        m = max(1, int(sparsity * x.shape[-1]))
        threshold = np.partition(np.abs(x[at]), m - 1)[m - 1]
        out[at] = np.where(np.abs(x[at]) >= threshold, x[at], 0)
    return out


def read(codec, x):
    return np.asarray(decode(codec, encode(codec, jnp.asarray(x), None, None), x.dtype, None))


@pytest.mark.parametrize("width", [8, 32, 48, 64])
@pytest.mark.parametrize("sparsity", SHARES)
def test_it_is_the_published_rule_bit_for_bit(width, sparsity):
    x = np.asarray(sample(width=width))
    want = pruned(x, sparsity)
    np.testing.assert_array_equal(read(sparse(sparsity), x), want)
    count = sparse(sparsity).count(width)
    assert ((want != 0).sum(-1) == count).all()
    assert (count == width) == (sparsity == 0)


def test_layout():
    """Bit j of word i is channel 32 i + j; entries stand in order of channels."""
    x = np.asarray(sample(leading=(), tokens=5, width=64))
    code = encode(sparse(0.7), jnp.asarray(x), None, None)
    assert code["bitmap"].dtype == np.uint32 and code["bitmap"].shape == (5, 2)
    for t, row in enumerate(pruned(x, 0.7)):
        bits = [int(code["bitmap"][t, c // 32]) >> c % 32 & 1 for c in range(64)]
        np.testing.assert_array_equal(bits, row != 0)
        np.testing.assert_array_equal(code["values"][t], row[row != 0])


@pytest.mark.parametrize(("width", "word"), [(128, 4), (96, 4), (80, 2), (40, 1)])
def test_bytes_are_the_bitmap_and_the_entries(width, word):
    for dtype in (jnp.bfloat16, jnp.float32):
        code = sparse(0.5).code_spec((3,), 10, width, dtype)
        assert code["bitmap"].dtype.itemsize == word
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(code))
        kept = width - width // 2 + 1
        assert size == 30 * (width // 8 + kept * jnp.dtype(dtype).itemsize)


def test_sizes_of_the_paper():
    """Entries kept at 128 (64) channels, and, without its padding to 8, bytes below the paper's."""
    kept = {s: (sparse(s).count(128), sparse(s).count(64)) for s in (0.5, 0.7, 0.9)}
    assert kept == {0.5: (65, 33), 0.7: (40, 21), 0.9: (14, 8)}
    assert sparse(0.5).bits(128) / 16 < 0.656 and sparse(0.7).bits(128) / 16 < 0.463
    assert sparse(0.7, quantize(4)).bits(64) == 1 + (24 * 4 + 32) / 64


tokens = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).standard_t(3, (4, 32)).astype(np.float32)
)


@settings(deadline=None, max_examples=25)
@given(tokens, st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.6, 0.9]))
def test_laws(x, seed, sparsity):
    draw = np.random.default_rng(seed)
    codec, y = sparse(sparsity), read(sparse(sparsity), x)
    np.testing.assert_array_equal(read(codec, y), y)  # idempotent
    # Commutes with a positive factor per token (powers of two are exact) and with signs: so values
    # ranked by |v| are ranked by what they weigh after attention, |p v|.
    factor = 2.0 ** draw.integers(-9, 9, (4, 1)).astype(np.float32)
    factor = factor * draw.choice(np.float32([-1, 1]), (1, 32))
    np.testing.assert_array_equal(read(codec, x * factor), y * factor)
    # No other mask of that size has a smaller error.
    count = codec.count(32)
    other = np.argsort(draw.random((4, 32)), -1) < count
    assert (((x - y) ** 2).sum(-1) <= ((x * ~other) ** 2).sum(-1)).all()
    errors = [((x - read(sparse(s), x)) ** 2).sum() for s in (0.3, 0.6, 0.9)]
    assert errors == sorted(errors)


def test_of_equal_entries_the_first_stay():
    x = np.float32([[3, -3, 3, 3, -3, 3, 3, 3], [0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 2, 0, 0, 0, 0]])
    y = read(sparse(0.5), x)
    np.testing.assert_array_equal(y[0], [3, -3, 3, 3, -3, 0, 0, 0])
    np.testing.assert_array_equal(y[1:], x[1:])


def test_blocks_prune_whole_channels():
    x = np.asarray(sample(leading=(2,), tokens=32, width=32))
    got = read(sparse(0.5, block=8), x).reshape(2, 4, 8, 32)
    for at in np.ndindex(2, 4):
        rows = x.reshape(2, 4, 8, 32)[at]
        there = np.argsort(-(rows**2).sum(0), kind="stable")[: sparse(0.5).count(32)]
        want = np.zeros_like(rows)
        want[:, there] = rows[:, there]
        np.testing.assert_array_equal(got[at], want)
    # A mask for each token keeps more than any that tokens share.
    assert ((read(sparse(0.5), x) - x) ** 2).sum() < ((got.reshape(x.shape) - x) ** 2).sum()
