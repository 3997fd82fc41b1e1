"""VidKV against NumPy, and on a stream that repeats as the frames of a video do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codecs import compose, fourier, quantize, signs, ternary
from kvjax.codecs.coarse import pack_trits, unpack_trits
from kvjax.compress import vidkv
from kvjax.compress.vidkv import mixed, salience
from tests.compress.reference import LENGTHS, STEPS, B, D, H, L, T, per_channel
from tests.compress.test_reference_codes import follow

G = 8
half = lambda x: np.float64(np.float16(x))  # noqa: E731


def spectrum(x):
    """Orthonormal real Fourier coefficients of the last axis, from the complex ones."""
    n = x.shape[-1]
    f = np.fft.rfft(x, norm="ortho")
    out = [f[..., 0].real]
    for i in range(1, (n + 1) // 2):
        out += [np.sqrt(2) * f[..., i].real, -np.sqrt(2) * f[..., i].imag]
    return np.stack(out + ([f[..., n // 2].real] if n % 2 == 0 else []), -1)


def back(y):
    n = y.shape[-1]
    f = np.zeros((*y.shape[:-1], n // 2 + 1), complex)
    f[..., 0] = y[..., 0]
    for i in range(1, (n + 1) // 2):
        f[..., i] = (y[..., 2 * i - 1] - 1j * y[..., 2 * i]) / np.sqrt(2)
    if n % 2 == 0:
        f[..., -1] = y[..., -1]
    return np.fft.irfft(f, n, norm="ortho")


def keys(x, share):
    """x [H, G, D], one block: the widest channels at 2 bits, signs of the spectrum of the rest."""
    out = np.empty_like(x)
    for h, head in enumerate(x):
        extent = head.max(0) - head.min(0)
        order = np.argsort(-extent, kind="stable")
        wide, plain = sorted(order[: int(share * D)]), sorted(order[int(share * D) :])
        out[h][:, wide] = per_channel(head[None][:, :, wide], 2, G)[0]
        f = spectrum(head[:, plain])
        out[h][:, plain] = back(np.where(f >= 0, 1, -1) * half(np.abs(f).mean(0)))
    return out


def trits(x, threshold=0.7):
    size = np.abs(x)
    large = size > threshold * size.mean(1, keepdims=True)
    scale = (size * large).sum(1, keepdims=True) / large.sum(1, keepdims=True)
    return np.sign(x) * large * half(scale)


def blocks(x, m, code):
    return [code(x[:, i : i + G]) for i in range(0, m, G)] + [x[:, m:]]


def test_what_a_query_reads():
    def read(r, n):
        m = n // G * G
        k = np.concatenate(blocks(r.k[:, :n], m, lambda x: keys(x, 0.5)), 1)
        return k, np.concatenate(blocks(r.v[:, :n], m, trits), 1)

    follow(f"vidkv(group={G}, residual={G})", read)


@pytest.mark.parametrize("part", [0.334, 1.0])
def test_salient_tokens_have_values_at_two_bits(part):
    """The best part of the prompt, whole blocks of it; tokens worth -inf (text) never."""
    worth = np.random.default_rng(2).standard_normal((1, B, T + STEPS))
    worth[:, :, 1::4] = -np.inf

    def read(r, n):
        w = np.where(np.arange(n) < r.n, worth[0, r.batch, :n], -np.inf)
        able = int((w > -np.inf).sum())
        best = np.argsort(-w, kind="stable")[: min(int(part * T), able) // G * G]
        best = np.sort(best)
        rest = np.setdiff1d(np.arange(n), best)
        k, v = [], []
        for at, code in ((best, lambda x: per_channel(x, 2, G)), (rest, trits)):
            m = len(at) // G * G
            k += blocks(r.k[:, at], m, lambda x: keys(x, 0.5))
            v += blocks(r.v[:, at], m, code)
        return np.concatenate(k, 1), np.concatenate(v, 1)  # order means nothing to attention

    text = f"vidkv(group={G}, residual={G}, protect={part})"
    assert min(LENGTHS) // 2 >= G
    follow(text, read, extra={"salience": np.repeat(worth, L, 0)})


def test_two_bits_are_plain_groups_per_channel():
    codec = vidkv(key_bits=2, value_bits=2).stages[0].codec
    assert codec.k == codec.v == quantize(2, "channel", 32)


@pytest.mark.parametrize("n", [5, 8, 33])
def test_fourier_is_that_of_numpy(n):
    x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
    y = np.asarray(fourier().forward(x))
    np.testing.assert_allclose(y, spectrum(x), atol=1e-5)
    np.testing.assert_allclose(fourier().inverse(y), x, atol=1e-5)
    np.testing.assert_allclose(back(spectrum(x)), x, atol=1e-6)


def test_digits_are_packed_five_to_a_byte():
    x = np.random.default_rng(0).integers(0, 3, (2, 8, 9))
    packed = pack_trits(jnp.asarray(x))
    assert packed.shape == (2, 15) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack_trits(packed, (8, 9)), x)


@functools.partial(jax.jit, static_argnums=0)
def through(codec, x):
    return codec.decode(codec.encode(x))


def left(codec, x):
    return float(np.sum((np.asarray(through(codec, x)) - x) ** 2) / np.sum(x**2))


def test_errors_on_a_gaussian():
    """The card's figures: 0.36 for signs, 0.19 for ternary digits at a threshold of 0.7."""
    x = np.random.default_rng(0).standard_normal((4096, 16)).astype(np.float32)
    assert abs(left(signs(512), x) - 0.363) < 0.01
    assert abs(left(ternary(512), x) - 0.19) < 0.01
    np.testing.assert_allclose(through(ternary(32), -x), -np.asarray(through(ternary(32), x)))
    f, s = spectrum(x), np.asarray(through(compose(fourier(), signs(32)), x))
    assert ((spectrum(s) >= 0) == (f >= 0)).mean() > 0.999


