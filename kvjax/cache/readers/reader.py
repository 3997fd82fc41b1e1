"""Readers: which stored tokens a query reads at a step, without deleting any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.buffer import put_rows
from kvjax.cache.ring import Window
from kvjax.cache.stage import Column, Commit
from kvjax.cache.types import KV, Partial, Query, Spec
from kvjax.codecs import Codec, Dense, dense


@dataclasses.dataclass(frozen=True)
class Reader:
    """Which pages of a store a query reads; the others stay, unread. See `readers`."""

    pages: int
    page: int = 16

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constants that `write` and `select` are given."""
        return ()

    @property
    def apart(self) -> bool:
        """Whether the query heads that share a key-value head choose each for itself."""
        return False

    @property
    def whole(self) -> int:
        """How many of the first layers read everything."""
        return 0

    @property
    def by_page(self) -> bool:
        """Whether it is shown complete pages (`write`); else what arrives (`note`)."""
        return True

    @property
    def columns(self) -> tuple[Column, ...]:
        """Columns that arriving tokens bring to it; the store itself does not keep them."""
        return ()

    @property
    def observes(self) -> bool:
        """Whether it must be shown the queries of rows committed after the prompt."""
        return False

    @property
    def together(self) -> bool:
        """Whether many rows at once (a window of a prompt) choose pages for all of them; else they
        read everything."""
        return False

    @property
    def looks_ahead(self) -> bool:
        """Whether the layer before chooses, so that what was chosen can be fetched meanwhile."""
        return False

    @property
    def watches(self) -> bool:
        """Whether it is shown every commit beside the store's exact window (`watch`), in place of
        pages and arrivals."""
        return False

    @property
    def window(self) -> int:
        """The fewest exact tokens that the store must hold beside its pages."""
        return 0

    def init(self, spec: Spec, pages: int) -> Any:
        """The index beside the entries; leaves [L, B, H, pages, ...]."""
        raise NotImplementedError

    def write(
        self, index: Any, number: Array, k: Array, valid: Array, constants: Mapping | None = None
    ) -> Any:
        """Notes pages. number: [L or 1, B, H or 1, M], -1 none; k: [L, B, H, M, page, D], rotated;
        valid: bool, like k without D; constants: by name, [L, ...]."""
        raise NotImplementedError

    def note(self, index: Any, kv: KV, seen: Array, context: Commit, unrotated: bool) -> Any:
        """Notes tokens (compact) that arrive after `seen` [L or 1, B, H or 1] others."""
        raise NotImplementedError

    def watch(
        self, index: Any, held: KV, rows: KV, window: Window, seen: Array, context: Commit
    ) -> Any:
        """Notes a commit before the store makes it.

        Args:
          held: the exact window, slots as `Window` says, keys as the chain holds them; no values.
          rows: the tokens (compact) that arrive after `seen` [L or 1, B, H or 1] others.
          context: with the queries of these rows (`seen`), where the chain is streaming.
        """
        raise NotImplementedError

    def start(self, index: Any, pos: Array) -> Any:
        """What `choose` of the first layer is given as `carry`; leaves [B, R, ...], R the rows that
        choose apart: those of pos [B, T] where they are few, else 1."""
        return ()

    def choose(
        self, index: Any, layer: Array, query: Query, q: Array, complete: Array, carry: Any,
        constants: Mapping | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        """`select`, with what goes from layer to layer; the query has one row, or (`together`) all
        rows of a window."""
        return self.select(index, query, q, complete, constants=constants), carry

    def horizon(self, index: Any) -> Array | None:
        """int32 [B]: how many tokens may be committed before another choice is made of the same
        pages; None: any number."""
        return None

    def reads_whole(self, index: Any, query: Query) -> Array | None:
        """bool [B], which rows read everything at this step; None: a step is never like that.

        Args:
          index: of one layer, as in `select`.
          query: of one row per sequence.
        """
        return None

    def select(
        self, index: Any, query: Query, q: Array, complete: Array, free: Array | None = None,
        constants: Mapping | None = None,
    ) -> Array:  # fmt: skip
        """Page numbers to read, int32 [B, H, pages] ([B, Hq, pages] where `apart`), -1 for none.

        Args:
          index: of one layer, leaves [B, H, pages, ...].
          q: [B, H, R, D]. complete: int32 [B, H or 1], how many pages there are.
          free: bool [B, H, all pages], those that may be chosen; None: all that are complete.
          constants: by name, of one layer.
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

    def write(
        self, index: Array, number: Array, k: Array, valid: Array, constants: Mapping | None = None
    ) -> Array:
        weight = valid[..., None].astype(jnp.float32)
        mean = jnp.sum(jnp.where(valid[..., None], k, 0.0), -2) / jnp.maximum(
            jnp.sum(weight, -2), 1
        )
        return put_rows(index, number, mean)

    def select(
        self, index: Any, query: Query, q: Array, complete: Array, free: Array | None = None,
        constants: Mapping | None = None,
    ) -> Array:  # fmt: skip
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


@dataclasses.dataclass(frozen=True)
class BestTokens(Reader):
    """See `best_tokens`."""

    channels: int = 32
    order: str = "channel_order"
    codec: Codec = dataclasses.field(default_factory=dense)
    skip: int = 0
    ahead: bool = False

    def __post_init__(self) -> None:
        for name, number, least in (
            ("tokens", self.pages, 1),
            ("channels", self.channels, 1),
            ("skip", self.skip, 0),
        ):
            if number < least:
                raise ValueError(f"best_tokens({name}={number}): at least {least}")
        if self.codec.block != 1:
            raise ValueError(f"best_tokens(codec={self.codec}): labels are coded token by token")

    @property
    def constants(self) -> tuple[str, ...]:
        return (self.order,)

    @property
    def apart(self) -> bool:
        return True

    @property
    def whole(self) -> int:
        return self.skip

    @property
    def looks_ahead(self) -> bool:
        return self.ahead

    def init(self, spec: Spec, pages: int) -> Any:
        if self.channels > spec.width:
            raise ValueError(
                f"best_tokens(channels={self.channels}): heads have {spec.width} channels"
            )
        lead = (spec.layers, spec.batch, spec.heads)
        return self.codec.empty(lead, pages, self.channels, spec.dtype)

    def write(
        self, index: Any, number: Array, k: Array, valid: Array, constants: Mapping | None = None
    ) -> Any:
        own = constants[self.order][:, 0, :, : self.channels]  # [L, Hq, r]
        layers, batch, heads, count = k.shape[:4]
        own = own.reshape(own.shape[0], 1, heads, -1, 1, self.channels)
        labels = jnp.take_along_axis(k[:, :, :, None, :, 0], own, -1)  # [L, B, H, G, M, r]
        labels = labels.reshape(layers, batch, -1, count, self.channels)
        groups = labels.shape[2] // heads
        there = jnp.repeat(jnp.broadcast_to(valid[..., 0], k.shape[:4]), groups, 2)
        number = jnp.repeat(number, groups, 2) if number.shape[2] > 1 else number
        code = self.codec.encode(labels, there)
        return jax.tree.map(lambda x, rows: put_rows(x, number, rows), index, code)

    def select(
        self, index: Any, query: Query, q: Array, complete: Array, free: Array | None = None,
        constants: Mapping | None = None,
    ) -> Array:  # fmt: skip
        own = constants[self.order][:, :, None, : self.channels]  # [1, Hq, 1, r]
        label = jnp.take_along_axis(q.reshape(q.shape[0], own.shape[1], 1, -1), own, -1)
        if not isinstance(self.codec, Dense):
            label = self.codec.decode(self.codec.encode(label), label.dtype)
        score = self.codec.scores(label, index)[:, :, 0]  # [B, Hq, N]
        groups = own.shape[1] // q.shape[1]
        wide = lambda x: jnp.repeat(x, groups, 1) if x.shape[1] > 1 else x  # noqa: E731
        there = jnp.arange(score.shape[-1]) < wide(complete)[..., None]
        there = there if free is None else there & wide(free)
        best, token = jax.lax.top_k(
            jnp.where(there, score, -jnp.inf), min(self.pages, score.shape[-1])
        )
        return jnp.where(jnp.isneginf(best), -1, token).astype(jnp.int32)


def best_tokens(
    tokens: int,
    channels: int,
    order: str,
    codec: Codec | None = None,
    skip: int = 0,
    ahead: bool = False,
) -> Reader:
    """Reads the `tokens` tokens with the largest product over a few channels, per query head.

        s_j = sum_{c in C_h} q_c k_jc;  those of the largest s (ties: the first) are read whole

    Beside each key its *labels* are kept, its channels C_h, for each query head that shares it.

    Args:
      tokens: read per query head and step.
      channels: how many label channels, the first of the order.
      order: name of the constant that holds every query head's channels in order, int32
        [L, 1, Hq, D].
      codec: of the labels, and for choosing of the query's; None: exact.
      skip: so many of the first layers read everything.
      ahead: a layer's tokens are chosen, and fetched, while the layer before is computed, by the
        queries that it would have for that layer's input; the first and the last layer choose for
        themselves. Attention has the true queries.
    """
    return BestTokens(tokens, 1, channels, order, dense() if codec is None else codec, skip, ahead)


def each_row(query: Query, q: Array, attend: Callable[[Query, Array, Array], Partial]) -> Partial:
    """Attention of a few rows each of which reads what it would have read alone.

    Args:
      q: the grouped queries [B, H, G * T, D] of all rows.
      attend: (query, q, rows) -> Partial of one row: its query, q [B, H, G, D], and positions.

    Returns:
      Partial over the grouped rows, [B, H, G * T].
    """
    return each_row_with(query, q, lambda *row: (attend(*row[:3]), ()), ())[0]


def each_row_with(
    query: Query, q: Array, attend: Callable[[Query, Array, Array, Any], Any], carry: Any
) -> tuple[Partial, Any]:
    """`each_row` with what each row carries, leaves [B, T, ...]: attend(query, q, rows, carry) ->
    (Partial, carry) is given [B, 1, ...] of it."""
    count = query.pos.shape[1]
    if count == 1:
        return attend(query, q, query.rows(q), carry)

    def one(t: Array) -> tuple[Partial, Any]:
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, t, 1, axis)  # noqa: E731
        row = dataclasses.replace(
            query, q=cut(query.q, 2), raw=cut(query.raw, 2), pos=cut(query.pos, 1),
            columns={name: cut(x, 1) for name, x in query.columns.items()},
        )  # fmt: skip
        own = row.grouped(row.q, q.shape[1])
        return attend(row, own, row.rows(own), jax.tree.map(lambda x: cut(x, 1), carry))

    done, carry = jax.lax.map(one, jnp.arange(count))  # [T, B, H, G, ..] -> [B, H, G * T, ..]
    done = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*q.shape[:3], *x.shape[4:]), done)
    return done, jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), carry)
