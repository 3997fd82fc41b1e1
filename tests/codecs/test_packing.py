"""Packing is exact at every width, in exactly b bits per code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.codecs import pack, quantum, unpack


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), axis=st.sampled_from([-2, -1]), seed=st.integers(0, 99))
def test_pack_is_exact_and_full(bits, axis, seed):
    shape = [2, 3, 2]
    shape[axis] = 2 * quantum(bits)
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape)
    packed = jax.jit(pack, static_argnums=(1, 2))(codes, bits, axis)
    assert packed.dtype == jnp.uint8
    assert packed.size * 8 == codes.size * bits
    unpacked = jax.jit(unpack, static_argnums=(1, 2))(packed, bits, axis)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes_are_parts_of_the_group(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, 32)
    parts = codes.reshape(8 // bits, -1)
    expected = sum(part << (bits * j) for j, part in enumerate(parts))
    np.testing.assert_array_equal(pack(jnp.asarray(codes), bits), expected)


def test_three_bits_are_a_two_bit_plane_then_a_one_bit_plane():
    codes = np.random.default_rng(1).integers(0, 8, 16)
    low, high = pack(jnp.asarray(codes & 3), 2), pack(jnp.asarray(codes >> 2), 1)
    np.testing.assert_array_equal(pack(jnp.asarray(codes), 3), np.concatenate([low, high]))


def test_lengths_that_do_not_fill_bytes_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(jnp.zeros(12, jnp.uint8), 3)
    with pytest.raises(ValueError, match="multiple of 3"):
        unpack(jnp.zeros(4, jnp.uint8), 3)
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        quantum(9)
