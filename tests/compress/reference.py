"""Plain NumPy statements of what the methods do, and the random stream that both sides see.

Nothing here calls kvjax except `ours`, which feeds the same stream to a cache.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import (
    KV,
    New,
    Observation,
    Query,
    attend,
    commit,
    finish,
    init_cache,
    rotate,
    start,
)
from kvjax.compress import parse
from kvjax.models.config import Config

L, B, HQ, H, D, W = 2, 2, 4, 2, 8, 4
T, LENGTHS, STEPS = 24, (24, 17), 12
G = HQ // H
CONFIG = Config(10, 32, 32, L, HQ, H, D)


def turn(x, pos):
    """Rotary embedding of x [..., T, D] at pos [T], halves paired, base 10000."""
    freq = 10000.0 ** (-2.0 * np.arange(D // 2) / D)
    c, s = np.cos(np.outer(pos, freq)), np.sin(np.outer(pos, freq))
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@functools.cache
def stream(seed=0):
    """Raw (before rotation) q [L, B, HQ, N, D] with the 1/sqrt(D) in it, k, v [L, B, H, N, D]."""
    rng = np.random.default_rng(seed)
    n = T + STEPS
    q, k, v = (rng.standard_normal((L, B, h, n, D)) for h in (HQ, H, H))
    k[..., 1] *= 6.0  # a channel that is large for all tokens, as in trained models
    q = q * 1.5 + rng.standard_normal((L, B, HQ, 1, D))
    return tuple(x.astype(np.float32) for x in (q / np.sqrt(D), k, v))


@dataclasses.dataclass
class Row:
    """One layer of one sequence, rotated: q [HQ, N, D], k, v [H, N, D]; prompt length n."""

    q: np.ndarray
    raw: np.ndarray
    k: np.ndarray
    v: np.ndarray
    n: int
    layer: int = 0
    batch: int = 0
    plain: np.ndarray | None = None  # k before rotation

    @functools.cached_property
    def attention(self):
        """Causal attention among the prompt's rows [HQ, n, n]."""
        n = self.n
        s = np.einsum("hid,hjd->hij", self.q[:, :n], np.repeat(self.k[:, :n], G, 0))
        return softmax(np.where(np.tril(np.ones((n, n), bool)), s, -np.inf))


def row(l, b, seed=0):
    q, k, v = (x[l, b].astype(np.float64) for x in stream(seed))
    pos = np.arange(T + STEPS)
    return Row(turn(q, pos), q, turn(k, pos), v, LENGTHS[b], l, b, k)


def by_group(x):
    """Mean over the query heads of each KV head: [HQ, ...] -> [H, ...]."""
    return x.reshape(H, G, *x.shape[1:]).mean(1)


def top(score, n):
    """Positions of the n largest, sorted."""
    return sorted(int(i) for i in np.argsort(-score, kind="stable")[:n])


# --- policies: the positions kept of a prompt, per KV head ---


