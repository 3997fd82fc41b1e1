"""`layer_bases`: a prompt as coordinates in bases that several layers share."""

from __future__ import annotations

import dataclasses
import functools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.attention import attend_slots, block_size, blockwise, dot_keys, layer_of, visible
from kvjax.cache.paging import per_layer
from kvjax.cache.readers.reader import Reader, each_row
from kvjax.cache.share import as_fraction
from kvjax.cache.stage import FOREVER, Commit, Stage, most, room_of, total
from kvjax.cache.types import KV, Partial, Query, Spec, merge, partial_attention, pytree, rotate
from kvjax.codecs import Codec, PerKV, as_pair, dense

multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@pytree("spec")
class Based:
    """State of `layer_bases`.

    Attributes:
      seen: int32 [1, B, 1], tokens of the prompt. pos: int32 [1, B, 1, N].
      k, v: coded coordinates of each group's tokens, leaves [groups, B, 1, N, ...].
      k_map, v_map: [L, B, H, rank, D], what a layer's heads make of them.
      index: of the reader.
      free: bool [L, B, H, pages], pages that are read from coordinates, not from `near`.
      near: exact tokens, keys before rotation [L, B, H, M, D]; None without a reader.
    """

    seen: Array
    pos: Array
    k: Any
    v: Any
    k_map: Array
    v_map: Array
    index: Any
    free: Array | None
    near: KV | None
    spec: Spec


