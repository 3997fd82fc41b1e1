"""A look into a cache, for pictures and tests: where each token is, in which form, whether read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache.cache import Cache
from kvjax.cache.chain import Chain, Pending
from kvjax.cache.paging import Pool
from kvjax.cache.stage import exact
from kvjax.cache.stages.store import Store, Stored
from kvjax.cache.stages.windows import Slots
from kvjax.cache.types import Query, rotate

# Columns that say for how many further tokens a slot stands.
MERGED = ("absorbed",)


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the tokens of a cache are, by position; NumPy, [L, B, H, N] each, N the max_length.

    Attributes:
      stage: number of the stage of the chain that holds the token, -1 for none.
      coded: whether it is held in a form that is not exact.
      others: further tokens that were merged into its slot.
    """

    stage: np.ndarray
    coded: np.ndarray
    others: np.ndarray

    @property
    def held(self) -> np.ndarray:
        """bool [L, B, H, N]."""
        return self.stage >= 0


def placed(cache: Cache) -> Placed:
    """Where each token is, layers counted among the attention layers.

    Raises:
      ValueError: a stage whose state it does not know.
    """
    layers = sum(len(cache.groups[n]) for n in cache.chains)
    shape: tuple[int, ...] = ()
    found: Placed | None = None
    for n in cache.chains:
        for number, stage, own in _stages(cache.transforms[n], cache.state[n]):
            for l, b, h, pos, coded, others in _slots(stage, own):
                if found is None:
                    shape = (layers, cache.length.shape[0], own.spec.kv_heads, cache.max_length)
                    found = Placed(
                        np.full(shape, -1, np.int8), np.zeros(shape, bool), np.zeros(shape)
                    )
                there = pos >= 0
                at = (cache.groups[n][l], b, h, pos[there])
                found.stage[at] = number
                found.coded[at] = np.broadcast_to(coded, pos.shape)[there]
                found.others[at] = np.broadcast_to(others, pos.shape)[there]
    if found is None:
        raise ValueError("this cache holds no keys and values")
    return found


def _stages(chain: Chain, state: Any) -> list[tuple[int, Any, Any]]:
    """(number, stage, state) of those that hold tokens of their own."""
    if isinstance(state, Pending):
        return [(0, None, state)]
    pairs = list(zip(chain.stages, state))
    known = (Slots, Stored)
    for stage, own in pairs:
        if not isinstance(own, known) and hasattr(own, "seen"):
            raise ValueError(f"{stage}: its state {type(own).__name__} is not known here")
    return [(i, s, own) for i, (s, own) in enumerate(pairs) if isinstance(own, known)]


def _slots(stage: Any, own: Any) -> Any:
    """(layer, row, head, positions, coded, others) of every head."""
    spec = own.spec
    inner = getattr(stage, "inner", stage)
    stored = isinstance(own, Stored)
    pos = np.asarray(own.pos if stored else own.kv.pos)
    extra = own.extra if stored else own.kv.extra
    names = [name for name in MERGED if name in extra]
    melted = np.asarray(sum(extra[name] for name in names)) if names else None
    for l, b, h in np.ndindex(spec.layers, spec.batch, spec.kv_heads):
        if stored and isinstance(own.place, Pool):
            start, count = int(own.place.address[l, b, h]), int(own.seen[l, b, h])
            cut: Any = slice(start, start + count)
        else:
            cut = (l % pos.shape[0], b, h % pos.shape[2])
        mine = pos[cut]
        coded: Any = False
        if stored:
            seen = np.asarray(own.seen)
            count = seen[l % seen.shape[0], b, h % seen.shape[2]]
            coded = np.arange(len(mine)) < np.asarray(inner._coded(jnp.asarray(count)))
            coded &= not (exact(inner.codec.k, spec.dtype) and exact(inner.codec.v, spec.dtype))
        elif isinstance(own, Slots) and hasattr(inner, "_recodes"):
            coded = inner._recodes(spec)
        others = 0.0
        if melted is not None:
            others = melted[cut if melted.ndim == 1 else (l, b, h)]
        yield l, b, h, mine, coded, others


def reads(cache: Cache, new: Any) -> np.ndarray:
    """Which tokens held one new row reads in each layer: bool [L, B, H, N], as in `Placed`.

    Of a reader that looks ahead: what each layer would choose by its own queries.

    Args:
      new: of `forward(..., cache, statistics=True)` for one row per sequence, or for the rows of a
        window (more than 16) where the reader chooses for all of them.
    """
    where = placed(cache)
    out = where.held.copy()
    for n in cache.chains:
        for number, stage, own in _stages(cache.transforms[n], cache.state[n]):
            if isinstance(stage, Store) and stage.reader is not None:
                carry = stage.start(own, new.seen.pos)
                for index, layer in enumerate(cache.groups[n]):
                    here = where.stage[layer] == number
                    read, carry = _read(cache, stage, own, index, layer, new, carry)
                    out[layer] &= ~here | read
    return out


def _read(
    cache: Cache, stage: Store, own: Stored, index: int, layer: int, new: Any, carry: Any
) -> tuple[np.ndarray, Any]:
    """Positions that a reader lets through, bool [B, H, N], and what it carries on."""
    seen, rope = new.seen, cache.constants["rope"][layer]
    q = seen.q[layer]
    raw = rotate(q, seen.pos[:, None], rope, inverse=True)
    columns = {name: x[layer, :, 0] for name, x in new.kv.extra.items()}
    query = Query(
        q, raw, seen.pos, rope, cache.constants["span"][layer], cache.constants,
        jnp.zeros(seen.pos.shape[:1], jnp.int32), cache.softcap, columns=columns,
    )  # fmt: skip
    of = lambda x: x[index if x.shape[0] > 1 else 0]  # noqa: E731
    held, page = of(own.seen), stage.reader.page
    coded = stage._coded(held)
    grouped = query.grouped(q, own.spec.kv_heads)
    if index < stage.reader.whole:
        return np.ones((own.spec.batch, own.spec.kv_heads, cache.max_length), bool), carry
    given = {name: of(cache.constants[name]) for name in stage.reader.constants}
    chosen, carry = stage.reader.choose(
        jax.tree.map(of, own.index), jnp.asarray(index), query, grouped, coded // page, carry, given
    )
    if stage.reader.apart:  # what any query head of a key-value head reads
        chosen = chosen.reshape(*grouped.shape[:2], -1)
    pos, chosen, coded, held = (np.asarray(x) for x in (of(own.pos), chosen, coded, held))
    batch, heads = own.spec.batch, own.spec.kv_heads
    out = np.zeros((batch, heads, cache.max_length), bool)
    for b, h in np.ndindex(batch, heads):
        pick = lambda x: x[b, h % x.shape[1]]  # noqa: B023, E731
        pages = pick(chosen)
        number = (pages[pages >= 0, None] * page + np.arange(page)).reshape(-1)
        # The last page, while it is not full, and exact tokens are always read.
        rest = np.arange(pick(coded) // page * page, pick(held))
        at = pick(pos)[np.concatenate([number, rest]).astype(int)]
        out[b, h, at[at >= 0]] = True
    whole = stage.reader.reads_whole(jax.tree.map(of, own.index), query)
    return (out if whole is None else out | np.asarray(whole)[:, None, None]), carry
