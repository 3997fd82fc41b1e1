"""RotateKV against NumPy, and its calibration."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import init_cache
from kvjax.calibrate import CALIBRATIONS
from kvjax.codecs import hadamard, permute_heads, rotate_heads
from kvjax.codecs.heads import together
from kvjax.compress import rotatekv
from kvjax.models import forward
from tests.compress import reference as ref
from tests.compress.harness import CONFIG, model
from tests.compress.reference import STEPS, B, D, H, L, T, turn
from tests.compress.test_reference_codes import follow

SINKS = 5
RNG = np.random.default_rng(11)
ORDER = np.stack([RNG.permutation(H * D) for _ in range(L)])
PEAK = RNG.uniform(1, 9, (L, B, T + STEPS))
CONSTANTS = {"rotatekv_order": jnp.asarray(ORDER.reshape(L, 1, H, D), jnp.int32)}


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(n)


def clipped(x, bits, clip):
    """Groups along the last axis, ranges shrunk about their centres."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    cut = (1 - clip) / 2 * (high - low)
    low, high = low + cut, high - cut
    s = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    m = low.astype(np.float16).astype(np.float64)
    return np.round(np.clip((x - m) / s, 0, 2**bits - 1)) * s + m


def read(bits, clip, reorder=True):
    def one(r, n):
        raw = np.moveaxis(r.plain[:, :n], 0, 1).reshape(n, H * D)
        y = raw @ sylvester(H * D)  # 2 heads of 8: rotated together
        order = ORDER[r.layer] if reorder else np.arange(H * D)
        y = clipped(y[:, order].reshape(n, H, D), bits, clip).reshape(n, H * D)
        back = np.empty_like(y)
        back[:, order] = y
        k = np.moveaxis((back @ sylvester(H * D)).reshape(n, H, D), 1, 0)
        k = turn(k, np.arange(n))
        v = clipped(r.v[:, :n] @ sylvester(D), bits, clip) @ sylvester(D)
        kept = np.argsort(-PEAK[r.layer, r.batch, : r.n], kind="stable")[:SINKS]
        k[:, kept], v[:, kept] = r.k[:, kept], r.v[:, kept]
        return k, v

    return one


@pytest.mark.parametrize(
    ("text", "bits", "clip", "reorder"),
    [
        (f"rotatekv(sinks={SINKS})", 2, 0.8, True),
        (f"rotatekv(bits=4, sinks={SINKS})", 4, 1.0, True),
        (f"rotatekv(bits=3, reorder=False, sinks={SINKS})", 3, 1.0, False),
    ],
)
def test_what_a_query_reads(text, bits, clip, reorder):
    follow(text, read(bits, clip, reorder), CONSTANTS, {"input_peak": PEAK})


def test_marks_are_the_largest_input_of_each_layer():
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9))
    pos = np.tile(np.arange(9), (2, 1))
    cache = init_cache(CONFIG, rotatekv(reorder=False), 2, 16, prompt=9)
    _, new = forward(model(), tokens, pos, cache, phase="prefill", hidden=(0, 1))
    for layer in range(CONFIG.layers):
        want = np.abs(new.hidden[layer]).max(-1)
        np.testing.assert_array_equal(new.kv.extra["input_peak"][layer, :, 0], want)
    with pytest.raises(ValueError, match=r"marks|columns .*input_peak"):
        from kvjax.cache import commit

        _, bare = forward(model(), tokens, pos, phase="prefill")
        commit(cache, bare, phase="prefill")


def test_order_is_by_the_mean_of_rotated_keys():
    batches = [np.random.default_rng(i).integers(0, 50, (2, 8)) for i in range(3)]
    found = CALIBRATIONS["rotatekv"]()(model(), batches)
    total = 0.0
    for tokens in batches:
        _, new = forward(model(), tokens, np.tile(np.arange(8), (2, 1)), phase="prefill")
        k = np.moveaxis(np.asarray(new.kv.k, np.float64), 2, 3)
        total = total + (k.reshape(*k.shape[:3], -1) @ sylvester(16)).sum((1, 2))
    order = np.asarray(found["rotatekv_order"]).reshape(CONFIG.layers, -1)
    for layer, mean in zip(order, total):
        assert sorted(layer) == list(range(16)) and (np.diff(mean[layer]) >= -1e-4).all()


@pytest.mark.parametrize("n", [12, 20, 64, 192, 320])
def test_hadamard(n):
    h = hadamard(n)
    np.testing.assert_allclose(h @ h.T, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(np.abs(h), 1 / np.sqrt(n), rtol=1e-6)


def test_heads_are_rotated_together_and_back():
    """Three heads of 64: 192 channels, whose Hadamard matrix is not symmetric."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 64)), jnp.float32)
    turned = rotate_heads(4).forward(x)
    np.testing.assert_allclose(rotate_heads(4).inverse(turned), x, atol=1e-5)
    joined = np.moveaxis(np.asarray(x), 1, 2).reshape(2, 5, 192) @ hadamard(192)
    np.testing.assert_allclose(
        np.moveaxis(np.asarray(turned), 1, 2).reshape(2, 5, 192), joined, atol=1e-4
    )
    assert together(3, 64, 2) == 1 and together(8, 64, 4) == 4


def test_permutation_crosses_heads_and_layers_differ():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((L, B, H, 3, D)), jnp.float32)
    p, given = permute_heads("rotatekv_order"), CONSTANTS
    y = np.asarray(p.forward(x, given))
    flat = np.moveaxis(np.asarray(x), 2, 3).reshape(L, B, 3, -1)
    for layer in range(L):
        want = flat[layer][..., ORDER[layer]]
        np.testing.assert_array_equal(np.moveaxis(y[layer], 1, 2).reshape(B, 3, -1), want)
    np.testing.assert_array_equal(p.inverse(y, given), x)


def test_layers_left_exact_do_not_shift_the_constants():
    """With layer 0 exact, the constants of layer 1 serve layer 1."""
    cache = init_cache(
        ref.CONFIG, rotatekv(sinks=0), B, T + STEPS, T, exact_layers=(0,), constants=CONSTANTS
    )
    np.testing.assert_array_equal(
        cache.constants["rotatekv_order"], CONSTANTS["rotatekv_order"][1:]
    )


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"rotatekv_order.*calibrate"):
        init_cache(CONFIG, rotatekv(), 1, 16, prompt=8)
    for bad in ({"heads": 0}, {"sinks": -1}, {"bits": 9}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=r"rotatekv|clip is"):
            rotatekv(**bad)
