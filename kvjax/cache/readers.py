"""Readers: which stored tokens a query reads at a step, without deleting any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.buffer import put_rows
from kvjax.cache.types import Partial, Query, Spec


@dataclasses.dataclass(frozen=True)
class Reader:
    """Which pages of a store a query reads; the others stay, unread. See `readers`."""

    pages: int
    page: int = 16

    def init(self, spec: Spec, pages: int) -> Any:
        """The index beside the entries; leaves [L, B, H, pages, ...]."""
        raise NotImplementedError

    def write(self, index: Any, number: Array, k: Array, valid: Array) -> Any:
        """Notes pages. number: [L or 1, B, H or 1, M], -1 none; k: [L, B, H, M, page, D], rotated;
        valid: bool, like k without D."""
        raise NotImplementedError

    def select(
        self, index: Any, query: Query, q: Array, complete: Array, free: Array | None = None
    ) -> Array:
        """Page numbers to read, int32 [B, H, pages], -1 for none.

        Args:
          index: of one layer, leaves [B, H, pages, ...].
          q: [B, H, R, D]. complete: int32 [B, H or 1], how many pages there are.
          free: bool [B, H, all pages], those that may be chosen; None: all that are complete.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BestPages(Reader):
    """See `best_pages`."""

    softmax: bool = False

    def __post_init__(self) -> None:
        for name in ("pages", "page"):
            if getattr(self, name) < 1:
                raise ValueError(f"best_pages({name}={getattr(self, name)}): at least 1")

    def init(self, spec: Spec, pages: int) -> Array:
        return jnp.zeros((spec.layers, spec.batch, spec.kv_heads, pages, spec.width), jnp.float32)

    def write(self, index: Array, number: Array, k: Array, valid: Array) -> Array:
        weight = valid[..., None].astype(jnp.float32)
        mean = jnp.sum(jnp.where(valid[..., None], k, 0.0), -2) / jnp.maximum(
            jnp.sum(weight, -2), 1
        )
        return put_rows(index, number, mean)

    def select(
        self, index: Any, query: Query, q: Array, complete: Array, free: Array | None = None
    ) -> Array:
        count = index.shape[2]
        there = jnp.arange(count) < complete[..., None]
        there = there if free is None else there & free
        score = jnp.einsum("bhrd,bhnd->bhrn", q.astype(jnp.float32), index)
        if self.softmax:
            score = jax.nn.softmax(score, -1, where=there[:, :, None])
        score = jnp.where(there, jnp.max(score, 2), -jnp.inf)
        best, page = jax.lax.top_k(score, min(self.pages, count))
        return jnp.where(jnp.isneginf(best), -1, page).astype(jnp.int32)


def best_pages(pages: int, page: int = 16, softmax: bool = False) -> Reader:
    """Reads the `pages` pages whose mean key has the largest product with any query of the group.

    Every row of a few chooses for itself; rows of a prompt (more than 16 at once) read everything.

    Args:
      pages: pages read per key-value head and step.
      page: tokens per page.
      softmax: compare each query's softmax over the pages in place of its products, so that
        queries of unlike size have a like say.
    """
    return BestPages(pages, page, softmax)


def each_row(query: Query, q: Array, attend: Callable[[Query, Array, Array], Partial]) -> Partial:
    """Attention of a few rows each of which reads what it would have read alone.

    Args:
      q: the grouped queries [B, H, G * T, D] of all rows.
      attend: (query, q, rows) -> Partial of one row: its query, q [B, H, G, D], and positions.

    Returns:
      Partial over the grouped rows, [B, H, G * T].
    """
    count = query.pos.shape[1]
    if count == 1:
        return attend(query, q, query.rows(q))

    def one(t: Array) -> Partial:
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, t, 1, axis)  # noqa: E731
        row = dataclasses.replace(
            query, q=cut(query.q, 2), raw=cut(query.raw, 2), pos=cut(query.pos, 1)
        )
        own = row.grouped(row.q, q.shape[1])
        return attend(row, own, row.rows(own))

    done = jax.lax.map(one, jnp.arange(count))  # [T, B, H, G, ..] -> [B, H, G * T, ..]
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*q.shape[:3], *x.shape[4:]), done)