def snapkv_vote(row, window=W, kernel=3, pool="mean"):
    """[H, n - window]."""
    a = row.attention[:, row.n - window :, : row.n - window].sum(1)
    a = by_group(a)
    padded = np.pad(a, ((0, 0), (kernel // 2,) * 2))
    views = np.lib.stride_tricks.sliding_window_view(padded, kernel, 1)
    return views.mean(-1) if pool == "mean" else views.max(-1)


def with_window(row, vote, counts, window=W):
    late = list(range(row.n - window, row.n))
    return [top(vote[h], counts[h]) + late for h in range(H)]


def expected_score(row, future, sinks, epsilon=0.0):
    n = row.n
    q = row.raw[:, sinks:n]
    mu = q.mean(1)
    sigma = np.stack([np.cov(x.T, bias=True) for x in q])
    eye = np.eye(D)
    mean_turn = np.mean([turn(eye, np.full(D, p)).T for p in range(n, n + future)], 0)
    mu = mu @ mean_turn.T
    sigma = mean_turn @ sigma @ mean_turn.T
    k = np.repeat(row.k[:, sinks:n], G, 0)
    z = np.einsum("htd,hd->ht", k, mu) + 0.5 * np.einsum("htd,hde,hte->ht", k, sigma, k)
    return (by_group(softmax(z)) + epsilon) * np.linalg.norm(row.v[:, sinks:n], axis=-1)


def keydiff_score(row):
    k = row.k[:, : row.n]
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    anchor = unit.mean(1, keepdims=True)
    return -(unit * anchor).sum(-1) / np.linalg.norm(anchor, axis=-1)


# --- codes ---


def affine(x, bits, axis, vectors=None):
    """Min-max codes along `axis`, scale and min in float16."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    s = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
    m = low.astype(np.float16).astype(np.float64)
    c = np.round(np.clip((x - m) / np.where(s > 0, s, 1), 0, 2**bits - 1))
    return c * s + m


def per_channel(x, bits, group):
    """x [H, n, D], groups of tokens."""
    h, n, d = x.shape
    return affine(x.reshape(h, n // group, group, d), bits, 2).reshape(h, n, d)


def per_token(x, bits, group):
    """x [H, n, D], groups of channels."""
    return affine(x.reshape(*x.shape[:2], -1, group), bits, 3).reshape(x.shape)


# --- our side ---


@jax.jit
def _ingest(cache, new):
    return finish(commit(cache, new, phase="prefill"))


@jax.jit
def _step(cache, new):
    return commit(cache, new)


@jax.jit
def _probe(cache, raw, pos):
    def layer(l):
        rope, span = cache.constants["rope"][l], cache.constants["span"][l]
        q = rotate(raw[l], pos[:, None], rope)
        query = Query(q, raw[l], pos, rope, span, cache.constants, jnp.zeros((B,), jnp.int32))
        return attend(cache, jnp.asarray(l), query, start(cache, query.pos))[0]

    parts = [layer(l) for l in range(L)]
    return jnp.stack([p.out for p in parts]), jnp.stack([p.lse for p in parts])


def new_rows(at, top, total, extra=None):
    """The rows at positions `at` [B, M] (-1: none), with their softmax's max and sum.

    `extra`: columns, [L, B, N] over all positions.
    """
    take = np.maximum(at, 0)[None, :, None, :, None]
    q, k, v = (np.take_along_axis(x, take, 3) for x in stream())
    turned = np.stack(
        [np.stack([turn(q[l, b], np.maximum(at[b], 0)) for b in range(B)]) for l in range(L)]
    )
    pos = jnp.asarray(at, jnp.int32)
    blank = lambda x: jnp.asarray(np.where((at >= 0)[None, :, None, :, None], x, 0), jnp.float32)  # noqa: E731
    seen = Observation(
        blank(turned), jnp.asarray(top, jnp.float32), jnp.asarray(total, jnp.float32),
        pos, jnp.full((L,), 10**6),
    )  # fmt: skip
    columns = {
        name: jnp.asarray(
            np.take_along_axis(x, np.maximum(at, 0)[None], 2)[:, :, None], jnp.float32
        )
        * jnp.ones((1, 1, H, 1))
        for name, x in (extra or {}).items()
    }
    return New(KV(blank(k), blank(v), pos[None, :, None], columns), seen)


def prompt_rows():
    """Positions of all prompt rows [B, T], and their softmax's max and sum [L, B, HQ, T]."""
    at = np.stack([np.where(np.arange(T) < n, np.arange(T), -1) for n in LENGTHS])
    top_ = np.zeros((L, B, HQ, T))
    total = np.ones((L, B, HQ, T))
    for l, b in np.ndindex(L, B):
        r = row(l, b)
        s = np.einsum("hid,hjd->hij", r.q[:, : r.n], np.repeat(r.k[:, : r.n], G, 0))
        s = np.where(np.tril(np.ones((r.n, r.n), bool)), s, -np.inf)
        top_[l, b, :, : r.n] = s.max(-1)
        total[l, b, :, : r.n] = np.exp(s - s.max(-1, keepdims=True)).sum(-1)
    return at, top_, total


def ours(text):
    """A cache of the method `text` that holds the prompts."""
    return ours_chain(parse(text)[0][1])


def ours_chain(chain, max_length=T + STEPS, constants=None, extra=None):
    """A cache that holds the prompts."""
    cache = init_cache(CONFIG, chain, B, max_length, prompt=T, constants=constants)
    return _ingest(cache, new_rows(*prompt_rows(), extra))


def advance(cache, i, logits):
    """Commits each row's token i after its prompt; logits[l][b]: HQ arrays over all it saw."""
    at = np.asarray([[n + i] for n in LENGTHS])
    top_, total = np.zeros((L, B, HQ, 1)), np.ones((L, B, HQ, 1))
    for l, b, h in np.ndindex(L, B, HQ):
        s = logits[l][b][h]
        top_[l, b, h], total[l, b, h] = s.max(), np.exp(s - s.max()).sum()
    return _step(cache, new_rows(at, top_, total))


def agree(cache, held, step=0, positions=None, bias=None):
    """What the next query reads of our cache is attention over held(l, b) -> K, V per KV head.

    `bias`: (l, b, head) -> what is added to the logits.
    """
    rng = np.random.default_rng(7)
    raw = rng.standard_normal((L, B, HQ, 1, D))
    pos = np.asarray([[n + step] for n in LENGTHS])
    out, lse = _probe(cache, jnp.asarray(raw, jnp.float32), jnp.asarray(pos, jnp.int32))
    for l, b, h in np.ndindex(L, B, HQ):
        k, v = held(l, b)[h // G]
        at = pos[b] if positions is None else positions(l, b)
        s = turn(raw[l, b, h], at) @ k.T + (0.0 if bias is None else bias(l, b, h // G))
        np.testing.assert_allclose(out[l, b, h, 0], (softmax(s) @ v)[0], atol=2e-5, rtol=2e-5)
        want = np.log(np.exp(s - s.max()).sum()) + s.max()
        np.testing.assert_allclose(lse[l, b, h, 0], want, atol=2e-5, rtol=2e-5)
