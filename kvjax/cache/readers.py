"""Readers: which stored tokens a query reads at a step, without deleting any."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.buffer import put_rows
from kvjax.cache.types import Query, Spec


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

    def select(self, index: Any, query: Query, q: Array, complete: Array) -> Array:
        """Page numbers to read, int32 [B, H, pages], -1 for none.

        Args:
          index: of one layer, leaves [B, H, pages, ...].
          q: [B, H, R, D]. complete: int32 [B, H or 1], how many pages there are.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BestPages(Reader):
    """See `best_pages`."""

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

    def select(self, index: Any, query: Query, q: Array, complete: Array) -> Array:
        count = index.shape[2]
        score = jnp.max(jnp.einsum("bhrd,bhnd->bhrn", q.astype(jnp.float32), index), 2)
        there = jnp.arange(count) < complete[..., None]
        best, page = jax.lax.top_k(jnp.where(there, score, -jnp.inf), min(self.pages, count))
        return jnp.where(jnp.isneginf(best), -1, page).astype(jnp.int32)


def best_pages(pages: int, page: int = 16) -> Reader:
    """Reads the `pages` pages whose mean key has the largest product with any query of the group.

    Every row of a few chooses for itself; rows of a prompt (more than 8 at once) read everything.

    Args:
      pages: pages read per key-value head and step.
      page: tokens per page.
    """
    return BestPages(pages, page)
