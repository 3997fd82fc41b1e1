"""What every codec promises to the stage that stores with it."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_zoo import WIDTH, ZOO, decode, encode, given, pullback, roundtrip, sample

from kvjax.codecs import Transform, compose, outliers, projection, quantize, rotate, sparse

every = pytest.mark.parametrize("codec", ZOO.values(), ids=ZOO.keys())


@every
def test_leaves_carry_the_unit_axis(codec):
    x, c = sample(), given(codec)
    code = encode(codec, x, None, c)
    assert all(leaf.shape[:2] == (2, 64 // codec.block) for leaf in jax.tree.leaves(code))
    empty = codec.empty((2,), 64, WIDTH)
    assert same_spec(empty, code)
    assert not decode(codec, empty, jnp.float32, c).any()
    deep = codec.code_spec((2, 3), 64, WIDTH)
    assert all(leaf.shape[:3] == (2, 3, 64 // codec.block) for leaf in jax.tree.leaves(deep))
    spec = jax.eval_shape(lambda a: codec.decode(a, jnp.bfloat16, c), deep)
    assert spec.shape == (2, 3, 64, WIDTH) and spec.dtype == jnp.bfloat16


def same_spec(a, b):
    a, b = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree) for tree in (a, b))
    return a == b


@every
def test_units_are_coded_apart_and_move_freely(codec):
    x, c = sample(), given(codec)
    order = np.random.default_rng(0).permutation(64 // codec.block)
    rows = (order[:, None] * codec.block + np.arange(codec.block)).ravel()
    code = encode(codec, x, None, c)
    moved = jax.tree.map(lambda a: np.asarray(a)[:, order], code)
    y = decode(codec, moved, jnp.float32, c)
    expected = np.asarray(decode(codec, code, jnp.float32, c))[:, rows]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    again = decode(codec, encode(codec, np.asarray(x)[:, rows], None, c), jnp.float32, c)
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-4)


@every
def test_invalid_rows_are_never_felt(codec):
    x, c = sample(), given(codec)
    valid = np.random.default_rng(1).random((2, 64)) < 0.6
    valid[0, :32] = False
    poisoned = np.where(valid[..., None], x, np.nan).astype(np.float32)
    other = np.where(valid[..., None], x, 1e4).astype(np.float32)
    codes = [encode(codec, v, valid, c) for v in (poisoned, other)]
    jax.tree.map(np.testing.assert_array_equal, *codes)
    assert np.isfinite(decode(codec, codes[0], jnp.float32, c)).all()
    grad = np.asarray(pullback(codec, poisoned, jnp.ones_like(x), valid, c))
    assert np.isfinite(grad).all() and not grad[~valid].any()


blocks = {
    name: codec
    for name, codec in ZOO.items()
    if codec.block > 1 and not any(s in name for s in ("low_rank", "outliers", "gear"))
}


@pytest.mark.parametrize("codec", blocks.values(), ids=blocks.keys())
def test_statistics_leave_out_padding(codec):
    """Half a block of tokens is coded as the same tokens repeated to a whole one.

    Not for a factorisation, nor for outliers, of which repeated tokens have repeated ones.
    """
    c, half = given(codec), codec.block // 2
    x = np.asarray(sample()).reshape(2, -1, codec.block, WIDTH)[:, :, :half]
    padded = np.concatenate([x, np.full_like(x, np.nan)], 2).reshape(2, 64, WIDTH)
    repeated = np.concatenate([x, x], 2).reshape(2, 64, WIDTH)
    rows = np.arange(64) % codec.block < half
    # Both are encoded by one program, so that scales of 16 bits are rounded alike.
    y = decode(codec, encode(codec, padded, np.stack([rows, rows]), c), jnp.float32, c)
    z = decode(codec, encode(codec, repeated, np.ones((2, 64), bool), c), jnp.float32, c)
    np.testing.assert_allclose(y[:, rows], z[:, rows], rtol=1e-5, atol=1e-5)


@every
def test_coded_form_agrees_with_decoding(codec):
    x, c = sample(), given(codec)
    code = encode(codec, x, None, c)
    y = np.asarray(decode(codec, code, jnp.float32, c), np.float64)
    rng = np.random.default_rng(2)
    q = rng.standard_normal((2, 5, WIDTH)).astype(np.float32)
    p = rng.dirichlet(np.ones(64), (2, 5)).astype(np.float32)
    s, o = jax.jit(lambda q, p, code: (codec.scores(q, code, c), codec.mix(p, code, c)))(q, p, code)
    assert s.dtype == o.dtype == jnp.float32
    scale = np.abs(q) @ np.abs(y).swapaxes(-1, -2)  # float32 sums err relative to this
    assert (np.abs(s - q @ y.swapaxes(-1, -2)) <= 1e-5 * scale + 1e-5).all()
    np.testing.assert_allclose(o, p @ y, atol=1e-5 * np.abs(y).max())


@every
def test_roundtrip_is_decoding_with_a_straight_through_gradient(codec):
    x, c = sample(), given(codec)
    y = decode(codec, encode(codec, x, None, c), jnp.float32, c)
    np.testing.assert_allclose(roundtrip(codec, x, None, c), y, rtol=1e-5, atol=1e-5)
    g = jnp.asarray(np.random.default_rng(3).standard_normal(x.shape), jnp.float32)
    grad = pullback(codec, x, g, None, c)
    if "basis" in c:  # projections have their own gradient: that of U U^T
        u = np.asarray(c["basis"])
        np.testing.assert_allclose(grad, np.asarray(g) @ u @ u.T, atol=1e-4)
    else:
        np.testing.assert_allclose(grad, g, atol=1e-5)


@pytest.mark.parametrize("name", ["token2", "channel2", "levels_groups", "gear_keys", "turboquant"])
def test_plain_gradients_are_finite_where_there_is_no_range(name):
    codec, x = ZOO[name], sample().at[0].set(0.0)
    grad = jax.jit(jax.grad(lambda v: (codec.decode(codec.encode(v)) ** 2).sum()))(x)
    assert np.isfinite(grad).all()


@every
def test_equal_codecs_are_equal_values(codec):
    twin = copy.deepcopy(codec)
    assert twin is not codec and twin == codec and hash(twin) == hash(codec)
    assert [codec == other for other in ZOO.values()].count(True) == 1


@pytest.mark.parametrize("name", ["gear_values", "turboquant"])
def test_codecs_built_twice_compile_once(name):
    traces = []

    def both(codec, x):
        traces.append(None)
        return codec.decode(codec.encode(x))

    call, x = jax.jit(both, static_argnums=0), sample(tokens=32)
    np.testing.assert_array_equal(call(ZOO[name], x), call(copy.deepcopy(ZOO[name]), x))
    assert len(traces) == 1


@every
def test_bfloat16_is_coded_as_the_same_numbers_in_float32(codec):
    x, c = sample(dtype=jnp.bfloat16), given(codec)
    y = decode(codec, encode(codec, x, None, c), jnp.float32, c)
    exact = decode(codec, encode(codec, x.astype(jnp.float32), None, c), jnp.float32, c)
    # A transform stores its image in the dtype of x: one rounding of bfloat16.
    loose = 0.02 * float(jnp.abs(x).max()) if isinstance(codec, Transform) else 1e-5
    np.testing.assert_allclose(y, exact, atol=loose)


@pytest.mark.parametrize("name", ["token3_groups", "gear_keys", "turboquant"])
def test_vmap_is_a_leading_axis(name):
    codec, x = ZOO[name], sample()
    mapped = jax.jit(jax.vmap(lambda v: codec.decode(codec.encode(v))))(x)
    y = decode(codec, encode(codec, x))
    np.testing.assert_allclose(mapped, y, rtol=1e-5, atol=1e-4)


def test_constants_follow_the_leading_axes_through_a_combination():
    codec, x = ZOO["three"], sample()
    b = np.random.default_rng(0).uniform(0.5, 2, (2, WIDTH)).astype(np.float32)
    y = decode(codec, encode(codec, x, None, {"balance": b}), jnp.float32, {"balance": b})
    for row in range(2):
        c = {"balance": b[row]}
        z = decode(codec, encode(codec, x[row], None, c), jnp.float32, c)
        np.testing.assert_allclose(y[row], z, rtol=1e-5, atol=1e-5)


def test_bits_per_value():
    assert quantize(2).bits(64) == 2 + 32 / 64
    assert quantize(2, "channel", 32).bits(64) == 3.0
    assert quantize(4, symmetric=True, group=32).bits(64) == 4.5
    assert compose(rotate(), quantize(3)).bits(128) == 3.25
    assert compose(projection(16), quantize(4)).bits(64) == (16 * 4 + 32) / 64
    assert outliers(0.02, width=64).bits(64) == 2 * 24 / 64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: quantize(9), "bits is 9: expected an integer from 1 to 8"),
        (lambda: quantize(1, symmetric=True), "bits is 1: symmetric"),
        (lambda: quantize(2, "head"), "axis is 'head': expected 'token' or 'channel'"),
        (lambda: quantize(2, group=6), "group is 6: at 2 bits .* multiple of 4"),
        (lambda: quantize(2, group=32).check(48), "group is 32: it must divide the head size, 48"),
        (lambda: quantize(3).check(12), "width is 12: at 3 bits .* multiple of 8"),
        (lambda: quantize(2, scale_dtype="int8"), "scale_dtype is 'int8': expected a floating"),
        (lambda: quantize(2, "channel").encode(jnp.zeros((33, 8))), "33 tokens: .* block, 32"),
        (lambda: rotate("walsh"), "seed is 'walsh'"),
        (lambda: rotate("hadamard").check(48), "width is 48"),
        (lambda: compose(quantize(2), rotate()), "is not a transform"),
        (lambda: projection(4).encode(jnp.zeros((1, 8))), "constants has no 'basis'"),
        (lambda: outliers(2.0), "fraction is 2.0: expected 0 to 1"),
        (lambda: sparse(1.5), "sparsity is 1.5: a share of the entries is 0 to 1"),
        (lambda: sparse(0.5, quantize(2, "channel")), "codec is .* expected .* single tokens"),
        (lambda: sparse(0.5, block=0), "block is 0: expected an integer of at least 1"),
        (lambda: sparse(0.5).check(12), "width is 12: a bitmap needs a multiple of 8"),
    ],
)
def test_errors_name_the_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build()
