"""Codecs of several heads together, where the heads' axis stands before that of the tokens."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_zoo import decode, encode

from kvjax.codecs import (
    across_heads,
    compose,
    joins_heads,
    low_rank,
    merge_heads,
    normalize,
    per_kv,
    permute_heads,
    project_heads,
    quantize,
    residual,
    rotate_heads,
    with_outliers,
)

H, T, D = 3, 64, 16
ORDER = np.random.default_rng(4).permutation(H * D).reshape(H, D)
CODECS = {
    "whole": across_heads(quantize(2)),
    "groups": across_heads(quantize(4, group=16)),
    "channel": across_heads(quantize(2, "channel", 16)),
    "outliers": across_heads(with_outliers(quantize(2), 0.1)),
    "low rank": residual(across_heads(with_outliers(quantize(2), 0.05), 32), low_rank(2, 32)),
    "rotated": compose(rotate_heads(3), quantize(2)),
    "ordered": compose(rotate_heads(4), permute_heads("order"), quantize(2)),
    "merged": merge_heads(1),
    "half": merge_heads(0.5, "half", quantize(4)),
    "projected": project_heads(0.4, "f"),
    "projected, coded": compose(project_heads(0.4, "f"), quantize(4, "channel", 16)),
    "moved": compose(normalize("n"), quantize(2, group=8)),
}
BASIS = np.linalg.qr(np.random.default_rng(6).standard_normal((H * D, H * D)))[0]
R = int(0.4 * D)
FACTORS = np.random.default_rng(5).standard_normal((2, H * D, H * R)).astype(np.float32) / 7
GIVEN = {
    "heads": jnp.asarray(BASIS[:, :D].reshape(H, D, D), jnp.float32),
    "half": jnp.asarray(BASIS[:, :24].reshape(H, D, 24), jnp.float32),
    "f_down": jnp.asarray(FACTORS[0][None]),
    "f_up": jnp.asarray(FACTORS[1].T[None]),
    "f_offset": jnp.arange(H * D, dtype=jnp.float32)[None] / 10,
    "order": jnp.asarray(ORDER, jnp.int32),
    "n_centre": jnp.arange(D, dtype=jnp.float32),
    "n_range": jnp.arange(1, D + 1, dtype=jnp.float32),
}
every = pytest.mark.parametrize("name", CODECS)


def sample(seed=0):
    return np.random.default_rng(seed).standard_t(4, (2, H, T, D)).astype(np.float32)


PLAIN = {
    "whole": quantize(2),
    "groups": quantize(4, group=16),
    "channel": quantize(2, "channel", 16),
}


@pytest.mark.parametrize(("name", "inner"), PLAIN.items(), ids=PLAIN)
def test_it_is_the_codec_of_the_joined_channels(name, inner):
    x = sample()
    wide = np.moveaxis(x, 1, 2).reshape(2, T, H * D)
    want = np.asarray(decode(inner, encode(inner, wide))).reshape(2, T, H, D)
    got = decode(CODECS[name], encode(CODECS[name], x))
    np.testing.assert_allclose(got, np.moveaxis(want, 2, 1), atol=1e-6)


@every
def test_padding_is_never_felt(name):
    codec, x = CODECS[name], sample()
    valid = np.broadcast_to(np.arange(T) % 7 != 0, (2, 1, T))
    valid = np.broadcast_to(valid, (2, H, T))
    poisoned = np.where(valid[..., None], x, np.nan)
    a, b = (encode(codec, y, valid, GIVEN) for y in (np.where(valid[..., None], x, 9.0), poisoned))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.isfinite(decode(codec, b, jnp.float32, GIVEN)).all()


@every
def test_coded_form_agrees_with_decoding(name):
    codec, x = CODECS[name], sample()
    code = encode(codec, x, None, GIVEN)
    y = np.asarray(decode(codec, code, jnp.float32, GIVEN), np.float64)
    draw = np.random.default_rng(2)
    q, p = (draw.standard_normal((2, H, 5, n)).astype(np.float32) for n in (D, T))
    run = jax.jit(lambda q, p: (codec.scores(q, code, GIVEN), codec.mix(p, code, GIVEN)))
    s, o = run(q, p)
    np.testing.assert_allclose(s, q @ y.swapaxes(-1, -2), atol=2e-3)
    np.testing.assert_allclose(o, p @ y, atol=2e-3)


@every
def test_an_empty_code_has_the_shapes_of_a_full_one(name):
    codec = CODECS[name]
    form = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype.name))
    assert form(codec.empty((2, H), T, D)) == form(encode(codec, sample(), None, GIVEN))


def test_projection_is_that_of_the_joined_channels():
    x, codec = sample(), CODECS["projected"]
    wide = np.moveaxis(x, 1, 2).reshape(2, T, H * D).astype(np.float64)
    offset = np.arange(H * D) / 10
    y = (wide - offset) @ FACTORS[0]
    got = encode(codec, x, None, GIVEN)
    want = np.moveaxis(y.reshape(2, T, H, R), 2, 1)
    np.testing.assert_allclose(got, want, atol=1e-4)
    back = np.moveaxis((y @ FACTORS[1].T + offset).reshape(2, T, H, D), 2, 1)
    np.testing.assert_allclose(decode(codec, got, jnp.float32, GIVEN), back, atol=1e-4)
    # Constants of one head serve each head alike.
    one = {
        n: v[..., :D] if n == "f_offset" else v[..., :D, :R] for n, v in GIVEN.items() if "f_" in n
    }
    one["f_up"] = GIVEN["f_up"][..., :R, :D]
    each = codec.forward(jnp.asarray(x), one)
    want = (x - offset[:D]) @ FACTORS[0][:D, :R]
    np.testing.assert_allclose(each, want, atol=1e-4)
    with pytest.raises(ValueError, match=r"part is 0.05: of 16 channels a head it leaves none"):
        project_heads(0.05).check(16)
    for bad in (0.0, 1.1, True, "a"):
        with pytest.raises(ValueError, match="part is"):
            project_heads(bad)


@every
def test_gradients_pass_through(name):
    """Straight through what rounds; through maps to fewer channels as their transposes."""
    codec, x = CODECS[name], jnp.asarray(sample())
    g = jnp.asarray(sample(1))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(g * codec.roundtrip(x, None, None, GIVEN))))(x)
    if name in ("merged", "half"):
        u = np.asarray(GIVEN["heads" if name == "merged" else "half"])
        np.testing.assert_allclose(grad, np.einsum("bhtd,hdr,ger->bgte", g, u, u), atol=1e-4)
    elif name.startswith("projected"):
        down, up = (np.asarray(GIVEN[n][0]) for n in ("f_down", "f_up"))
        wide = np.moveaxis(np.asarray(g), 1, 2).reshape(2, T, H * D) @ up.T @ down.T
        want = np.moveaxis(wide.reshape(2, T, H, D), 2, 1)
        np.testing.assert_allclose(grad, want, rtol=1e-3, atol=1e-2 * np.abs(want).max())
    else:
        np.testing.assert_allclose(grad, g, atol=1e-5)


def test_projection_passes_gradients_to_its_factors():
    """Through the quantiser after it too: the loss falls along the negative gradient."""
    x, codec = jnp.asarray(sample()), CODECS["projected, coded"]

    @jax.jit
    @jax.value_and_grad
    def loss(given):
        return jnp.mean((codec.roundtrip(x, None, None, given) - x) ** 2)

    given = {n: v for n, v in GIVEN.items() if n.startswith("f_")}
    before, slope = loss(given)
    assert all(float(jnp.abs(g).max()) > 0 for g in slope.values())
    after, _ = loss(jax.tree.map(lambda a, g: a - 1e-2 * g, given, slope))
    assert after < 0.97 * before


def test_bytes_are_shared_by_the_heads():
    one, joined = quantize(2), across_heads(quantize(2))
    leaves = jax.tree.leaves(joined.code_spec((H,), 1, 64))
    bits = 8 * sum(x.size * x.dtype.itemsize for x in leaves) / (H * 64)
    assert one.bits(64) == 2.5 and bits == 2 + 32 / (H * 64)


def test_who_joins_heads():
    assert all(joins_heads(c) for n, c in CODECS.items() if n != "moved")
    assert joins_heads(per_kv(k=quantize(2), v=CODECS["low rank"]))
    assert not joins_heads(CODECS["moved"]) and not joins_heads(per_kv(quantize(2), quantize(4)))
    with pytest.raises(ValueError, match="block is 24: expected a multiple of the codec's, 16"):
        across_heads(quantize(2, "channel", 16), 24)


def test_merged_heads_are_projected_together():
    x = sample()
    wide = np.moveaxis(x, 1, 2).reshape(2, T, H * D).astype(np.float64)
    u = BASIS[:, :D]
    code = encode(CODECS["merged"], x, None, GIVEN)
    np.testing.assert_allclose(code[:, 0], wide @ u, atol=1e-4)
    want = np.moveaxis((wide @ u @ u.T).reshape(2, T, H, D), 2, 1)
    np.testing.assert_allclose(decode(CODECS["merged"], code, jnp.float32, GIVEN), want, atol=1e-4)


def test_groups_of_heads_are_merged_apart():
    """Four heads to two: each pair by its own projection, whatever the other pair holds."""
    draw = np.random.default_rng(1)
    x = draw.standard_normal((4, T, D)).astype(np.float32)
    u = np.stack([np.linalg.qr(draw.standard_normal((2 * D, 2 * D)))[0][:, :D] for _ in range(2)])
    given = {"heads": jnp.asarray(u.reshape(4, D, D), jnp.float32)}
    codec = merge_heads(2)
    y = np.asarray(decode(codec, encode(codec, x, None, given), jnp.float32, given))
    for g in range(2):
        wide = np.moveaxis(x[2 * g : 2 * g + 2], 0, 1).reshape(T, 2 * D)
        want = np.moveaxis((wide @ u[g] @ u[g].T).reshape(T, 2, D), 1, 0)
        np.testing.assert_allclose(y[2 * g : 2 * g + 2], want, atol=1e-4)


def test_how_many_heads_a_share_merges():
    half, third = merge_heads(0.5), merge_heads(0.3333)
    assert half.sizes(32, 128) == (2, 128) and half.sizes(3, 64) == (3, 96)
    assert third == merge_heads(Fraction(1, 3)) and third.sizes(3, 64) == (3, 64)
    assert merge_heads(0.75).sizes(8, 64) == (4, 192) and merge_heads(1.0).sizes(8, 64) == (1, 64)
    assert merge_heads(2).sizes(8, 64) == (4, 64)
    assert CODECS["half"].code_spec((H,), 8, D)["scale"].shape == (1, 8, 1)
    with pytest.raises(ValueError, match="divisor of the 3 heads"):
        merge_heads(2).sizes(3, 64)
    with pytest.raises(ValueError, match=r"heads is 1.5: expected .* share"):
        merge_heads(1.5)
    with pytest.raises(ValueError, match="without constants"):
        merge_heads(1, codec=normalize("n"))
