"""What papers say of their codes, on keys like theirs: a few channels are large in every token."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import balance, compose, quantize, rotate_heads
from kvjax.compress import parse

H, T, D = 4, 96, 64
LARGE = ((0, 5), (1, 17), (3, 40))  # head, channel


def keys(seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((1, H, T, D)).astype(np.float32)
    for head, channel in LARGE:
        x[:, head, :, channel] = 15 + 3 * x[:, head, :, channel]
    return x


def peak(x) -> float:
    """The largest magnitude in units of the root mean square, mean over tokens of all heads."""
    x = np.moveaxis(np.asarray(x), 1, 2).reshape(T, H * D)
    return float(np.mean(np.abs(x).max(1) / np.sqrt(np.mean(x**2, 1))))


@pytest.mark.parametrize("seed", range(3))
def test_rotating_heads_together_spreads_large_channels(seed):
    """RotateKV."""
    x = keys(seed)
    assert peak(rotate_heads(H).encode(jnp.asarray(x))) < 0.6 * peak(x)


@pytest.mark.parametrize("seed", range(3))
def test_errors_of_logits_fall_with_bits(seed):
    """MiKV's codec of tokens that are not important; the balancer helps at every width where
    queries ask little of the channels in which keys are large."""
    x, q = keys(seed), np.random.default_rng(seed + 9).standard_normal((1, H, 8, D))
    for head, channel in LARGE:
        q[:, head, :, channel] /= 10
    scale = np.sqrt(np.abs(q).max(2) * np.abs(x).max(2)) / np.abs(x).max(2)
    given = {"balance": jnp.asarray(scale, jnp.float32)}

    def error(codec, given) -> float:
        y = codec.decode(codec.encode(jnp.asarray(x), None, None, given), jnp.float32, given)
        return float(np.mean((q @ np.swapaxes(np.asarray(y) - x, -1, -2)) ** 2))

    plain = [error(quantize(b), {}) for b in (2, 3, 4, 8)]
    balanced = [error(compose(balance(), quantize(b)), given) for b in (2, 3, 4, 8)]
    assert plain == sorted(plain, reverse=True) and balanced == sorted(balanced, reverse=True)
    assert all(b < p for b, p in zip(balanced, plain)), (balanced, plain)


def test_a_half_more_bits_for_keys_are_half_a_bit_more():
    """VidKV: 2 bits for a share of the channels and 1 for the others."""
    codecs = [parse(f"vidkv(key_bits={b})")[0][1].stages[-1].codec.k for b in (1.25, 1.5, 1.75)]
    bits = [codec.bits(D) for codec in codecs]
    # Per group of 32 tokens a 2-bit channel has a minimum and a scale of 16 bits, a pair of others
    # one; and a byte says which a channel is.
    nominal = [b + 32 / 32 for b in (1.25, 1.5, 1.75)]
    assert all(0 <= n - b < 0.6 for b, n in zip(bits, nominal)), bits
    steps = np.diff(bits)
    assert np.all((steps > 0.25) & (steps < 0.5)), bits


def test_codes_per_channel_know_nothing_of_other_channels():
    x = keys(0)
    codec = quantize(2, "channel", 32)
    other = x.copy()
    other[..., :3] *= 100
    a, b = (codec.encode(jnp.asarray(v)) for v in (x, other))
    a, b = (np.asarray(codec.decode(c, jnp.float32)) for c in (a, b))
    np.testing.assert_array_equal(a[..., 3:], b[..., 3:])
    assert not np.array_equal(a[..., :3], b[..., :3])
