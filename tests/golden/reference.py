"""The Llama family, Mamba-2 and hybrids in plain NumPy, float64, one row, no cache: what the
parameters mean."""

from __future__ import annotations

import numpy as np

from kvjax.models.config import Config


def forward(config: Config, flat: dict, tokens: np.ndarray, length: int) -> np.ndarray:
    """Logits [T, V] of token ids [T]; `flat` maps names to arrays, as `llama.flatten` gives."""
    c = config
    p = {name: np.asarray(value, np.float64) for name, value in flat.items()}
    x = p["embed"][tokens] * (c.embed_scale or 1.0)
    for layer in range(c.layers):
        recurs = layer in c.recurrent_layers
        prefix = "recurrent." if recurs else "layers."
        place = (c.recurrent_layers if recurs else c.attention_layers).index(layer)
        w = {k.removeprefix(prefix): v[place] for k, v in p.items() if k.startswith(prefix)}
        if recurs:
            x = x + _mamba2(c, w, _norm(c, x, w["mixer_norm"]))
        else:
            h = _attention(c, w, layer, _norm(c, x, w["attention_norm"]), length)
            x = x + (_norm(c, h, w["post_attention_norm"]) if c.post_norms else h)
        if not c.mlp_width:
            continue
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
    angles = np.arange(time)[:, None, None] * frequencies * (layer not in c.unrotated)
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


def _mamba2(c: Config, w: dict, x: np.ndarray) -> np.ndarray:
    """One Mamba-2 mixer, token by token: arXiv 2405.21060."""
    m, time = c.recurrence, len(x)
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    mixed = x @ w["project"].T + w.get("project_bias", 0)
    z, raw, dt = np.split(mixed, [m.inner, m.inner + m.channels], -1)
    raw = np.concatenate([np.zeros((m.kernel - 1, m.channels)), raw])
    wide = np.stack([(raw[t : t + m.kernel] * w["conv"].T).sum(0) for t in range(time)])
    wide = silu(wide + w.get("conv_bias", 0))
    cut = m.groups * m.state_size
    u, b, read = np.split(wide, [m.inner, m.inner + cut], -1)
    u = u.reshape(time, m.heads, m.head_dim)
    b, read = (
        np.repeat(a.reshape(time, m.groups, m.state_size), m.heads // m.groups, 1)
        for a in (b, read)
    )
    dt = np.clip(np.log1p(np.exp(dt + w["dt_bias"])), m.dt_min, m.dt_max)
    state, out = np.zeros((m.heads, m.head_dim, m.state_size)), []
    for t in range(time):
        decay = np.exp(-np.exp(w["A_log"]) * dt[t])[:, None, None]
        state = decay * state + dt[t][:, None, None] * u[t][..., None] * b[t][:, None]
        out.append((state * read[t][:, None]).sum(-1) + w["D"][:, None] * u[t])
    y = (np.stack(out).reshape(time, -1) * silu(z)).reshape(time, m.groups, -1)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + c.norm_eps)
    return (y.reshape(time, -1) * w["gated_norm"]) @ w["out"].T + w.get("out_bias", 0)
