"""The tiny model in plain NumPy, layer by layer, with attention as a function of the caller's."""

from __future__ import annotations

import numpy as np

from tests.compress.harness import CONFIG, model
from tests.compress.reference import softmax


def turn(x, pos):
    """Rotary embedding of x [..., T, D] at pos [T], halves paired."""
    half = x.shape[-1] // 2
    freq = CONFIG.rope.base ** (-np.arange(half) / half)
    c, s = np.cos(np.outer(pos, freq)), np.sin(np.outer(pos, freq))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.norm_eps) * weight


def run(x, pos, attention):
    """Logits [n, V] of embeddings x [n, width] at positions pos.

    attention(layer, q [Hq, n, D], k [H, n, D], v [H, n, D]) -> [Hq, n, D]: q scaled, both rotated.
    """
    m, layers = model(), model().layers
    get = lambda name, l: np.asarray(getattr(layers, name)[...][l], np.float64)  # noqa: E731
    x = np.asarray(x, np.float64)
    for l in range(CONFIG.layers):
        h = norm(x, get("attention_norm", l))
        split = lambda y, n: np.moveaxis(y.reshape(len(y), n, -1), 1, 0)  # noqa: E731
        q = split(h @ get("q", l).T, CONFIG.heads) / np.sqrt(CONFIG.head_dim)
        k, v = (split(h @ get(name, l).T, CONFIG.kv_heads) for name in "kv")
        out = attention(l, turn(q, pos), turn(k, pos), v)
        x = x + np.moveaxis(out, 0, 1).reshape(len(x), -1) @ get("o", l).T
        h = norm(x, get("mlp_norm", l))
        gate = h @ get("gate", l).T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ get("up", l).T)) @ get("down", l).T
    weight = m.embed if m.head is None else m.head
    return norm(x, np.asarray(m.norm[...])) @ np.asarray(weight[...], np.float64).T


def probabilities(q, k, seen=None):
    """Softmax of all rows over the keys that they see, [Hq, n, n]; `seen` bool [n, n] narrows the
    causal order. A row that sees nothing has zeros."""
    n = q.shape[1]
    see = np.tril(np.ones((n, n), bool)) & (True if seen is None else seen)
    s = np.einsum("hid,hjd->hij", q, np.repeat(k, len(q) // len(k), 0))
    s = np.where(see, s, -np.inf)
    none = ~see.any(-1)
    s[:, none] = 0
    return np.where(see & ~none[:, None], softmax(s), 0)


def mix(p, v):
    return p @ np.repeat(v, len(p) // len(v), 0)
