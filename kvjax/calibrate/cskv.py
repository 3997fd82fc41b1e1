"""Low-rank factors that `kvjax.compress.cskv` reads, or that their training starts from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.calibrate.base import calibration
from kvjax.codecs.heads import join
from kvjax.compress.cskv import cskv as method
from kvjax.compress.cskv import names
from kvjax.decode import positions_of
from kvjax.models import forward
from kvjax.models.decoder import rms_norm

PARTS = ("down", "up", "offset")
PROGRAM = "experiments.train_cskv"


def constants_of(
    model: Any, batches: Iterable[Array], *, factors: str, **how: Any
) -> dict[str, Array]:
    """`factors_of` what the batches say, tokens int32 [B, T] each; where factors is "svd" they are
    not read."""
    refuse(model, factors)
    return factors_of(model, None if factors == "svd" else statistics_of(model, batches),
                      factors=factors, **how)  # fmt: skip


def refuse(model: Any, factors: str) -> None:
    """Raises ValueError where keys are normalised after their projection, and so do not have its
    directions, but those are asked for."""
    if factors in ("svd", "asvd") and model.config.qk_norm:
        raise ValueError(
            f"factors={factors!r}: this model normalises keys after their projection, so that the "
            "projection does not say which channels they need; expected 'pca' or 'trained'"
        )


def statistics_of(model: Any, batches: Iterable[Array]) -> dict[str, np.ndarray]:
    """What all factors are found from, summed over batches; see `_statistics`."""
    seen = None
    for tokens in batches:
        more = jax.device_get(_statistics(model, jnp.asarray(tokens)))
        seen = more if seen is None else jax.tree.map(np.add, seen, more)
    if seen is None:
        raise ValueError("batches: expected at least one batch of tokens")
    return seen


def factors_of(
    model: Any,
    seen: dict[str, np.ndarray] | None,
    *,
    key_density: float,
    value_density: float,
    factors: str,
    alpha: float = 0.5,
    called: str | None = None,
    **_: Any,
) -> dict[str, Array]:
    """Factors by name: down [L, 1, 1, H D, H r], up [L, 1, 1, H r, H D], offset [L, 1, 1, H D].

    Args:
      seen: of `statistics_of`; None for "svd".
      key_density, value_density: as of `kvjax.compress.cskv`. factors: "svd", "asvd" or "pca".
      alpha: power of the mean magnitudes of the layer's input by which "asvd" weighs them.
      called: the kind of factors that the names are to say; None: as found.
    """
    refuse(model, factors)
    config, layers = model.config, model.layers
    called = names(factors if called is None else called)
    found: dict[str, list[np.ndarray]] = {f"{name}_{p}": [] for name in called for p in PARTS}
    for side, name, part, weight, bias in (
        ("k", called[0], key_density, layers.k, layers.k_bias),
        ("v", called[1], value_density, layers.v, layers.v_bias),
    ):
        rank = int(part * config.head_dim + 1e-9) * config.kv_heads
        for layer in range(len(weight[...])):
            w = np.asarray(weight[...][layer], np.float64).T
            offset = np.zeros(w.shape[1])
            # With k = norm(h W + b) the bias is no longer an offset of k.
            if bias is not None and not (side == "k" and config.qk_norm):
                offset = np.asarray(bias[...][layer], np.float64)
            if factors == "pca":
                count, mean, square = (seen[n][layer] for n in ("count", side, f"{side}{side}"))
                w = root(square, mean, count, offset)
            elif factors == "asvd":
                magnitude = np.asarray(seen["input"][layer], np.float64)
                w = (magnitude + 1e-6)[:, None] ** alpha * w
            for part_name, x in zip(("down", "up"), factorised(w, rank)):
                found[f"{name}_{part_name}"].append(x)
            found[f"{name}_offset"].append(offset)
    return {n: jnp.asarray(np.stack(x)[:, None, None], jnp.float32) for n, x in found.items()}


def factorised(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(E [C, r], B [r, C]), W E B the best approximation of w [n, C] of rank r.

    With w = U S V^T: E = V_r S_r^(-1/2), B = S_r^(1/2) V_r^T; so w E = U_r S_r^(1/2). A scaled
    w = diag(s) W gives the weighted factorisation of W: W E = diag(s)^-1 U_r S_r^(1/2).

    >>> w = np.diag([4.0, 1.0])
    >>> [abs(x).round(3).tolist() for x in factorised(w, 1)]
    [[[0.5], [0.0]], [[2.0, 0.0]]]
    """
    _, size, vt = np.linalg.svd(w, full_matrices=False)
    # Directions that w does not have are stored as zeros.
    size = np.where(size > 1e-7 * max(size[0], 1e-30), size, 0.0)[:rank] ** 0.5
    down = vt[:rank].T * np.where(size > 0, 1 / np.where(size > 0, size, 1.0), 0.0)
    up = size[:, None] * vt[:rank]
    short = rank - len(size)
    return np.pad(down, ((0, 0), (0, short))), np.pad(up, ((0, short), (0, 0)))


def root(square: Any, mean: Any, count: Any, offset: np.ndarray) -> np.ndarray:
    """A matrix with the second moments of the tokens' channels less `offset`, [C, C].

    Args:
      square: sum of x x^T. mean: sum of x. count: tokens.
    """
    count = float(count)
    second = np.asarray(square, np.float64) / count
    cross = np.outer(np.asarray(mean, np.float64) / count, offset)
    values, vectors = np.linalg.eigh(second - cross - cross.T + np.outer(offset, offset))
    return np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T


@jax.jit
def _statistics(model: Any, tokens: Array) -> dict[str, Array]:
    """Sums over a batch, float32, by attention layer: tokens [L], mean magnitudes of each row's
    layer inputs [L, D], keys and values and their products [L, C], [L, C, C]."""
    config = model.config
    at = config.attention_layers
    _, new = forward(model, tokens, positions_of(tokens), phase="prefill", logits="none", hidden=at)
    found = {"count": jnp.full((len(at),), float(tokens.size))}
    read = [
        rms_norm(new.hidden[i], model.layers.attention_norm[...][n], config)
        for n, i in enumerate(at)
    ]
    found["input"] = jnp.stack([jnp.sum(jnp.mean(jnp.abs(x), 1), 0) for x in read])
    for side, x in (("k", new.kv.k), ("v", new.kv.v)):
        x = join(x)[:, :, 0].astype(jnp.float32)
        found[side] = jnp.sum(x, (1, 2))
        found[side * 2] = jnp.einsum("lbtc,lbtd->lcd", x, x, precision="highest")
    return found


def _program(factors: str, **_: Any) -> str | None:
    return {"svd": None, "trained": PROGRAM}.get(factors, "experiments.calibrate")


def _names(factors: str, **_: Any) -> tuple[str, ...]:
    return tuple(f"{name}_{part}" for name in names(factors) for part in PARTS)


cskv = calibration(method, _names, constants_of, _program)
