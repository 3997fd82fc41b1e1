"""Projections that `kvjax.compress.compress_kv_heads` and `kvjax.models.merge_kv_heads` read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import rope_of, rotate
from kvjax.calibrate.base import calibration
from kvjax.codecs.heads import join
from kvjax.compress.compress_kv_heads import KEYS, VALUES
from kvjax.compress.compress_kv_heads import compress_kv_heads as method
from kvjax.decode import positions_of
from kvjax.models import forward


def projections(
    model: Any, batches: Iterable[Array], rope: str, fit: str, sinks: int, **how: Any
) -> dict[str, Array]:
    """{name: float32 [L, 1, H, D, W]}: the blocks U_h of each group's projection, per layer.

    Args:
      batches: tokens, int32 [B, T] each; not read where `fit` is of the weights or the mean.
      rope, fit, sinks and how: as of `kvjax.compress.compress_kv_heads`.
    """
    if fit == "activations":
        found = moments(model, batches, rope == "after", sinks)
    elif fit == "weights":
        found = of_weights(model)
    else:
        found = None
    return bases(model.config, found, rope=rope, fit=fit, **how)


def bases(
    config: Any, found: tuple[np.ndarray, np.ndarray] | None, rope: str, fit: str, **how: Any
) -> dict[str, Array]:
    """`projections` from second moments of keys and values, each [L, H D, H D].

    Args:
      found: None where `fit` is "mean".
    """
    codec = method(rope=rope, fit=fit, **how).stages[-1].codec.k
    heads, width = config.kv_heads, config.head_dim
    group, rank = codec.sizes(heads, width)
    if fit == "mean":
        if rank != width:
            raise ValueError(
                f"compress_kv_heads(fit='mean'): {group} heads of {width} are to become {rank} "
                "channels, which is not one head"
            )
        one = np.tile(np.eye(width) / np.sqrt(group), (heads, 1, 1))
        same = np.broadcast_to(one, (len(config.attention_layers), 1, *one.shape))
        return {name: jnp.asarray(same, jnp.float32) for name in (KEYS, VALUES)}
    find = leading
    if rope == "commuting":
        if rank % width:
            raise ValueError(
                f"compress_kv_heads(rope='commuting'): {group} heads of {width} are to become "
                f"{rank} channels, which is not a whole number of heads"
            )
        kept, rotary = rank // width, config.rotated
        find = lambda m, _: commuting(m, kept, width, rotary)  # noqa: E731
    sides = {KEYS: (found[0], find), VALUES: (found[1], leading)}
    return {
        name: jnp.asarray(_grouped(moment, group, width, rank, best)[:, None], jnp.float32)
        for name, (moment, best) in sides.items()
    }


def moments(
    model: Any, batches: Iterable[Array], rotated: bool, sinks: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Second moments of keys and of values, not centred, summed over all tokens: [L, H D, H D].

    Args:
      rotated: whether keys are taken after rotary embedding.
      sinks: first tokens of each sequence that are left out.
    """
    total: Any = 0.0
    for tokens in batches:
        more = _moments(model, jnp.asarray(tokens), rotated, sinks)
        total = total + np.asarray(more, np.float64)
    return total[0], total[1]


@jax.jit
def capture(model: Any, tokens: Array) -> tuple[Array, Array, Array]:
    """Keys before rotation and values [L, B, H, T, D] of tokens [B, T], and positions."""
    _, new = forward(model, tokens, positions_of(tokens), phase="prefill", logits="none")
    return new.kv.k, new.kv.v, new.kv.pos


@jax.jit(static_argnames=("rotated", "sinks"))
def _moments(model: Any, tokens: Array, rotated: bool, sinks: int) -> Array:
    k, v, pos = capture(model, tokens)
    k = rotate(k, pos, rope_of(model.config, tokens.shape[1])) if rotated else k
    x = jnp.stack([join(k), join(v)])[:, :, :, 0, sinks:].astype(jnp.float32)
    return jnp.einsum("slbtc,slbtd->slcd", x, x, precision=jax.lax.Precision.HIGHEST)


def of_weights(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """W W^T of each layer's projections [L, H D, width]: second moments for white inputs."""
    weights = (np.asarray(w[...], np.float64) for w in (model.layers.k, model.layers.v))
    return tuple(w @ np.swapaxes(w, -1, -2) for w in weights)


def _grouped(moment: np.ndarray, group: int, width: int, rank: int, find: Any) -> np.ndarray:
    """`find(moment of a group's channels, rank)` for every layer and group: [L, H, D, W]."""
    size = group * width
    parts = range(0, moment.shape[-1], size)
    found = [[find(layer[i : i + size, i : i + size], rank) for i in parts] for layer in moment]
    return np.asarray(found).reshape(len(moment), -1, width, rank)


def leading(moment: np.ndarray, rank: int) -> np.ndarray:
    """The eigenvectors of the `rank` largest eigenvalues of a symmetric matrix, as columns.

    >>> leading(np.diag([1.0, 5.0, 3.0]), 2).round(6).tolist()
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    """
    return np.linalg.eigh(moment)[1][:, ::-1][:, :rank]


def commuting(moment: np.ndarray, kept: int, width: int, rotary: int) -> np.ndarray:
    """The projection [t D, kept D] that leaves most, among those that commute with rotation.

    Rotary embedding multiplies channels (i, i + R/2) of a head, as one complex number, by a number
    that is the same in all heads. So any complex combination of the heads' i-th numbers commutes
    with it: the best are the eigenvectors of their complex second moment [t, t]. Channels that do
    not rotate are projected like values.

    Args:
      moment: of the channels of t heads before (or after) rotation, [t D, t D].
      kept: heads that the t become. width: D. rotary: R.
    """
    heads, half = len(moment) // width, rotary // 2
    m = moment.reshape(heads, width, heads, width)
    basis = np.zeros((heads, width, kept, width))
    for i in range(half):
        j = i + half
        # z = x_i + i x_j of each head: E conj(z) z^T, whose eigenvectors u give c = sum conj(u) z
        real, cross = m[:, i, :, i] + m[:, j, :, j], m[:, i, :, j] - m[:, j, :, i]
        u = np.linalg.eigh(real - 1j * cross)[1][:, ::-1][:, :kept]
        basis[:, i, :, i] = basis[:, j, :, j] = u.real
        basis[:, i, :, j], basis[:, j, :, i] = -u.imag, u.imag
    if rest := width - rotary:
        part = m[:, rotary:, :, rotary:].reshape(heads * rest, -1)
        u = leading(part, kept * rest).reshape(heads, rest, kept, rest)
        basis[:, rotary:, :, rotary:] = u
    return basis.reshape(heads * width, kept * width)


compress_kv_heads = calibration(method, (KEYS, VALUES), projections)
