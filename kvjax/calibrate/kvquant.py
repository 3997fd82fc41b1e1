"""Ranges and levels that `kvjax.compress.kvquant` reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.calibrate.base import calibration
from kvjax.codecs.heads import join
from kvjax.compress.kvquant import KEYS, VALUES
from kvjax.compress.kvquant import kvquant as method
from kvjax.decode import positions_of
from kvjax.models import forward

NAMES = (
    f"{KEYS}_centre", f"{KEYS}_range", KEYS, f"{KEYS}_read", VALUES, f"{VALUES}_read",
)  # fmt: skip
POINTS = 200_000  # numbers of a layer that the levels are fitted to, at most
ROUNDS = 50


def constants_of(
    model: Any, batches: Iterable[Array], sinks: int = 1, **how: Any
) -> dict[str, Array]:
    """The constants for a model: `fit` of its keys, values and gradients.

    Args:
      batches: tokens, int32 [B, T] each, T above `sinks`, the first tokens, which are left out.
    """
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for tokens in batches:
        for held, x in zip(parts, _capture(model, jnp.asarray(tokens))):
            held.append(np.asarray(x[:, :, sinks:], np.float32).reshape(x.shape[0], -1, x.shape[3]))
    return fit(*(np.concatenate(held, 1) for held in parts), **how)


def fit(
    k: np.ndarray, v: np.ndarray, gk: np.ndarray, gv: np.ndarray, *, bits: int,
    outliers: float = 0.01, q_norm: bool | None = None, range_weight: bool = True,
) -> dict[str, Array]:  # fmt: skip
    """The constants by name: ranges [L, 1, 1, C], levels [L, 1, 1, 2^bits], float32.

    Args:
      k, v: keys before rotation and values of N tokens, [L, N, C], C the channels of all heads.
      gk, gv: the loss's gradients at them.
      bits, outliers, q_norm, range_weight: as of `kvjax.compress.kvquant`.
    """
    q_norm = bits <= 2 if q_norm is None else q_norm
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for layer in range(len(k)):
        for name, x, gradient, axis in ((KEYS, k, gk, 0), (VALUES, v, gv, 1)):
            x = x[layer]
            centre, extent, inside = ranges(x, outliers, axis)
            a = ((x - centre) / extent)[inside]
            weight = gradient[layer] ** 2 * (extent**2 if range_weight else 1.0)
            table, read = fit_levels(a, np.broadcast_to(weight, x.shape)[inside], 2**bits, q_norm)
            found[name].append(table)
            found[f"{name}_read"].append(read)
            if name == KEYS:
                found[f"{KEYS}_centre"].append(centre[0])
                found[f"{KEYS}_range"].append(extent[0])
    return {n: jnp.asarray(np.stack(x)[:, None, None], jnp.float32) for n, x in found.items()}


@jax.jit
def _capture(model: Any, tokens: Array) -> tuple[Array, ...]:
    """Keys before rotation, values, and the loss's gradients at them, each [L, B, T, H D]."""
    positions = positions_of(tokens)
    config = model.config
    layers = len(config.attention_layers)
    shape = (layers, tokens.shape[0], config.kv_heads, tokens.shape[1], config.head_dim)

    def loss(shift: tuple[Array, Array]) -> Any:
        logits, new = forward(
            model, tokens, positions, phase="prefill", shift=shift, differentiable=True, remat=True
        )
        scores = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], 2)
        return -jnp.mean(chosen), (new.kv.k, new.kv.v)

    zero = jnp.zeros(shape, jnp.float32)
    (_, (k, v)), (gk, gv) = jax.value_and_grad(loss, has_aux=True)((zero, zero))
    return tuple(join(x)[:, :, 0] for x in (k, v, gk, gv))


def ranges(x: np.ndarray, outliers: float, axis: int) -> tuple[np.ndarray, ...]:
    """(centre, half the range, which entries are inside) of x [N, C] along an axis, without the
    share `outliers` at both ends."""
    low, high = (
        np.quantile(x, q, axis, keepdims=True).astype(np.float32)
        for q in (outliers / 2, 1 - outliers / 2)
    )
    extent = np.maximum((high - low) / 2, np.float32(1e-6))
    return (high + low) / 2, extent, (x >= low) & (x <= high)


def fit_levels(
    a: np.ndarray, weight: np.ndarray, count: int, q_norm: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(levels ascending, levels as read) of numbers a [n] with weights, float32 [count] each."""
    if len(a) > POINTS:
        at = np.random.default_rng(0).choice(len(a), POINTS, replace=False)
        a, weight = a[at], weight[at]
    table = weighted_kmeans(a, weight, count)
    read = table
    if q_norm:
        coded = table[np.searchsorted((table[1:] + table[:-1]) / 2, a)]
        stretch = a.std() / max(coded.std(), 1e-6)
        read = table * stretch + (a.mean() - coded.mean() * stretch)
    return table.astype(np.float32), read.astype(np.float32)


def weighted_kmeans(a: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """`count` ascending centres of least sum of weight (a - centre)^2, by Lloyd's rounds.

    Starts from weighted quantiles, and from a uniform grid; the better end is returned. Cells are
    runs of the sorted numbers, so a round is a few sums of prefix differences.

    >>> weighted_kmeans(np.array([0.0, 0.1, 1.0, 1.0]), np.ones(4), 2).round(2).tolist()
    [0.05, 1.0]
    """
    order = np.argsort(a, kind="stable")
    a = a[order].astype(np.float64)
    weight = weight[order].astype(np.float64)
    weight = weight / weight.sum() if weight.sum() > 0 else np.full(len(a), 1 / len(a))
    sums = np.stack([np.concatenate([[0.0], np.cumsum(w)]) for w in (weight, weight * a)])
    part = (np.arange(count) + 0.5) / count
    starts = (
        a[np.minimum(np.searchsorted(sums[0], part), len(a) - 1)],
        a[0] + part * (a[-1] - a[0]),
    )

    def run(centres: np.ndarray) -> tuple[float, np.ndarray]:
        for _ in range(ROUNDS):
            edge = np.searchsorted(a, (centres[1:] + centres[:-1]) / 2)
            bounds = sums[:, np.concatenate([[0], edge, [len(a)]])]
            mass, moment = np.diff(bounds, axis=1)
            centres = np.where(mass > 0, moment / np.where(mass > 0, mass, 1.0), centres)
            centres = np.sort(centres)
        near = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, a)]
        return float(np.sum(weight * (a - near) ** 2)), centres

    best = min((run(start) for start in starts), key=lambda found: found[0])[1]
    # Levels must ascend: equal ones (fewer numbers than levels) are moved apart a little.
    return best + np.arange(count) * 1e-9


kvquant = calibration(method, NAMES, constants_of)
