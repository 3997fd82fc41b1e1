"""The codecs against plain NumPy statements of the published methods, loop by loop."""

import numpy as np
import pytest
from codec_zoo import decode, encode, sample

from kvjax.codecs import low_rank, outliers, quantize, residual, unpack, with_outliers


def kivi_group(x, bits):
    """One group: codes, scale and minimum, in float32."""
    levels = np.float32(2**bits - 1)
    low, high = x.min(), x.max()
    scale = (high - low) / levels
    codes = np.round(np.clip((x - low) / (scale if scale else 1), 0, levels))
    return codes, scale, low


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(bits):
    """Codes, layout, scales and values; scales float32, since float16 may move a tie."""
    b, h, t, d, g = 2, 3, 64, 32, 16
    x = np.asarray(sample(leading=(b, h)))
    key = quantize(bits, "channel", g, scale_dtype="float32")
    value = quantize(bits, "token", g, scale_dtype="float32")
    codes = np.zeros((2, b, h, t, d))
    scale_k, low_k = np.zeros((2, b, h, t // g, d), np.float32)
    scale_v, low_v = np.zeros((2, b, h, t, d // g), np.float32)
    for i, j in np.ndindex(b, h):
        for n, c in np.ndindex(t // g, d):
            rows = slice(n * g, n * g + g)
            codes[0, i, j, rows, c], scale_k[i, j, n, c], low_k[i, j, n, c] = kivi_group(
                x[i, j, rows, c], bits
            )
        for n, c in np.ndindex(t, d // g):
            columns = slice(c * g, c * g + g)
            codes[1, i, j, n, columns], scale_v[i, j, n, c], low_v[i, j, n, c] = kivi_group(
                x[i, j, n, columns], bits
            )
    k, v = encode(key, x), encode(value, x)
    np.testing.assert_allclose(k["scale"], scale_k, rtol=1e-6)
    np.testing.assert_allclose(v["scale"], scale_v, rtol=1e-6)
    np.testing.assert_array_equal(k["min"], low_k)
    np.testing.assert_array_equal(v["min"], low_v)
    unpacked = np.asarray(unpack(k["codes"], bits, -2)).reshape(b, h, t, d)
    packed_v = np.asarray(v["codes"]).reshape(b, h, t, d // g, -1)
    unpacked_v = np.asarray(unpack(packed_v, bits)).reshape(b, h, t, d)
    assert (unpacked != codes[0]).mean() < 1e-4 and np.abs(unpacked - codes[0]).max() <= 1
    assert (unpacked_v != codes[1]).mean() < 1e-4 and np.abs(unpacked_v - codes[1]).max() <= 1
    expected = unpacked * np.repeat(scale_k, g, 2) + np.repeat(low_k, g, 2)
    np.testing.assert_allclose(decode(key, k), expected, rtol=1e-5, atol=1e-5)
    expected = unpacked_v * np.repeat(scale_v, g, 3) + np.repeat(low_v, g, 3)
    np.testing.assert_allclose(decode(value, v), expected, rtol=1e-5, atol=1e-5)


def gear(x, bits, fraction, rank, iterations, start, kind, group):
    """D + S + L of one block of one head, x [T, D], in float64."""
    x = x.astype(np.float64)
    work = x if kind == "value" else x.T  # rows are vectors
    filled, kept = work.copy(), np.zeros(work.shape, bool)
    k = max(1, round(work.shape[1] * fraction / 2))
    for row in range(len(work)):
        order = np.argsort(work[row], kind="stable")
        chosen = np.concatenate([order[:k], order[-k:]])
        kept[row, chosen] = True
        filled[row, chosen] = work[row].mean()
    coded = np.zeros_like(work)
    for row in range(len(work)):
        for at in range(0, work.shape[1], group):
            codes, scale, low = kivi_group(filled[row, at : at + group], bits)
            coded[row, at : at + group] = codes * scale + low
    coded[kept] = work[kept]
    coded = coded if kind == "value" else coded.T
    error, p = x - coded, start
    for loop in range(iterations):
        last = loop == iterations - 1
        p = np.linalg.qr(p)[0] if last else p
        q = error @ p
        q = np.linalg.qr(q)[0] if last else q
        p = error.T @ q
    return coded, coded + q @ p.T, q, kept if kind == "value" else kept.T


@pytest.mark.parametrize("kind", ["key", "value"])
def test_gear(kind):
    axis, rank, bits, fraction = ("channel" if kind == "key" else "token"), 3, 2, 0.1
    x = np.asarray(sample(seed=4, leading=(), tokens=64))
    backbone = with_outliers(
        quantize(bits, axis, 32, scale_dtype="float32"), fraction, block=64, dtype="float32"
    )
    codec = residual(backbone, low_rank(rank, 64, iterations=3, dtype="float32"))
    # The start that the codec draws, which the method leaves open.
    start = np.random.default_rng(0).standard_normal((32, rank)).astype(np.float32)
    coded, expected, q, kept = gear(x, bits, fraction, rank, 3, start, kind, 32)
    code = encode(codec, x)
    got = np.asarray(decode(backbone, encode(backbone, x)))
    np.testing.assert_allclose(got, coded, atol=1e-5)
    np.testing.assert_array_equal(got[kept], x[kept])
    y = np.asarray(decode(codec, code))
    # Three rounds magnify float32 rounding by the ratio of singular values, to the third power.
    np.testing.assert_allclose(y, expected, atol=1e-3)
    assert np.linalg.norm(x - y) < np.linalg.norm(x - got)
    stored = np.asarray(code[1]["q"])[0]
    np.testing.assert_allclose(stored.T @ stored, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(np.abs(np.diag(stored.T @ q)), 1, atol=1e-3)


@pytest.mark.parametrize(("axis", "block"), [("token", 64), ("channel", 16)])
def test_outliers_are_the_extremes_of_valid_tokens(axis, block):
    x = np.asarray(sample(leading=()))
    valid = np.random.default_rng(0).random(64) < 0.5
    codec = outliers(0.2, axis, block, width=32, dtype="float32")
    poisoned = np.where(valid[:, None], x, np.nan)
    y = np.asarray(decode(codec, encode(codec, poisoned, valid)))
    vectors = x if axis == "token" else x.reshape(-1, block, 32).swapaxes(1, 2).reshape(-1, block)
    groups = y if axis == "token" else y.reshape(-1, block, 32).swapaxes(1, 2).reshape(-1, block)
    mask = np.broadcast_to(valid[:, None], x.shape)
    if axis == "channel":
        mask = mask.reshape(-1, block, 32).swapaxes(1, 2).reshape(-1, block)
    k = round(vectors.shape[1] * 0.1)
    for vector, got, inside in zip(vectors, groups, mask):
        expected = np.zeros_like(vector)
        at = np.flatnonzero(inside)
        order = at[np.argsort(vector[at])]
        chosen = order if len(order) < 2 * k else np.r_[order[:k], order[-k:]]
        expected[chosen] = vector[chosen]
        np.testing.assert_array_equal(got, expected)