def test_split_by_range_beats_signs_for_all_and_ignores_offsets():
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    x[:, :4] *= 20
    codec = mixed(1.25, 32, True)
    assert left(codec, x) < 0.5 * left(signs(32), x)
    mask = lambda x: np.asarray(codec.encode(jnp.asarray(x))["mask"])  # noqa: E731
    np.testing.assert_array_equal(mask(x), mask(x + np.arange(16, dtype=np.float32) * 8))


def video(seed, frames=16, places=32, width=64):
    """Each place of a frame is a fixed pattern and a little noise; a few channels are wide."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((places, width)) + 0.15 * draw.standard_normal((frames, places, width))
    return np.float32(x.reshape(frames * places, width))


def test_values_per_channel_suit_frames_when_tokens_of_a_place_are_together():
    """Grouped along time, numbers of a group repeat: per channel is right; along a frame it is
    not. The paper's claim holds for the former order only."""
    x = video(0)
    by_place = x.reshape(16, 32, 64).swapaxes(0, 1).reshape(512, 64)
    channel, token = quantize(2, "channel", 16), quantize(2, "token", 16)
    assert left(channel, by_place) < 0.2 * left(token, by_place)
    assert left(channel, x) > 0.5 * left(token, x)


def test_salience_is_the_mean_product_with_text():
    draw = np.random.default_rng(0)
    x, visual = draw.standard_normal((H, 9, 4)).astype(np.float32), draw.random((H, 9)) < 0.5
    found = np.asarray(salience(jnp.asarray(x), jnp.asarray(visual)))
    for b in range(H):
        want = (x[b][visual[b]] @ x[b][~visual[b]].T).mean(1)
        np.testing.assert_allclose(found[b][visual[b]], want, atol=1e-5)
        assert np.isneginf(found[b][~visual[b]]).all()


def test_what_makes_no_sense_is_refused():
    for bad in ({"key_bits": 3}, {"value_bits": 1}, {"group": 48}, {"protect": 2}, {"residual": 0},
                {"value_axis": "head"}, {"value_axis": "token"}):  # fmt: skip
        with pytest.raises(ValueError, match="vidkv"):
            vidkv(**bad)
