"""A model without weights: random queries, keys and values that attend through a cache.

`step` is one forward pass and commit on such rows, and gives every layer's attention output, so
that laws are stated where they hold, not behind a network. `dense` says in float64 what it should
be. Everything is jitted at module level, on few shapes: compiling is what tests here spend.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import (
    KV,
    Cache,
    New,
    Observation,
    Query,
    attend,
    attend_new,
    commit,
    finish,
    init_cache,
    merge,
    rotate,
    start,
)
from kvjax.models.config import Config

LAYERS, BATCH, HEADS, KV_HEADS, WIDTH = 2, 2, 4, 2, 8
CONFIG = Config(29, 16, 16, LAYERS, HEADS, KV_HEADS, WIDTH)


def rows(seed: int, tokens: int, pos: Any = None, batch: int = BATCH) -> dict[str, np.ndarray]:
    """Random rows: q (scaled) [L, B, Hq, T, D], k, v [L, B, H, T, D], before rotation; pos [B, T].

    Padding holds NaN.
    """
    draw = np.random.default_rng(seed)
    if pos is None:
        pos = np.broadcast_to(np.arange(tokens), (batch, tokens))
    pos = np.asarray(pos, np.int32)
    out = {"pos": pos}
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        x = draw.normal(size=(LAYERS, batch, heads, tokens, WIDTH)).astype(np.float32)
        out[name] = np.where((pos >= 0)[None, :, None, :, None], x, np.nan).astype(np.float32)
    return out


def cut(r: dict, index: np.ndarray) -> dict:
    """Rows at `index` [B, K] of every row of the batch, -1 for padding."""
    at = np.maximum(index, 0)
    none = index < 0
    out = {"pos": np.where(none, -1, np.take_along_axis(r["pos"], at, 1)).astype(np.int32)}
    for name in ("q", "k", "v"):
        x = np.take_along_axis(r[name], at[None, :, None, :, None], 3)
        out[name] = np.where(none[None, :, None, :, None], np.float32(np.nan), x)
    return out


def part(r: dict, start: int, stop: int) -> dict:
    """Rows start to stop of all."""
    return {n: x[:, start:stop] if n == "pos" else x[:, :, :, start:stop] for n, x in r.items()}


def _look(cache: Cache, r: dict, mask: Any = "causal", config: Config = CONFIG) -> tuple:
    """(attention outputs [L, B, Hq, T, D], new): what `forward` does, without its weights."""
    pos = jnp.asarray(r["pos"])
    there = (pos >= 0)[:, None, :, None]
    rope, span = cache.constants["rope"], cache.constants["span"]
    windowed = any(w is not None for w in config.windows)

    def layer(carry: Any, xs: Any) -> tuple:
        index, q, k, v, rope, span = xs
        q, k, v = (jnp.where(there, x, 0.0) for x in (q, k, v))
        turned, keys = rotate(q, pos[:, None], rope), rotate(k, pos[:, None], rope)
        query = Query(
            turned, q, pos, rope, span, cache.constants, jnp.zeros((pos.shape[0],), jnp.int32),
            config.attention_softcap, windowed,
        )  # fmt: skip
        held, carry = attend(cache, index, query, carry)
        done = merge(attend_new(query, keys, v, mask), held)
        return carry, (done.out, turned, done.max, done.sum)

    carry = start(cache, pos)
    each = (jnp.arange(LAYERS), r["q"], r["k"], r["v"], rope, span)
    _, (out, turned, top, total) = jax.lax.scan(layer, carry, each)
    kv = KV(jnp.asarray(r["k"]), jnp.asarray(r["v"]), pos[None, :, None])
    # What stands in padding rows must not be felt by a commit.
    turned, top, total = (
        jnp.where(there if x.ndim == 5 else there[..., 0], x, jnp.nan) for x in (turned, top, total)
    )
    return out, New(kv, Observation(turned, top, total, pos, span))


look = jax.jit(_look, static_argnames="config")
take = jax.jit(commit, static_argnames="phase")
done = jax.jit(finish)


@functools.partial(jax.jit, static_argnames=("phase", "config"))
def step(cache: Cache, r: dict, phase: str = "decode", config: Config = CONFIG) -> tuple:
    """One forward pass and the commit of all its rows: (outputs, cache)."""
    out, new = _look(cache, r, config=config)
    return out, commit(cache, new, phase=phase)


def empty(transform: Any, length: int, prompt: int = 0, config: Config = CONFIG, **how) -> Cache:
    return init_cache(config, transform, how.pop("batch", BATCH), length, prompt, **how)


def run(
    transform: Any, r: dict, prompt: int, chunk: int, config: Config = CONFIG, **how: Any
) -> tuple[np.ndarray, Cache]:
    """Prompt in chunks, finish, then row by row: (outputs [L, B, Hq, T, D], cache)."""
    total = r["pos"].shape[1]
    cache = empty(transform, total, prompt, config, **how)
    outs = []
    for first in range(0, prompt, chunk):
        out, cache = step(cache, part(r, first, first + chunk), "prefill", config)
        outs.append(out)
    cache = done(cache)
    for first in range(prompt, total):
        out, cache = step(cache, part(r, first, first + 1), "decode", config)
        outs.append(out)
    return np.concatenate([np.asarray(o) for o in outs], 3), cache


def turn(x: np.ndarray, pos: np.ndarray, config: Config = CONFIG) -> np.ndarray:
    """Rotates [..., T, D] at positions [..., T] in float64."""
    freq, _ = config.rope.frequencies(config.rotated, config.max_length, config.max_length)
    angle = pos[..., None] * freq
    half = freq.size
    a, b = x[..., :half].astype(np.float64), x[..., half : 2 * half].astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def dense(
    r: dict, config: Config = CONFIG, keep: np.ndarray | None = None, bias: Any = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of all rows in float64: (outputs [L, B, Hq, T, D], probabilities [.., T, T]).

    Args:
      keep: bool [L, B, H, T, T] (row, key) narrows what is seen. bias: added to the logits.
    """
    pos = r["pos"]
    valid = pos >= 0
    clean = {n: np.nan_to_num(x).astype(np.float64) for n, x in r.items() if n != "pos"}
    q, k = (turn(clean[n], pos[None, :, None], config) for n in ("q", "k"))
    k, v = (np.repeat(x, HEADS // KV_HEADS, 2) for x in (k, clean["v"]))
    logits = q @ np.swapaxes(k, -1, -2)
    if config.attention_softcap:
        logits = config.attention_softcap * np.tanh(logits / config.attention_softcap)
    logits = logits + bias
    ok = valid[:, None, :] & (pos[:, None, :] <= pos[:, :, None])
    ok = np.broadcast_to(ok[None, :, None], logits.shape).copy()
    for layer in range(LAYERS):
        if config.window(layer):
            ok[layer] &= (pos[:, :, None] - pos[:, None, :] < config.window(layer))[:, None]
    if keep is not None:
        ok &= np.repeat(keep, HEADS // KV_HEADS, 2)
    logits = np.where(ok, logits, -np.inf)
    top = np.max(logits, -1, keepdims=True)
    p = np.exp(logits - np.where(np.isinf(top), 0, top))
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return p @ v, p


def close(out: Any, want: np.ndarray, pos: np.ndarray, within: float = 1e-5) -> None:
    """Outputs of valid rows agree to `within` of the largest value."""
    there = np.broadcast_to((pos >= 0)[None, :, None, :], out.shape[:4])
    out, want = np.asarray(out)[there], np.asarray(want)[there]
    assert np.isfinite(out).all()
    if not out.size:
        return
    error = np.abs(out - want).max() / np.abs(want).max()
    assert error <= within, f"relative error {error:.2e}"


def ragged_positions(seed: int, tokens: int, decode: int) -> np.ndarray:
    """Positions [B, tokens + decode]: the prompt part has holes, and rows differ in length."""
    draw = np.random.default_rng(seed)
    pos = np.full((BATCH, tokens + decode), -1)
    for b in range(BATCH):
        n = tokens if b == 0 else int(draw.integers(1, tokens))
        where = np.sort(draw.choice(tokens, n, replace=False))
        pos[b, where] = np.arange(n)
        pos[b, tokens:] = n + np.arange(decode)
    return pos
