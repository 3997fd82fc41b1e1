"""Where a store keeps its units: in one rectangle, or in a pool shared by heads of unlike size.

Both offer the same three operations, so that a store need not know which it has:
`write` units, `gather` some of a layer's, and `fold` attention over all of a layer's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache import memory
from kvjax.cache.attention import block_size, blockwise, layer_of
from kvjax.cache.buffer import put_rows
from kvjax.cache.types import Partial, Query, Spec, merge, pytree
from kvjax.codecs import PerKV, joins_heads

# Tokens per page of a pool: every head wastes less than one page.
PAGE = 16
# Pages read per step of the loop over a pool.
CHUNK = 64


def per_layer(x: Array, layer: Array) -> Array:
    """[L or 1, ...] -> [...] of one layer."""
    return jax.lax.dynamic_index_in_dim(x, layer if x.shape[0] > 1 else 0, 0, keepdims=False)


def check_heads(pair: PerKV, spec: Spec) -> None:
    """Raises ValueError where a codec takes several heads together that hold different tokens."""
    if (spec.per_head or spec.totals is not None) and joins_heads(pair):
        raise ValueError(
            "store(codec=...): its codec codes several heads together, but what comes here are "
            f"other tokens for each head; expected a codec of single heads, got {pair}"
        )


@pytree("slots", "unit")
class Rectangle:
    """Every row and head has room for `slots` tokens: arrays [L, B, H, slots / block, ...].

    `unit` tokens are the fewest that can be read.
    """

    slots: int
    unit: int

    @staticmethod
    def init(spec: Spec, slots: int, unit: int) -> Rectangle:
        return Rectangle(-(-slots // unit) * unit, unit)

    def lead(self, spec: Spec) -> tuple[int, ...]:
        return (spec.layers, spec.batch, spec.kv_heads)

    def pos_lead(self, spec: Spec) -> tuple[int, ...]:
        return spec.lead

    def allocate(self, count: Array) -> Rectangle:
        return self

    def write(
        self, x: Array, index: Array, rows: Array, block: int = 1, layout: Any = None
    ) -> Array:
        """Units `rows` [L, B, H, M, ...] at unit `index` [L or 1, B, H or 1, M]; -1: dropped."""
        return put_rows(x, index, rows, layout)

    def gather(self, x: Array, layer: Array, index: Array, block: int = 1) -> Array:
        """Units `index` [B, H or 1, M] of one layer: [B, H, M, ...]."""
        if memory.in_host(x):
            return memory.take(x, index, layer)
        x = per_layer(x, layer)
        index = jnp.clip(index, 0, max(x.shape[2] - 1, 0))
        return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 3)), 2)

    def fold(
        self,
        layer: Array,
        query: Query,
        q: Array,
        rows: Array,
        coded: Array,
        slots: int,
        part: Callable[[Callable, Array, Array, Array], Partial],
        most: int = 1024,
    ) -> Partial:
        """Attention of q [B, H, R, D] over the first `coded` [B, H or 1] tokens of each head.

        Args:
          rows: positions of the query rows, int32 [B, H, R].
          slots: how many tokens there is room for in the arrays at hand.
          part: (read, mask, q, rows) -> Partial, where read(x, block) gives the arrays of the
            tokens at hand, [.., N / block, ...], and mask [.., N] says which of them count.
          most: tokens read at a time, at most.
        """

        def block(start: Any, size: int, first: Any) -> Partial:
            number = start + jnp.arange(size)
            mask = (number < coded[..., None]) & (number >= first)

            def read(x: Array, block: int) -> Array:
                return layer_of(x, layer, start // block, size // block)

            return part(read, mask, q, rows)

        size = block_size(q.shape[0] * q.shape[1] * q.shape[3], self.unit, most)
        return blockwise(query, slots, jnp.max(coded), block, size, self.unit)


@pytree("slots", "most", "shared", "page")
class Pool:
    """Heads hold unlike numbers of tokens: one run of pages each, in arrays [tokens / block, ...].

    Attributes:
      address: int32 [L, B, H], first token of each head's run.
      owner: int32 [pages], b * H + h of the head whose page it is, -1 for none.
      starts: int32 [L + 1]; layer l owns tokens starts[l] to starts[l + 1].
      slots: tokens in all, static. most: the most that one layer can own, static.
      shared: layers share one room, and where each begins follows from what it holds; static.
      page: tokens per page, static.
    """

    address: Array
    owner: Array
    starts: Array
    slots: int
    most: int
    shared: bool
    page: int

    @staticmethod
    def init(spec: Spec, slots: int, unit: int) -> Pool:
        """Room for `spec.totals` prompt tokens, of each layer or all, and growth of every head."""
        page = math.lcm(PAGE, unit)
        growth = spec.max_length - spec.prompt
        shared = len(spec.totals) == 1 < spec.layers
        heads = spec.kv_heads * (spec.layers if shared else 1)
        sizes = []
        for total in spec.totals:
            # Each head's run is rounded up to whole pages.
            row = total + heads * (growth + page - 1)
            sizes.append(spec.batch * (row // page) * page)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        if shared:
            starts = np.array([0] * spec.layers + [starts[-1]])
        return Pool(
            jnp.zeros((spec.layers, spec.batch, spec.kv_heads), jnp.int32),
            jnp.full((starts[-1] // page,), -1, jnp.int32),
            jnp.asarray(starts, jnp.int32),
            int(starts[-1]),
            int(max(sizes)),
            shared,
            page,
        )

    def lead(self, spec: Spec) -> tuple[int, ...]:
        return ()

    pos_lead = lead

    def allocate(self, count: Array) -> Pool:
        """Gives every head a run of pages for `count` [L, B, H] tokens."""
        layers = self.address.shape[0]
        pages = -(-count // self.page)
        flat = pages.reshape(layers, -1)
        starts = self.starts
        if self.shared:
            ends = jnp.cumsum(jnp.sum(flat, 1)) * self.page
            starts = jnp.concatenate([starts[:1], ends[:-1], starts[-1:]]).astype(jnp.int32)
        before = jnp.cumsum(flat, 1) - flat
        first = starts[:-1, None] // self.page + before
        run = jnp.zeros_like(self.owner).at[first.reshape(-1)].add(1, mode="drop")
        # Runs of no pages share their start with the next: counting starts finds the last.
        run = jnp.cumsum(run) - 1
        end = (first + flat).reshape(-1)[run]
        owner = jnp.where(jnp.arange(run.shape[0]) < end, run % flat.shape[1], -1)
        address = (first * self.page).reshape(count.shape).astype(jnp.int32)
        return dataclasses.replace(
            self, address=address, owner=owner.astype(jnp.int32), starts=starts
        )

    def write(
        self, x: Array, index: Array, rows: Array, block: int = 1, layout: Any = None
    ) -> Array:
        lead = self.address.shape
        index = jnp.broadcast_to(index, (*lead, index.shape[3]))
        at = self.address[..., None] // block + index
        # What a head has no room for is dropped, and never lands in its neighbour's pages.
        page = jnp.minimum(at * block // self.page, self.owner.shape[0] - 1)
        head = jnp.arange(lead[1] * lead[2]).reshape(1, *lead[1:], 1)
        end = self.starts[1:].reshape(-1, 1, 1, 1)
        mine = (index >= 0) & (self.owner[page] == head) & (at * block < end)
        at = jnp.where(mine, at, x.shape[0])
        rows = jnp.broadcast_to(rows, (*lead, *rows.shape[3:]))
        rows = rows.reshape(-1, *rows.shape[4:]).astype(x.dtype)
        return x.at[at.reshape(-1)].set(rows, mode="drop")

    def gather(self, x: Array, layer: Array, index: Array, block: int = 1) -> Array:
        start = per_layer(self.address, layer)[..., None] // block
        return x[jnp.clip(start + index, 0, x.shape[0] - 1)]

    def fold(
        self,
        layer: Array,
        query: Query,
        q: Array,
        rows: Array,
        coded: Array,
        slots: int,
        part: Callable[[Callable, Array, Array, Array], Partial],
        most: int = 1024,
    ) -> Partial:
        """As `Rectangle.fold`; `CHUNK` pages at a time, as they lie, merged by owner."""
        batch, heads, count, width = q.shape
        pages = self.owner.shape[0]
        chunk = min(CHUNK, pages)
        low, high = self.starts[layer] // self.page, self.starts[layer + 1] // self.page
        address = per_layer(self.address, layer).reshape(-1)
        coded = jnp.broadcast_to(coded, (batch, heads)).reshape(-1)
        q, rows = (x.reshape(batch * heads, count, *x.shape[3:]) for x in (q, rows))

        def step(i: Array, done: Partial) -> Partial:
            first = low + i * chunk
            start = jnp.minimum(first, pages - chunk)
            number = start + jnp.arange(chunk)
            owner = jax.lax.dynamic_slice_in_dim(self.owner, start, chunk)
            mine = (number >= first) & (number < high) & (owner >= 0)
            owner = jnp.where(mine, owner, 0)
            token = (number * self.page)[:, None] + jnp.arange(self.page) - address[owner][:, None]
            mask = mine[:, None] & (token < coded[owner][:, None])

            def read(x: Array, block: int) -> Array:
                each = self.page // block
                cut = jax.lax.dynamic_slice_in_dim(x, start * each, chunk * each)
                return cut.reshape(chunk, each, *x.shape[1:])

            got = part(read, mask, q[owner], rows[owner])
            return merge(done, _by_owner(got, owner, mine, batch * heads))

        none = Partial.identity((batch * heads, count), width)
        if query.differentiable:
            most = -(-self.most // (self.page * chunk))
            done = jax.lax.scan(lambda c, i: (step(i, c), None), none, jnp.arange(most))[0]
        else:
            done = jax.lax.fori_loop(0, (high - low + chunk - 1) // chunk, step, none)
        return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), done)


def _by_owner(part: Partial, owner: Array, mine: Array, owners: int) -> Partial:
    """Merges the partials of pages [m, R] into those of their owners [owners, R]."""
    belongs = (owner[:, None] == jnp.arange(owners)) & mine[:, None]
    top = jnp.max(jnp.where(belongs[..., None], part.max[:, None], -jnp.inf), 0)
    safe = jnp.where(jnp.isneginf(top), 0.0, top)
    weight = part.sum * jnp.exp(part.max - safe[owner])
    weight = jnp.where(belongs.T[..., None], weight, 0.0)  # [owners, m, R]
    total = jnp.sum(weight, 1)
    out = jnp.einsum("omr,mrd->ord", weight, part.out)
    return Partial(out / jnp.where(total > 0, total, 1.0)[..., None], top, total)
