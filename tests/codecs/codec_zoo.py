"""Codecs that every law is checked on, with constants where they need them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs import (
    balance,
    codebook,
    compose,
    dense,
    fourier,
    gaussian_levels,
    levels,
    low_rank,
    outliers,
    projection,
    quantize,
    residual,
    rotate,
    signs,
    sparse,
    split_channels,
    ternary,
    with_outliers,
)

WIDTH = 32
ZOO = {
    "dense": dense(),
    "token2": quantize(2),
    "token3_groups": quantize(3, group=8),
    "token4_symmetric": quantize(4, symmetric=True),
    "channel2": quantize(2, "channel", 16),
    "channel3_symmetric": quantize(3, "channel", 8, symmetric=True),
    "levels_groups": codebook((-1.5, 0.0, 0.3, 1.0), group=8),
    "learnt_levels": levels(3, ranged=True),
    "clipped": quantize(2, group=16, clip=0.8),
    "signs": signs(16),
    "ternary": ternary(16),
    "split": split_channels(0.5, quantize(2, "channel", 16), compose(fourier(), signs(16))),
    "fourier": fourier(),
    "orthogonal": rotate(2, "orthogonal"),
    "rotate": rotate(1),
    "projection": projection(8),
    "turboquant": compose(rotate(0), codebook(gaussian_levels(4))),
    "balanced": compose(balance(), rotate("hadamard"), quantize(2, "channel", 16)),
    "low_rank": low_rank(3, block=16, dtype="float32"),
    "outliers_token": outliers(0.1, width=WIDTH),
    "outliers_channel": outliers(0.2, "channel", 16),
    "outliers_many": outliers(0.7, width=WIDTH, dtype="float32"),
    "sparse": sparse(0.5),
    "sparse_coded": sparse(0.7, quantize(4)),
    "sparse_blocks": sparse(0.6, block=16),
    "gear_keys": residual(with_outliers(quantize(2, "channel", 16), 0.02), low_rank(2, block=32)),
    "gear_values": residual(with_outliers(quantize(2, group=16), 0.1), low_rank(2, block=16)),
    "three": residual(quantize(2), compose(balance(), quantize(2)), quantize(1, "channel", 8)),
}


def constants(width=WIDTH):
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    return {
        "basis": jnp.asarray(basis),
        "levels": jnp.asarray(np.linspace(-1, 1, 8).astype(np.float32) ** 3),
        "levels_read": jnp.asarray(np.linspace(-1, 1, 8).astype(np.float32) ** 3 * 1.1),
        "balance": jnp.asarray(rng.uniform(0.5, 2.0, width).astype(np.float32)),
    }


def given(codec, width=WIDTH):
    """The constants that this codec asks for."""
    full = constants(width)
    return {n: full[n][..., : s.shape[-1]] for n, s in codec.constants_spec(width).items()}


def sample(seed=0, leading=(2,), tokens=64, width=WIDTH, dtype=jnp.float32):
    """Heavy-tailed tokens with one large channel, as keys have."""
    x = np.random.default_rng(seed).standard_t(4, (*leading, tokens, width))
    x[..., 3] += 6.0
    return jnp.asarray(x, dtype)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec, x, valid=None, constants=None):
    """codec.encode, compiled once per codec and shape for the whole session."""
    return codec.encode(x, valid, None, constants)


@functools.partial(jax.jit, static_argnums=(0, 2))
def decode(codec, code, dtype=jnp.float32, constants=None):
    return codec.decode(code, dtype, constants)


@functools.partial(jax.jit, static_argnums=0)
def roundtrip(codec, x, valid=None, constants=None):
    return codec.roundtrip(x, valid, None, constants)


@functools.partial(jax.jit, static_argnums=0)
def pullback(codec, x, g, valid=None, constants=None):
    """The gradient of roundtrip, for the cotangent g."""
    return jax.vjp(lambda v: codec.roundtrip(v, valid, None, constants), x)[1](g)[0]
