"""Fewer KV heads against NumPy: as a cache, by calibration, and folded into weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import init_cache
from kvjax.calibrate import CALIBRATIONS
from kvjax.calibrate.compress_kv_heads import commuting, leading, moments
from kvjax.compress import compress_kv_heads
from kvjax.models import forward, llama, merge_kv_heads
from kvjax.models.config import Config
from kvjax.models.llama import Model, flatten
from tests.compress.harness import CONFIG, model
from tests.compress.reference import D, H, L, turn
from tests.compress.test_reference_codes import follow

RNG = np.random.default_rng(8)
KEYS, VALUES = "merged_keys", "merged_values"


def orthonormal(n, rank):
    return np.linalg.qr(RNG.standard_normal((n, n)))[0][:, :rank]


def project(x, u):
    """Heads x [H, n, D] through u [H D, r] and back."""
    h, n, d = x.shape
    wide = np.moveaxis(x, 0, 1).reshape(n, h * d)
    return np.moveaxis((wide @ u @ u.T).reshape(n, h, d), 1, 0)


@pytest.mark.parametrize("rope", ["after", "before"])
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_what_a_query_reads(rope, keep):
    rank = int(keep * H * D)
    u, v = ([orthonormal(H * D, rank) for _ in range(L)] for _ in range(2))

    def read(r, n):
        pos = np.arange(n)
        if rope == "after":
            k = project(r.k[:, :n], u[r.layer])
        else:
            k = turn(project(r.plain[:, :n], u[r.layer]), pos)
        return k, project(r.v[:, :n], v[r.layer])

    given = {
        name: jnp.asarray(np.stack(x).reshape(L, 1, H, D, rank), jnp.float32)
        for name, x in ((KEYS, u), (VALUES, v))
    }
    follow(f"compress_kv_heads(keep={keep}, rope='{rope}')", read, given)


@jax.jit
def logits_and_kv(model, tokens, shift=None):
    """Logits of whole sequences, their keys before rotation and values."""
    pos = jnp.tile(jnp.arange(tokens.shape[1]), (tokens.shape[0], 1))
    logits, new = forward(model, tokens, pos, phase="prefill", shift=shift)
    return logits, (new.kv.k, new.kv.v)


# --- calibration ---

WIDE = Config(50, 32, 48, 2, 4, 4, 8)  # four heads of keys and values


def four_heads():
    return llama.init(WIDE, jax.random.key(3))


def batches():
    return [np.random.default_rng(i).integers(0, 50, (2, 24)) for i in range(3)]


def calibrate(model, **how):
    return CALIBRATIONS["compress_kv_heads"](**how)(model, batches())


def tokens_of(model, rotated):
    """Keys (rotated or not) and values of all calibration tokens, [L, N, H D], from NumPy."""
    sides = [[], []]
    for tokens in batches():
        k, v = logits_and_kv(model, jnp.asarray(tokens))[1]
        k = turn(np.asarray(k, np.float64), np.arange(24)) if rotated else k
        for side, x in zip(sides, (k, v)):
            x = np.moveaxis(np.asarray(x, np.float64), 2, 3)
            side.append(x.reshape(len(x), -1, x.shape[3] * x.shape[4]))
    return [np.concatenate(side, 1) for side in sides]


def lost(x, basis, group):
    """Squared error of tokens x [N, H D] by projections [H, D, r] of groups of heads."""
    heads, d, rank = basis.shape
    total = 0.0
    for g in range(heads // group):
        part = x[:, g * group * d : (g + 1) * group * d]
        u = np.asarray(basis[g * group : (g + 1) * group], np.float64).reshape(group * d, rank)
        np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
        total += ((part - part @ u @ u.T) ** 2).sum()
    return total


def test_moments_are_those_of_the_tokens():
    for rotated in (True, False):
        found = moments(four_heads(), batches(), rotated)
        for got, x in zip(found, tokens_of(four_heads(), rotated)):
            np.testing.assert_allclose(got, np.swapaxes(x, 1, 2) @ x, rtol=1e-4, atol=1e-2)
    later = moments(four_heads(), batches(), True, sinks=23)[1]  # the last token of each sequence
    x = tokens_of(four_heads(), True)[1][:, 23::24]
    np.testing.assert_allclose(later, np.swapaxes(x, 1, 2) @ x, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("keep", "group", "rank"), [(0.5, 2, 8), (0.25, 4, 8), (0.75, 4, 24)])
def test_error_is_the_tail_of_the_spectrum(keep, group, rank):
    given = calibrate(four_heads(), keep=keep)
    for name, side in zip((KEYS, VALUES), tokens_of(four_heads(), True)):
        for basis, x in zip(given[name][:, 0], side):
            parts = np.split(x, 4 // group, 1)
            tail = sum((np.linalg.svd(p)[1][rank:] ** 2).sum() for p in parts)
            np.testing.assert_allclose(lost(x, np.asarray(basis), group), tail, rtol=1e-3)


def test_order_of_the_fits():
    """Activations lose least; of keys that rotate, a commuting projection more than a free one, and
    the mean, which commutes too, most."""
    free, bound, weights, mean = (
        calibrate(four_heads(), **how)
        for how in ({}, {"rope": "commuting"}, {"fit": "weights"}, {"fit": "mean"})
    )
    keys, values = tokens_of(four_heads(), True)
    for l in range(2):
        at = lambda given, name, x, l=l: lost(x[l], np.asarray(given[name])[l, 0], 2)  # noqa: E731
        k = [at(given, KEYS, keys) for given in (free, bound, mean)]
        assert k[0] < k[1] < k[2] and k[0] < at(weights, KEYS, keys)
        v = [at(given, VALUES, values) for given in (free, weights, mean)]
        assert v[0] < v[1] and v[0] < v[2]


@pytest.mark.parametrize("rotary", [8, 4])
def test_a_commuting_projection_commutes(rotary):
    x = RNG.standard_normal((3, 200, D)) * np.geomspace(3, 0.3, D)
    x[1] = x[0] + 0.1 * x[1]
    wide = np.moveaxis(x, 0, 1).reshape(200, -1)
    u = commuting(wide.T @ wide, 1, D, rotary)
    np.testing.assert_allclose(u.T @ u, np.eye(D), atol=1e-12)

    def rotated(x, pos):
        half, rest = x[..., :rotary], x[..., rotary:]
        freq = 100.0 ** (-2.0 * np.arange(rotary // 2) / rotary)
        c, s = np.cos(pos[:, None] * freq), np.sin(pos[:, None] * freq)
        a, b = half[..., : rotary // 2], half[..., rotary // 2 :]
        return np.concatenate([a * c - b * s, b * c + a * s, rest], -1)

    pos = np.arange(200)
    np.testing.assert_allclose(rotated(project(x, u), pos), project(rotated(x, pos), u), atol=1e-10)
    best = leading(wide.T @ wide, D)
    mean = np.tile(np.eye(D), (3, 1)) / np.sqrt(3)
    errors = [((wide - wide @ p @ p.T) ** 2).sum() for p in (best, u, mean)]
    assert errors == sorted(errors)


# --- folded into weights ---


def with_projected(model, tokens, bases, group):
    """Logits where every layer's keys (before rotation) and values are projected and rebuilt."""
    config = model.config
    shape = (config.layers, len(tokens), config.kv_heads, tokens.shape[1], config.head_dim)
    shift = [np.zeros(shape, np.float32)] * 2
    for _ in range(config.layers + 1):  # a layer's keys are right once those before it are
        logits, found = logits_and_kv(model, tokens, tuple(map(jnp.asarray, shift)))
        raw = [np.asarray(x) - s for x, s in zip(found, shift)]
        shift = []
        for x, basis in zip(raw, bases):
            move = np.empty_like(x)
            for l, b, g in np.ndindex(*shape[:2], shape[2] // group):
                at = slice(g * group, (g + 1) * group)
                u = np.asarray(basis)[l, 0, at].reshape(group * shape[4], -1)
                move[l, b, at] = project(x[l, b, at], u) - x[l, b, at]
            shift.append(move)
    return logits


def biased(config=WIDE):
    config = dataclasses.replace(config, qkv_bias=True)
    flat = flatten(llama.init(config, jax.random.key(4)))
    draw = np.random.default_rng(0)
    return Model(config, {
        n: jnp.asarray(draw.standard_normal(x.shape) * 0.3, x.dtype) if "bias" in n else x
        for n, x in flat.items()
    })  # fmt: skip


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_folded_model_is_the_explicit_projection(kv_heads):
    whole = biased()
    given = calibrate(whole, kv_heads=kv_heads, rope="commuting")
    small = merge_kv_heads(whole, given[KEYS], given[VALUES])
    assert small.config == dataclasses.replace(whole.config, kv_heads=kv_heads)
    assert small.layers.k[...].shape == (2, kv_heads * 8, 32)
    tokens = jnp.asarray(batches()[0])
    want = with_projected(whole, tokens, (given[KEYS], given[VALUES]), 4 // kv_heads)
    got = logits_and_kv(small, tokens)[0]
    np.testing.assert_allclose(got, want, atol=2e-4)
    plain = logits_and_kv(whole, tokens)[0]
    assert np.abs(np.asarray(got - plain)).max() > 0.05  # something was lost


def test_folding_what_does_not_commute_is_wrong():
    """Why there is a rotary treatment at all: the free projection, folded, smears positions."""
    given = calibrate(four_heads(), kv_heads=2, rope="before")
    tokens = jnp.asarray(batches()[0])
    want = with_projected(four_heads(), tokens, (given[KEYS], given[VALUES]), 2)
    small = merge_kv_heads(four_heads(), given[KEYS], given[VALUES])
    got = logits_and_kv(small, tokens)[0]
    assert np.abs(np.asarray(got) - np.asarray(want)).max() > 0.05


def test_as_many_heads_as_before_and_twins_lose_nothing():
    whole = biased()
    tokens = jnp.asarray(batches()[0])
    given = calibrate(whole, kv_heads=4, rope="commuting")
    same = merge_kv_heads(whole, given[KEYS], given[VALUES])
    want = logits_and_kv(whole, tokens)[0]
    np.testing.assert_allclose(logits_and_kv(same, tokens)[0], want, atol=2e-4)
    flat = flatten(whole)
    for name in ("layers.k", "layers.v", "layers.k_bias", "layers.v_bias"):
        x = flat[name].reshape(2, 2, 2, 8, -1)
        flat[name] = jnp.stack([x[:, :, 0]] * 2, 2).reshape(flat[name].shape)
    twins = Model(whole.config, flat)
    given = calibrate(twins, kv_heads=2, rope="commuting")
    small = merge_kv_heads(twins, given[KEYS], given[VALUES])
    want = logits_and_kv(twins, tokens)[0]
    np.testing.assert_allclose(logits_and_kv(small, tokens)[0], want, atol=2e-4)


def test_what_makes_no_sense_is_refused():
    for bad in ({"keep": 0.0}, {"kv_heads": 0}, {"rope": "none"}, {"fit": "best"}, {"bits": 9},
                {"sinks": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=f"compress_kv_heads.{next(iter(bad))}"):
            compress_kv_heads(**bad)
    with pytest.raises(ValueError, match="give one of them"):
        compress_kv_heads(keep=0.5, kv_heads=1)
    with pytest.raises(ValueError, match=r"merged_keys.*calibrate"):
        init_cache(CONFIG, compress_kv_heads(), 1, 16, prompt=8)
    with pytest.raises(ValueError, match="divisor of the 4 heads"):
        calibrate(four_heads(), kv_heads=3)
    with pytest.raises(ValueError, match="not one head"):
        calibrate(four_heads(), keep=0.75, fit="mean")
    with pytest.raises(ValueError, match="not a whole number of heads"):
        calibrate(model(), keep=0.25, rope="commuting")
    given = calibrate(four_heads(), keep=0.75)
    with pytest.raises(ValueError, match=r"merge_kv_heads.keys. is of shape"):
        merge_kv_heads(four_heads(), given[KEYS], given[VALUES])
    normed = llama.init(dataclasses.replace(WIDE, qk_norm=True), jax.random.key(0))
    with pytest.raises(ValueError, match="normalises queries and keys"):
        merge_kv_heads(normed, given[KEYS], given[VALUES])
    codec = compress_kv_heads(kv_heads=1).stages[0].codec.k
    with pytest.raises(ValueError, match="expected 2 heads, 8 channels"):
        codec.encode(jnp.zeros((1, 2, 5, 8)), constants=calibrate(four_heads(), kv_heads=2))
