"""Rows of a batch do not know of each other, and padding is never felt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    Window,
    accumulated_attention,
    adaptive,
    chain,
    first,
    heavy,
    prune,
    recent,
    store,
    window_attention,
)
from kvjax.codecs import per_kv, quantize
from tests.cache.harness import BATCH, LAYERS, close, done, empty, part, rows, step

PROMPT, DECODE = 16, 6
kivi = per_kv(k=quantize(2, axis="channel", group=8), v=quantize(4))
CHAINS = {
    "h2o": chain(first(1), recent(3, release=2), heavy(4, accumulated_attention())),
    "kivi": chain(recent(2), store(kivi, keys=Window(0, 8), values=Window(3, 1))),
    "ada": chain(prune(6, window_attention(3), budget=adaptive(0.3, 3)), store(quantize(8))),
}


def run(transform, r):
    """The prompt in one piece (rows of one chunk see each other exactly, earlier ones coded: a
    chain that streams depends on where chunks end, so on where padding stands), then decoding."""
    cache = empty(transform, PROMPT + DECODE, PROMPT)
    out, cache = step(cache, part(r, 0, PROMPT), "prefill")
    outs, cache = [np.asarray(out)], done(cache)
    for at in range(PROMPT, PROMPT + DECODE):
        out, cache = step(cache, part(r, at, at + 1))
        outs.append(np.asarray(out))
    return np.concatenate(outs, 3), cache


def batch(seeds, lengths, places):
    """Rows of their own seed and length, the prompt's tokens at their own places; padding NaN."""
    pos = np.full((BATCH, PROMPT + DECODE), -1)
    for b in range(BATCH):
        pos[b, places[b][: lengths[b]]] = np.arange(lengths[b])
        pos[b, PROMPT:] = lengths[b] + np.arange(DECODE)
    out = {"pos": pos.astype(np.int32)}
    streams = [rows(seed, PROMPT + DECODE, batch=1) for seed in seeds]
    there = (pos >= 0)[None, :, None, :, None]
    for name in ("q", "k", "v"):
        each = [s[name][:, :, :, np.maximum(pos[b], 0)] for b, s in enumerate(streams)]
        x = np.concatenate(each, 1)
        out[name] = np.where(there, x, np.nan).astype(np.float32)
    return out


def by_token(out, pos, b):
    """Outputs of row b, one per token, in order of position."""
    return out[:, b][:, :, np.argsort(pos[b], kind="stable")][:, :, (pos[b] < 0).sum() :]


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["left", "right", "holes"]))
def test_a_row_does_not_depend_on_the_others(name, seed, padding):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, PROMPT + 1, BATCH)
    places = []
    for n in lengths:
        start = {"left": PROMPT - n, "right": 0}.get(padding)
        where = np.arange(n) + start if start is not None else draw.choice(PROMPT, n, replace=False)
        places.append(np.sort(where))
    seeds = [seed, seed + 1]
    r = batch(seeds, lengths, places)
    out, cache = run(CHAINS[name], r)
    for b in range(BATCH):
        # The same row beside another that is full, at another place in the batch, unpadded.
        other = batch(
            [seed + 7, seeds[b]], [PROMPT, lengths[b]], [np.arange(PROMPT), np.arange(lengths[b])]
        )
        alone, _ = run(CHAINS[name], other)
        got, want = by_token(out, r["pos"], b), by_token(alone, other["pos"], 1)
        close(got[:, None], want[:, None], np.zeros((1, got.shape[2])), 1e-5)
    slots_are_true(cache, r)


def slots_are_true(cache, r):
    """Every row and head holds at least one token, no token twice, and none that never came."""
    held = [
        np.asarray(x)
        for own in cache.state[0]
        for x in ([own.kv.pos] if hasattr(own, "kv") else [own.pos] if hasattr(own, "seen") else [])
    ]
    if any(x.ndim != 4 for x in held):
        return  # a pool: see test_pool
    pos = np.concatenate([np.broadcast_to(x, (LAYERS, BATCH, 2, x.shape[3])) for x in held], 3)
    for layer, b, head in np.ndindex(LAYERS, BATCH, 2):
        mine = pos[layer, b, head]
        mine = mine[mine >= 0]
        assert len(mine) >= 1 and len(set(mine)) == len(mine)
        assert mine.max() == r["pos"][b].max()


def test_swapping_rows_swaps_everything():
    places = [np.arange(PROMPT), np.arange(5) * 2]
    r = batch([1, 2], [PROMPT, 5], places)
    swapped = {n: x[::-1] if n == "pos" else x[:, ::-1] for n, x in r.items()}
    for transform in CHAINS.values():
        a, b = run(transform, r)[0], run(transform, swapped)[0]
        close(a, b[:, ::-1], r["pos"], 1e-6)
