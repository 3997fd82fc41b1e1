"""Blocks of tokens that one window of queries reads, chosen for all heads of a layer together; how
many of them each layer reads is settled from layer to layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import received
from kvjax.cache.buffer import FEW, after, put_rows
from kvjax.cache.readers.probe import WEIGHTS, Running, Weights, cosine, flatness, row_weights
from kvjax.cache.readers.reader import Reader
from kvjax.cache.ring import Window
from kvjax.cache.stage import Commit
from kvjax.cache.types import KV, Observation, Query, Spec, pytree, rotate


@pytree()
class Blocks:
    """Index of `best_blocks`.

    Attributes:
      keys: float32 [L, B, Hq, N, D], what stands for each block: a key before rotation.
      received: float32 [L, B, Hq, capacity], attention received by each token of the exact window.
      running: statistics of the queries so far.
      samples: float32 [L, B, 1, S], how flat the scores of the newest windows were.
      count: int32 [L, B, 1], windows sampled so far.
    """

    keys: Array
    received: Array
    running: Running
    samples: Array
    count: Array


@dataclasses.dataclass(frozen=True)
class BestBlocks(Reader):
    """See `best_blocks`; `pages` is the most that a layer may read."""

    window: int = 512
    blocks: int = 46
    least: int = 32
    tokens: int = 4
    weights: Weights = "activation"
    warmup: int = 100

    def __post_init__(self) -> None:
        for name in ("page", "window", "least", "tokens", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"best_blocks({name}={getattr(self, name)}): at least 1")
        if not self.least <= self.blocks <= self.pages:
            raise ValueError(
                f"best_blocks(blocks={self.blocks}, least={self.least}, most={self.pages}): "
                "expected least <= blocks <= most"
            )
        if self.tokens > self.page:
            raise ValueError(
                f"best_blocks(tokens={self.tokens}): a block has page={self.page} tokens"
            )
        if self.weights not in WEIGHTS:
            raise ValueError(
                f"best_blocks(weights={self.weights!r}): expected one of {', '.join(WEIGHTS)}"
            )

    @property
    def together(self) -> bool:
        return True

    @property
    def by_page(self) -> bool:
        return False

    @property
    def watches(self) -> bool:
        return True

    @property
    def observes(self) -> bool:
        return True

    def init(self, spec: Spec, pages: int) -> Blocks:
        if spec.per_head:
            raise ValueError(
                "best_blocks: a block is read by all heads, so they must hold the same tokens"
            )
        lead = (spec.layers, spec.batch)
        ring = min(self.window + self.page - 1, spec.max_length) if pages else 0
        return Blocks(
            jnp.zeros((*lead, spec.heads, pages, spec.width), jnp.float32),
            jnp.zeros((*lead, spec.heads, ring), jnp.float32),
            Running.empty((*lead, spec.heads, spec.width)),
            jnp.zeros((*lead, 1, self.warmup), jnp.float32),
            jnp.zeros((*lead, 1), jnp.int32),
        )

    # --- reading ---

    def start(self, index: Blocks, pos: Array) -> dict[str, Array]:
        """`left`: int32 [B, R], blocks that the layers still have to share; `part`: float32
        [B, R, L], which part of what is left each layer takes."""
        layers, batch = index.samples.shape[:2]
        rows = pos.shape[1] if pos.shape[1] <= FEW else 1
        part = 1.0 / jnp.arange(layers, 0, -1, dtype=jnp.float32)
        if pos.shape[1] <= FEW:
            flat = jnp.mean(index.samples[:, :, 0], -1)  # [L, B]
            rest = jnp.cumsum(flat[::-1], 0)[::-1]
            known = jnp.all(index.count[..., 0] >= self.warmup, 0)[:, None]
            part = jnp.where(known, (flat / jnp.where(rest > 0, rest, 1.0)).T, part)
        part = jnp.broadcast_to(part, (batch, layers))[:, None]
        return {
            "left": jnp.full((batch, rows), self.blocks * layers, jnp.int32),
            "part": jnp.broadcast_to(part, (batch, rows, layers)),
        }

    def choose(
        self, index: Blocks, layer: Array, query: Query, q: Array, complete: Array, carry: Any,
        constants: Mapping | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        count = index.keys.shape[2]
        probe = self._probe(index.running, query.far(self.window - 1).q, query.pos)
        score = cosine(probe, index.keys)[:, 0]
        complete = jnp.broadcast_to(complete, (score.shape[0], 1))
        score = jnp.where(jnp.arange(count) < complete, score, -jnp.inf)
        # As many as are this layer's part of what is left, within limits.
        part = jax.lax.dynamic_index_in_dim(carry["part"], layer, 2, keepdims=False)
        want = jnp.round(part * carry["left"]).astype(jnp.int32)  # [B, 1]
        least, most = jnp.minimum(complete, self.least), jnp.minimum(complete, self.pages)
        want = jnp.clip(want, least, most)
        best, page = jax.lax.top_k(score, min(self.pages, count))
        chosen = (jnp.arange(best.shape[-1]) < want) & ~jnp.isneginf(best)
        page = jnp.where(chosen, page, -1).astype(jnp.int32)
        return page[:, None], {**carry, "left": carry["left"] - want}

    def _probe(self, running: Running, h: Array, pos: Array) -> Array:
        """What rows h [..., B, Hq, T, D] ask for together, [..., B, Hq, 1, D]; a row alone: h."""
        if h.shape[-2] == 1:
            return h
        valid = pos >= 0
        weight = row_weights(running.take_up(h, valid), h, valid, pos, self.weights)
        return jnp.einsum("...bt,...bhtd->...bhd", weight, h.astype(jnp.float32))[..., None, :]

    def horizon(self, index: Blocks) -> Array | None:
        if self.least == self.pages:  # whatever the samples are
            return None
        left = self.warmup - jnp.min(index.count[..., 0], 0)
        return jnp.where(left > 0, left, 1)

    # --- writing ---

    def watch(
        self, index: Blocks, held: KV, rows: KV, window: Window, seen: Array, context: Commit
    ) -> Blocks:
        if not index.keys.shape[3]:  # nothing ever leaves the exact window
            return index
        if context.seen is None:
            raise ValueError(
                "a reader of blocks needs the queries of the rows being committed: its chain must "
                "be streaming, and forward be called with the same cache"
            )
        index = self._ask(index, window.left(seen) // self.page, context)
        old = index.received + self._received(held, context)
        new = self._received(rows, context)
        seen = after(seen, index.samples)  # keys are read by then, and can be written in place
        total = seen + rows.count
        first, last = window.left(seen) // self.page, window.left(total) // self.page
        span = window.leaving(rows.size) // self.page
        number = first[..., None] + jnp.arange(span, dtype=jnp.int32)
        number = jnp.where(number < last[..., None], number, -1)

        def close(keys: Array) -> Array:
            token = jnp.maximum(number, 0)[..., None] * self.page + jnp.arange(self.page)
            token = token.reshape(*number.shape[:3], -1)
            k = window.gather(held.k, rows.k, seen, token).astype(jnp.float32)
            got = window.gather(old, new, seen, token)
            return put_rows(keys, number, self._stand_for(k, got))

        if rows.size <= FEW:
            keys = jax.lax.cond(jnp.any(number >= 0), close, lambda keys: keys, index.keys)
        else:
            keys = close(index.keys)
        kept = window.write(old, new, seen, total - seen)
        return dataclasses.replace(index, keys=keys, received=kept)

    def _stand_for(self, k: Array, got: Array) -> Array:
        """The mean key of the tokens of each block that received most, of each query head.

        k [L, B, H, M * page, D], got [L, B, Hq, M * page] -> [L, B, Hq, M, D].
        """
        layers, batch, heads = k.shape[:3]
        got = got.reshape(layers, batch, heads, -1, k.shape[3] // self.page, self.page)
        best = jax.lax.top_k(got, self.tokens)[1]
        share = jnp.sum(jax.nn.one_hot(best, self.page), -2) / self.tokens
        k = k.reshape(layers, batch, heads, -1, self.page, k.shape[-1])
        keys = jnp.einsum("lbhgmp,lbhmpd->lbhgmd", share, k)
        return keys.reshape(layers, batch, -1, *keys.shape[4:])

    def _received(self, kv: KV, context: Commit) -> Array:
        """Attention of the rows being committed to tokens less than `window` before them, of each
        query head: float32 [L, B, Hq, N]."""
        seen, heads = context.seen, kv.k.shape[2]
        k = rotate(kv.k, kv.pos, context.rope)
        weight = (seen.pos >= 0).astype(jnp.float32)
        near = jnp.minimum(seen.span, self.window)
        groups = seen.q.shape[2] // heads

        def one(group: int) -> Array:
            q, top, total = (x[:, :, group::groups] for x in (seen.q, seen.max, seen.sum))
            return received(
                k, kv.pos, Observation(q, top, total, seen.pos, near), weight, context.softcap
            )

        got = jnp.stack([one(group) for group in range(groups)], 3)
        return got.reshape(*got.shape[:2], -1, got.shape[-1])

    def _ask(self, index: Blocks, complete: Array, context: Commit) -> Blocks:
        """Takes up the queries of the rows, and how flat their scores over the blocks are."""
        seen = context.seen
        raw = rotate(seen.q, seen.pos[:, None], context.rope, inverse=True)
        h = rotate(raw, jnp.asarray([self.window - 1]), context.rope)
        valid = seen.pos >= 0
        few = h.shape[3] <= FEW  # each row chose for itself
        probe = h if few else self._probe(index.running, h, seen.pos)
        there = jnp.arange(index.keys.shape[3]) < complete[..., None]
        flat = flatness(cosine(probe, index.keys), there)[:, :, None]  # [L, B, 1, R]
        asks = valid if few else jnp.any(valid, 1, keepdims=True)
        asks = jnp.broadcast_to(asks[:, None] & (complete > 1)[..., None], flat.shape)
        rank = jnp.cumsum(asks, -1)
        new = rank > rank[..., -1:] - self.warmup  # of more than there is room for the newest
        slot = jnp.where(asks & new, (index.count[..., None] + rank - 1) % self.warmup, -1)
        return dataclasses.replace(
            index,
            running=index.running.take_up(h, valid),
            samples=put_rows(index.samples, slot, flat),
            count=index.count + rank[..., -1].astype(jnp.int32),
        )


def best_blocks(
    blocks: int,
    page: int = 32,
    *,
    window: int = 512,
    least: int | None = None,
    most: int | None = None,
    tokens: int = 4,
    weights: Weights = "activation",
    warmup: int = 100,
) -> Reader:
    """Reads the blocks of tokens whose keys point most in the direction of what is asked.

        s_i = cos(r_i, p);  p = sum_t w_t h_t,  r_i = mean of the keys of a block that received most

    One choice for all heads of a layer, over their channels together; and for all rows of a window
    (more than 16 at once; fewer each choose for themselves, as rows that are decoded must). h_t is
    a row's query as it looks at keys `window` - 1 tokens before it that are not rotated, w_t its
    weight (`kvjax.cache.readers.probe.row_weights`). r_i is a mean of keys before rotation, of each
    query head those of the `tokens` tokens that received most attention while they were less than
    `window` tokens back. The index follows the windows in which rows were committed: it is not the
    same for every way to cut one stream into commits.

    Layers share `blocks` times their number, from the first layer to the last: where `warmup`
    windows were sampled a row takes K_l = round(part_l * what is left), between `least` and `most`,

        part_l = f_l / sum_{j >= l} f_j;  f_l = mean flatness of the scores of the newest windows

    before that, and in windows of many rows, part_l = 1 / (layers left).

    Args:
      blocks: read per layer and step, on average.
      page: tokens per block.
      window: tokens that the store holds exactly beside the blocks, at least
        (`store(keys=Window(window, page), values=Window(window, page), rope="before")`).
      least, most: blocks that one layer reads; None: `blocks`.
    """
    least, most = (blocks if x is None else x for x in (least, most))
    return BestBlocks(most, page, window, blocks, least, tokens, weights, warmup)