@dataclasses.dataclass(frozen=True)
class LayerBases(Stage):
    """See `layer_bases`."""

    key_rank: int | Fraction
    value_rank: int | Fraction
    layers: int
    codec: PerKV
    reader: Reader | None = None
    apart: int = 0
    newest: int = 0

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ValueError(f"layer_bases(layers={self.layers}): expected at least 1")
        for name in ("key_rank", "value_rank"):
            rank = getattr(self, name)
            part = isinstance(rank, Fraction)
            if not (0 < rank <= 1 if part else rank >= 1):
                raise ValueError(
                    f"layer_bases({name}={float(rank) if part else rank}): expected a number of at "
                    "least 1, or a share in (0, 1] of the channels of a group's layers"
                )
        for name in ("apart", "newest"):
            if getattr(self, name) < 0:
                raise ValueError(f"layer_bases({name}={getattr(self, name)}): expected at least 0")
        read = self.reader
        if read is not None and (read.constants or read.apart or not read.by_page):
            raise ValueError(
                f"layer_bases(reader={read}): expected one of pages, without constants, that "
                "chooses for all query heads of a key-value head together, such as best_pages"
            )
        if self.reader is None and (self.apart or self.newest):
            raise ValueError(
                f"layer_bases(apart={self.apart}, newest={self.newest}): pages are held exactly "
                "only where a reader leaves others unread"
            )
        for codec in (self.codec.k, self.codec.v):
            if codec.block != 1 or codec.constants_spec(8):
                raise ValueError(
                    f"layer_bases(codec={codec}): coordinates are coded token by token and without "
                    "constants"
                )

    @property
    def streaming(self) -> bool:
        return False

    @property
    def unrotated(self) -> bool:
        return True

    def _ranks(self, spec: Spec) -> tuple[int, int]:
        """Ranks of keys and values; more than tokens or channels would be of no use."""
        channels = min(self.layers, spec.layers) * spec.kv_heads * spec.width
        of = lambda r: int(r * channels) if isinstance(r, Fraction) else r  # noqa: E731
        top = min(channels, spec.prompt)
        return tuple(max(min(of(r), top), 1) for r in (self.key_rank, self.value_rank))

    def _pages(self, spec: Spec) -> int:
        return 0 if self.reader is None else spec.prompt // self.reader.page

    def init(self, spec: Spec) -> Based:
        if spec.per_layer or spec.per_head or spec.totals is not None:
            raise ValueError(
                "layer_bases(...) needs layers and heads that hold the same tokens, but the stage "
                "before it leaves other ones in each"
            )
        if "bias" in spec.columns:
            raise ValueError("layer_bases(...) holds no logit biases, which tokens bring here")
        n, width = spec.prompt, spec.width
        held = (spec.layers, spec.batch, spec.kv_heads)
        ranks = self._ranks(spec)
        k, v = (), ()
        if n:
            lead = (-(-spec.layers // self.layers), spec.batch, 1)
            pair = (self.codec.k, self.codec.v)
            k, v = (c.empty(lead, n, r, spec.dtype) for c, r in zip(pair, ranks))
        index = free = near = None
        if pages := self._pages(spec):
            page = self.reader.page
            index, free = self.reader.init(spec, pages), jnp.zeros((*held, pages), bool)
            apart = spec.replace(per_layer=True, per_head=True, columns=())
            near = buffer.empty(apart, min(n, (self.apart + self.newest + 1) * page - 1))
        return Based(
            jnp.zeros((1, spec.batch, 1), jnp.int32), jnp.full((1, spec.batch, 1, n), -1),
            k, v, *(jnp.zeros((*held, r, width), spec.dtype) for r in ranks),
            index, free, near, spec,
        )  # fmt: skip

    def downstream(self, spec: Spec) -> Spec:
        return spec.replace(max_length=spec.max_length - spec.prompt, prompt=0)

    # --- writing ---

    def commit(self, state: Based, kv: KV, context: Commit) -> tuple[Based, KV]:
        spec = state.spec
        if context.phase != "prefill" or spec.prompt == 0:
            return state, kv
        kv = kv if kv.size == spec.prompt else buffer.head(kv, spec.prompt)
        valid = kv.pos >= 0
        k, v = (jnp.where(valid[..., None], x, 0.0).astype(jnp.float32) for x in (kv.k, kv.v))
        bases = principal(jnp.concatenate([gram(side_by_side(x, self.layers)) for x in (k, v)]))
        sides = []
        pair = (self.codec.k, self.codec.v)
        for x, basis, rank, codec in zip((k, v), jnp.split(bases, 2), self._ranks(spec), pair):
            basis = basis[..., :rank]
            y = multiply(side_by_side(x, self.layers), basis).astype(spec.dtype)
            code = codec.encode(y, jnp.broadcast_to(valid, y.shape[:-1]))
            sides.append((code, _per_head(basis, spec).astype(spec.dtype)))
        (k_code, k_map), (v_code, v_map) = sides
        state = dataclasses.replace(
            state, seen=kv.count, pos=kv.pos, k=k_code, v=v_code, k_map=k_map, v_map=v_map
        )
        if state.near is not None:
            state = self._note(state, kv, context)
        return state, buffer.take(kv, jnp.full((1, 1, 1, 1), -1))

    def _note(self, state: Based, kv: KV, context: Commit) -> Based:
        """Shows the reader all pages, and sets those apart that are held exactly."""
        page, (layers, batch, heads) = self.reader.page, kv.lead
        pages = state.free.shape[3]
        k = context.rotated(kv, True)[:, :, :, : pages * page]
        k = k.reshape(layers, batch, heads, pages, page, -1)
        whole = state.seen // page  # complete pages
        number = jnp.arange(pages)
        number = jnp.where(number < whole[..., None], number, -1)
        there = jnp.broadcast_to((number >= 0)[..., None], (*k.shape[:3], pages, page))
        index = self.reader.write(state.index, number, k, there)
        older = jnp.maximum(whole - self.newest, 0)
        free = jnp.broadcast_to(jnp.arange(pages) < older[..., None], state.free.shape)
        start = older[..., None] * page
        token = start + jnp.arange((self.newest + 1) * page - 1)
        token = jnp.where(token < state.seen[..., None], token, -1)
        token = jnp.broadcast_to(token, (layers, batch, heads, token.shape[3]))
        if count := min(self.apart, pages):
            worst = jnp.where(free, -alike(k), -jnp.inf)
            value, chosen = jax.lax.top_k(worst, count)
            chosen = jnp.where(jnp.isneginf(value), pages, chosen)
            grid = jnp.ogrid[:layers, :batch, :heads, :1]
            free = free.at[(*grid[:3], chosen)].set(False, mode="drop")
            first = jnp.where(chosen < pages, chosen * page, -page)[..., None]
            inside = jnp.maximum(first + jnp.arange(page), -1)
            token = jnp.concatenate([inside.reshape(*chosen.shape[:3], -1), token], 3)
        # Tokens first, for there are at most as many slots as the prompt has tokens.
        token = -jnp.sort(-token, -1)[..., : state.near.size]
        near = buffer.take(dataclasses.replace(kv, extra={}), token)
        k, v = (x.astype(state.spec.dtype) for x in (near.k, near.v))
        near = dataclasses.replace(near, k=k, v=v)
        return dataclasses.replace(state, index=index, free=free, near=near)

    # --- reading ---

    def attend(
        self, state: Based, layer: Array, query: Query, carry: Any
    ) -> tuple[Partial | None, Any]:
        if state.spec.prompt == 0:
            return None, carry
        q = query.grouped(query.q, state.spec.kv_heads)
        if state.near is None:
            return query.ungroup(self._all(state, layer, query, q)), carry
        if query.pos.shape[1] > buffer.FEW:
            done = self._all(state, layer, query, q)
        else:
            done = each_row(query, q, lambda *row: self._some(state, layer, *row))
        near = attend_slots(state.near, layer, query, unrotated=True)
        return merge(query.ungroup(done), near), carry

    def _all(self, state: Based, layer: Array, query: Query, q: Array) -> Partial:
        """Attention over all tokens but those held exactly, block by block."""
        group, slots = layer // self.layers, state.pos.shape[3]
        rows = query.rows(q)

        def part(start: Any, size: int, first: Any) -> Partial:
            read = lambda x: layer_of(x, group, start, size)  # noqa: E731
            number = start + jnp.arange(size)
            mask = (number >= first)[None, None]
            if state.free is not None:
                free, page = per_layer(state.free, layer), self.reader.page
                at = jnp.minimum(number // page, free.shape[2] - 1)
                mask &= free[:, :, at] & (number // page < free.shape[2])
            code = jax.tree.map(read, (state.k, state.v))
            return self._part(state, layer, query, q, rows, code, read(state.pos), mask)

        size = block_size(q.shape[0] * q.shape[1] * q.shape[3])
        done = blockwise(query, slots, jnp.max(state.seen), part, size)
        return self._mapped(state, layer, done)

    def _some(self, state: Based, layer: Array, query: Query, q: Array, rows: Array) -> Partial:
        """In two phases: the reader names pages, and only those are rebuilt."""
        page, group = self.reader.page, layer // self.layers
        index, free = jax.tree.map(lambda x: per_layer(x, layer), (state.index, state.free))
        whole = state.seen[0] // page
        chosen = self.reader.select(index, query, q, whole, free)
        chosen = jnp.broadcast_to(chosen, (*q.shape[:2], chosen.shape[-1]))
        token = jnp.maximum(chosen, 0)[..., None] * page + jnp.arange(page)
        token = token.reshape(*chosen.shape[:2], -1)
        mask = jnp.repeat(chosen >= 0, page, -1)
        row = jnp.arange(token.shape[0])[:, None, None]
        code = jax.tree.map(lambda x: x[group, row, 0, token], (state.k, state.v))
        pos = state.pos[0, row, 0, token]
        return self._mapped(state, layer, self._part(state, layer, query, q, rows, code, pos, mask))

    def _part(
        self, state: Based, layer: Array, query: Query, q: Array, rows: Array, code: Any,
        pos: Array, mask: Array,
    ) -> Partial:  # fmt: skip
        """Attention over tokens of the code [B, 1 or H, N, ...], in coordinates of values."""
        k, v = code
        y = self.codec.k.decode(k, query.q.dtype)
        k_map = per_layer(state.k_map, layer).astype(y.dtype)
        k = rotate(jnp.einsum("bxnr,bhrd->bhnd", y, k_map) if y.shape[1] == 1 else y @ k_map,
                   pos, query.rope)  # fmt: skip
        seen = visible(query, pos, rows) & mask[..., None, :]
        logits = query.cap(dot_keys(q, k))
        heads = jax.tree.leaves(v)[0].shape[1]

        def mix(p: Array) -> Array:
            if heads == p.shape[1]:
                return self.codec.v.mix(p, v)
            y = self.codec.v.mix(p.reshape(p.shape[0], 1, -1, p.shape[3]), v)
            return y.reshape(*p.shape[:3], y.shape[3])

        return partial_attention(logits, seen, mix)

    def _mapped(self, state: Based, layer: Array, part: Partial) -> Partial:
        v_map = per_layer(state.v_map, layer).astype(jnp.float32)
        return dataclasses.replace(part, out=part.out @ v_map)

    def held(self, state: Based) -> Array:
        return most(state.seen)

    def tokens(self, state: Based) -> Array:
        return total(state.seen, state.spec)

    def slots(self, state: Based) -> int:
        return room_of(state.pos, state.spec)

    def horizon(self, state: Based) -> tuple[Array, bool]:
        return jnp.full(state.seen.shape[1:2], FOREVER), False


def side_by_side(x: Array, layers: int) -> Array:
    """[L, B, H, T, D] as [L / layers, B, 1, T, layers H D]; missing layers of the last group are
    zero."""
    groups = -(-x.shape[0] // layers)
    layers = min(layers, x.shape[0])
    x = jnp.pad(x, [(0, groups * layers - x.shape[0]), *[(0, 0)] * 4])
    x = x.reshape(groups, layers, *x.shape[1:])
    x = jnp.transpose(x, (0, 2, 4, 1, 3, 5))
    return x.reshape(groups, x.shape[1], 1, x.shape[2], -1)


def gram(x: Array) -> Array:
    """x^T x of tokens [..., T, C]: float32 [..., C, C]."""
    return multiply(jnp.matrix_transpose(x), x)


def principal(second: Array) -> Array:
    """Eigenvectors of symmetric matrices [..., C, C], of the largest eigenvalue first, as columns.

    One after the other: two calls into LAPACK at once can wait for each other's threads on CPU.
    """
    flat = second.reshape(-1, *second.shape[-2:])
    found = jax.lax.map(lambda g: jnp.linalg.eigh(g)[1][:, ::-1], flat)
    return found.reshape(second.shape)


def alike(k: Array) -> Array:
    """The least cosine between a page's keys [..., page, D] and their mean: float32 [...]."""
    k = k.astype(jnp.float32)
    mean = jnp.mean(k, -2, keepdims=True)
    size = jnp.linalg.norm(k, axis=-1) * jnp.linalg.norm(mean, axis=-1)
    return jnp.min(jnp.sum(k * mean, -1) / jnp.maximum(size, 1e-12), -1)


def _per_head(basis: Array, spec: Spec) -> Array:
    """Bases [groups, B, 1, layers H D, r] as each layer's and head's part [L, B, H, r, D]."""
    groups, batch, _, _, rank = basis.shape
    x = basis.reshape(groups, batch, -1, spec.kv_heads, spec.width, rank)
    x = jnp.transpose(x, (0, 2, 1, 3, 5, 4))
    return x.reshape(-1, *x.shape[2:])[: spec.layers]


def layer_bases(
    key_rank: int | float,
    value_rank: int | float,
    layers: int = 1,
    *,
    codec: Codec | PerKV | None = None,
    reader: Reader | None = None,
    apart: int = 0,
    newest: int = 0,
) -> LayerBases:
    """Of a complete prompt, holds all tokens by coordinates that groups of layers share; tokens
    that come later flow on. Acts in `finish`; until then the chain holds the exact prompt.

        X = [X_1 .. X_G], a token's channels of all heads of G layers;  V: the leading right
        singular vectors of X;  held: Y = X V once per group, and V_l of each layer;  X_l' = Y V_l^T

    Keys are taken before rotary rotation, and rotated when they are read. The singular vectors are
    eigenvectors of X^T X, in float32, of each prompt for itself: what the truncated SVD leaves out
    is left out, up to directions whose squared singular values differ by less than rounding.

    Args:
      key_rank, value_rank: columns of V; a float: a share of the G H D channels.
      layers: G, consecutive ones; the last group may have fewer.
      codec: of the coordinates Y; None: exactly.
      reader: which pages a query rebuilds and reads; None: all. Each query then also reads the
        pages held exactly:
      apart: so many pages per layer and head, those of which a key is least like the page's mean
        (by cosine, keys rotated): their mean says little about them.
      newest: the last so many complete pages, and what is left of an incomplete one.

    >>> from kvjax.cache import Spec
    >>> state = layer_bases(0.5, 0.25, 2).init(Spec(3, 1, 2, 2, 8, 64, 64))
    >>> state.k.shape, state.v_map.shape  # 2 groups of 32 channels
    ((2, 1, 1, 64, 16), (3, 1, 2, 8, 8))
    """
    ranks = (as_fraction(r) if isinstance(r, float) else r for r in (key_rank, value_rank))
    pair = as_pair(dense() if codec is None else codec)
    return LayerBases(*ranks, layers, pair, reader, apart, newest)
