"""A tiny model, one jitted run of prompt and decoding, and a look into what a cache holds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import commit, finish, init_cache
from kvjax.codecs import AcrossHeads, MergeHeads, PerKV
from kvjax.compress import parse
from kvjax.decode import replay
from kvjax.models import llama
from kvjax.models.config import Config
from kvjax.models.decoder import forward

CONFIG = Config(50, 32, 48, 2, 4, 2, 8)
PROMPT, STEPS = 24, 8
LENGTHS = (24, 17, 11)
TRACES: list[str] = []


@functools.cache
def model():
    return llama.init(CONFIG, jax.random.key(0))


@functools.cache
def rows() -> np.ndarray:
    """Embeddings [3, PROMPT + STEPS, width] of three sequences."""
    tokens = np.random.default_rng(1).integers(0, 50, (3, PROMPT + STEPS))
    return np.asarray(model().embed[...])[tokens] * 3.0


@jax.jit
def run(model, cache, x, pos, tail, tail_pos):
    """Prompt, finish, then one token after the other: logits [B, 1 + STEPS, V] and the cache."""
    TRACES.append("run")
    marks = cache.transforms[0].token_marks
    ends = lambda pos: {m.name: (pos % 5 == 4).astype(jnp.float32) for m in marks}  # noqa: E731
    first, new = forward(
        model, None, pos, cache, phase="prefill", embeddings=x, logits="last", columns=ends(pos)
    )
    cache = commit(cache, new, phase="prefill")
    cache = finish(replay(model, cache, None, pos, embeddings=x) if cache.replays else cache)

    def step(cache, xs):
        x, pos = xs
        pos = pos[:, None]
        logits, new = forward(model, None, pos, cache, embeddings=x[:, None], columns=ends(pos))
        return commit(cache, new), logits[:, 0]

    cache, rest = jax.lax.scan(step, cache, (jnp.moveaxis(tail, 1, 0), tail_pos.T))
    return jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], 1), cache


@jax.jit
def plain(model, x, pos):
    """Logits without any cache."""
    return forward(model, None, pos, phase="prefill", embeddings=x)[0]


def inputs(lengths=LENGTHS, order=(0, 1, 2), left=False, fill=0.0):
    """(x, pos, tail, tail_pos): row i of the batch is sequence order[i], its first lengths[i]
    tokens as the prompt; -1: another sequence; padding filled with `fill`."""
    x = np.full((len(order), PROMPT, CONFIG.width), fill, np.float32)
    pos = np.full((len(order), PROMPT), -1, np.int32)
    tail = np.full((len(order), STEPS, CONFIG.width), fill, np.float32)
    tail_pos = np.full((len(order), STEPS), -1, np.int32)
    for i, (row, length) in enumerate(zip(order, lengths)):
        whole = rows()[row]
        at = slice(PROMPT - length, PROMPT) if left else slice(0, length)
        x[i, at], pos[i, at] = whole[:length], np.arange(length)
        if length:
            tail[i] = whole[length : length + STEPS]
            tail_pos[i] = length + np.arange(STEPS)
    return x, pos, tail, tail_pos


def cache_of(text: str, batch: int = 3):
    chain = parse(text)[0][1]
    given = plain_constants(chain, CONFIG)
    return init_cache(CONFIG, chain, batch, PROMPT + STEPS, prompt=PROMPT, constants=given)


def plain_constants(chain, config) -> dict:
    """Constants by which a calibrated method works, though not well, as its codecs ask for them."""
    lists = (name for mark in chain.token_marks for name in mark.constants)
    found = {name: jnp.zeros((1, config.vocab_size), bool) for name in lists}
    for stage in chain.stages:
        stage = getattr(stage, "inner", stage)
        for name in getattr(getattr(stage, "reader", None), "constants", ()):  # orders of channels
            x = jnp.tile(jnp.arange(config.head_dim, dtype=jnp.int32)[::-1], (config.heads, 1))
            found[name] = jnp.broadcast_to(x, (config.layers, 1, *x.shape))
        pair = getattr(stage, "codec", None)
        for codec in (pair.k, pair.v) if isinstance(pair, PerKV) else ():
            wide = isinstance(codec, AcrossHeads)
            codec = codec.codec if wide else codec
            heads, width = config.kv_heads, config.head_dim
            for name, spec in codec.constants_spec(heads * width if wide else width).items():
                if isinstance(codec, MergeHeads):
                    group, rank = codec.sizes(heads, width)
                    x = np.random.default_rng(len(name)).standard_normal((group * width,) * 2)
                    x = np.linalg.qr(x)[0][:, :rank].reshape(group, width, rank)
                    x = jnp.asarray(np.tile(x, (heads // group, 1, 1))[None], jnp.float32)
                elif "order" in name:
                    x = jnp.arange(heads * width, dtype=jnp.int32)[::-1].reshape(1, heads, width)
                elif name.endswith(("_down", "_up")):
                    x = jnp.eye(*(heads * n for n in spec.shape))[None, None]
                elif name.endswith("_offset"):
                    x = jnp.zeros((1, 1, heads * width))
                elif name.endswith(("_centre", "_range")):
                    x = jnp.full((1, 1, *spec.shape), float("range" in name))
                elif name == "balance":
                    continue
                else:
                    x = jnp.linspace(-1.0, 1.0, spec.shape[0]).reshape(1, 1, -1)
                found[name] = jnp.broadcast_to(x, (config.layers, *x.shape))
    return found


def go(text: str, *args, **kwargs):
    given = inputs(*args, **kwargs)
    return run(model(), cache_of(text, given[0].shape[0]), *given)


@functools.cache
def base(text: str):
    """The run that all others are compared with."""
    logits, cache = go(text)
    return np.asarray(logits), cache


def held(cache) -> list[list[list[list[int]]]]:
    """Positions held, sorted: [layer][row][head], over all stages."""
    layers, batch, heads = CONFIG.layers, cache.length.shape[0], CONFIG.kv_heads
    out = [[[[] for _ in range(heads)] for _ in range(batch)] for _ in range(layers)]
    for own in cache.state[0]:
        if own is None or not hasattr(own, "seen"):
            continue
        for l, b, h in np.ndindex(layers, batch, heads):
            pos = np.asarray(own.kv.pos if hasattr(own, "kv") else own.pos)
            if pos.ndim == 1:  # a pool
                start = int(own.place.address[l, b, h])
                pos = pos[start : start + int(own.seen[l, b, h])]
            else:
                pos = pos[l % pos.shape[0], b, h % pos.shape[2]]
            out[l][b][h] += [int(p) for p in pos if p >= 0]
    return [[[sorted(h) for h in b] for b in l] for l in out]
