"""The Llama family in plain NumPy, float64, one row, no cache: what the parameters mean."""

from __future__ import annotations

import numpy as np

from kvjax.models.config import Config


def forward(config: Config, flat: dict, tokens: np.ndarray, length: int) -> np.ndarray:
    """Logits [T, V] of token ids [T]; `flat` maps names to arrays, as `llama.flatten` gives."""
    c = config
    p = {name: np.asarray(value, np.float64) for name, value in flat.items()}
    x = p["embed"][tokens] * (c.embed_scale or 1.0)
    for layer in range(c.layers):
        w = {k.removeprefix("layers."): v[layer] for k, v in p.items() if k.startswith("layers.")}
        h = _attention(c, w, layer, _norm(c, x, w["attention_norm"]), length)
        x = x + (_norm(c, h, w["post_attention_norm"]) if c.post_norms else h)
        h = _norm(c, x, w["mlp_norm"])
        gate, up = h @ w["gate"].T + w.get("gate_bias", 0), h @ w["up"].T + w.get("up_bias", 0)
        if c.activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
        h = (gate * up) @ w["down"].T + w.get("down_bias", 0)
        x = x + (_norm(c, h, w["post_mlp_norm"]) if c.post_norms else h)
    head = (p["embed"] if c.tied else p["head"]).T
    return _softcap(_norm(c, x, p["norm"]) @ head, c.final_softcap)


def _norm(c: Config, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    scale = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
    return x * scale * (weight + c.norm_offset)


def _softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def _attention(c: Config, w: dict, layer: int, x: np.ndarray, length: int) -> np.ndarray:
    time, window = len(x), c.window(layer)
    q = (x @ w["q"].T + w.get("q_bias", 0)).reshape(time, c.heads, c.head_dim)
    k = (x @ w["k"].T + w.get("k_bias", 0)).reshape(time, c.kv_heads, c.head_dim)
    v = (x @ w["v"].T + w.get("v_bias", 0)).reshape(time, c.kv_heads, c.head_dim)
    if c.qk_norm:
        q, k = _norm(c, q, w["q_norm"]), _norm(c, k, w["k_norm"])
    rope = c.local_rope if c.local_rope is not None and window is not None else c.rope
    frequencies, factor = rope.frequencies(c.rotated, c.max_length, length)
    angles = np.arange(time)[:, None, None] * frequencies
    cos, sin, half = factor * np.cos(angles), factor * np.sin(angles), c.rotated // 2

    def rotate(u: np.ndarray) -> np.ndarray:
        a, b, rest = u[..., :half], u[..., half : 2 * half], u[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    k, v = (np.repeat(u, c.groups, 1) for u in (rotate(k), v))
    scores = _softcap(np.einsum("qhd,khd->hqk", rotate(q), k) * c.scale, c.attention_softcap)
    distance = np.arange(time)[:, None] - np.arange(time)
    seen = ((distance >= 0) | c.bidirectional) & (distance < (window or time))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, v).reshape(time, -1)
    return out @ w["o"].T + w.get("o_bias", 0)
