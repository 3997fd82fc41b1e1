"""Exact stages: `first`, `recent`, `by_position`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.attention import attend_slots
from kvjax.cache.ring import Window, tree_gather, tree_write
from kvjax.cache.share import Share, tokens_of
from kvjax.cache.stage import (
    FOREVER,
    Commit,
    Stage,
    exact,
    least,
    most,
    observe_slots,
    room_of,
    total,
)
from kvjax.cache.types import KV, Partial, Query, Spec, pytree, rotate
from kvjax.codecs import as_pair, joins_heads


@pytree("spec")
class Slots:
    """State of an exact stage.

    Attributes:
      kv: the buffer, slots in any order.
      seen: int32 [L or 1, B, H or 1], tokens that have arrived here.
      memory: what else a stage remembers, arrays [L or 1, B, H or 1].
    """

    kv: KV
    seen: Array
    spec: Spec
    memory: dict[str, Array] = dataclasses.field(default_factory=dict)

    def replace(self, **changes: Any) -> Slots:
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class SlotStage(Stage):
    """What the exact stages share: storing, reading, and updating the columns of a buffer.

    With a codec the slots hold coded tokens; only codecs that code each token by itself can, since
    slots are replaced one by one.
    """

    def _pair(self, width: int | None = None) -> Any:
        codec = getattr(self, "codec", None)
        if codec is None:
            return None
        pair = as_pair(codec)
        for name, part in (("keys", pair.k), ("values", pair.v)):
            if part.block != 1:
                raise ValueError(
                    f"{type(self).__name__.lower()}(codec={codec}): the codec of {name} codes "
                    f"{part.block} tokens together, but slots are replaced one by one; use a "
                    "codec of single tokens, such as quantize(4, axis='token')"
                )
            if joins_heads(part):
                raise ValueError(
                    f"{type(self).__name__.lower()}(codec={codec}): the codec of {name} codes "
                    "several heads together; only a store does that"
                )
            if width is not None:
                part.check(width)
        return pair

    def _recodes(self, spec: Spec) -> bool:
        """Whether a token changes when it is stored."""
        pair = self._pair()
        return pair is not None and not (exact(pair.k, spec.dtype) and exact(pair.v, spec.dtype))

    def _empty(self, spec: Spec, slots: int, extra: tuple[str, ...] = ()) -> Slots:
        kv = buffer.empty(spec, slots, spec.columns + extra)
        if (pair := self._pair(spec.width)) is not None:
            lead = (spec.layers, spec.batch, spec.kv_heads)
            k, v = (c.empty(lead, slots, spec.width, spec.dtype) for c in (pair.k, pair.v))
            kv = dataclasses.replace(kv, k=k, v=v)
        return Slots(kv, jnp.zeros(spec.lead, jnp.int32), spec)

    def _store(self, kv: KV, spec: Spec) -> KV:
        """Tokens in flight -> as they are stored here."""
        if (pair := self._pair()) is None:
            cast = lambda x: x.astype(spec.dtype)  # noqa: E731
            return dataclasses.replace(kv, k=cast(kv.k), v=cast(kv.v))
        valid = jnp.broadcast_to(kv.pos >= 0, (*kv.lead, kv.size))
        return dataclasses.replace(kv, k=pair.k.encode(kv.k, valid), v=pair.v.encode(kv.v, valid))

    def _load(self, kv: KV, spec: Spec) -> KV:
        """The inverse of `_store`, for tokens that leave."""
        if (pair := self._pair()) is None:
            return kv
        k, v = pair.k.decode(kv.k, spec.dtype), pair.v.decode(kv.v, spec.dtype)
        return buffer.head(dataclasses.replace(kv, k=k, v=v), kv.size)

    def observe(self, state: Slots, columns: tuple, context: Commit) -> Slots:
        if not columns:
            return state
        loaded = self._load(state.kv, state.spec)
        extra = observe_slots(loaded, columns, context, state.spec.unrotated).extra
        return state.replace(kv=dataclasses.replace(state.kv, extra=extra))

    def held(self, state: Slots) -> Array:
        return most(state.kv.count)

    def tokens(self, state: Slots) -> Array:
        return total(state.kv.count, state.spec)

    def slots(self, state: Slots) -> int:
        return room_of(state.kv.pos, state.spec)

    def _read(self, state: Slots, layer: Array, query: Query, **how: Any) -> Partial:
        return attend_slots(
            state.kv, layer, query, unrotated=state.spec.unrotated, pair=self._pair(), **how
        )

    def attend(self, state: Slots, layer: Array, query: Query, carry: Any) -> tuple[Partial, Any]:
        return self._read(state, layer, query, used=most(state.seen)), carry


@dataclasses.dataclass(frozen=True)
class First(SlotStage):
    """See `first`."""

    n: int | Share
    positions: Literal["true", "slot"] | int = "true"
    codec: Any = None

    def __post_init__(self) -> None:
        self._pair()
        if not isinstance(self.n, Share) and self.n < 0:
            raise ValueError(f"first(n={self.n}): n must be at least 0")
        reach = isinstance(self.positions, int) and self.positions >= 0
        if self.positions not in ("true", "slot") and not reach:
            raise ValueError(
                f"first(positions={self.positions!r}): expected 'true', 'slot' or a distance"
            )

    @property
    def unrotated(self) -> bool:
        return not isinstance(self.positions, str)

    def init(self, spec: Spec) -> Slots:
        return self._empty(spec, min(tokens_of(self.n, spec), spec.max_length))

    def downstream(self, spec: Spec) -> Spec | None:
        n = tokens_of(self.n, spec)
        return spec.less(n) if spec.max_length > n else None

    def attend(self, state: Slots, layer: Array, query: Query, carry: Any) -> tuple[Partial, Any]:
        q = None
        if self.positions == "slot":
            # Close the gap that eviction left: the query moves, the stored keys do not.
            q = rotate(query.raw, (query.pos - query.gap[:, None])[:, None], query.rope)
        reach = None if isinstance(self.positions, str) else self.positions
        return self._read(state, layer, query, q=q, reach=reach), carry

    def releases(self, state: Slots, kv: KV) -> Array:
        return jnp.any(state.seen + kv.count > tokens_of(self.n, state.spec))

    def commit(self, state: Slots, kv: KV, context: Commit) -> tuple[Slots, KV]:
        slots = state.kv.size
        slot = state.seen[..., None] + jnp.arange(kv.size, dtype=jnp.int32)
        held = buffer.put(state.kv, slot, self._store(kv, state.spec), context.layout)
        taken = jnp.minimum(slots - jnp.minimum(state.seen, slots), kv.count)
        return state.replace(kv=held, seen=state.seen + kv.count), buffer.drop_first(kv, taken)

    def horizon(self, state: Slots) -> tuple[Array, bool]:
        coming = least(state.seen) < state.kv.size
        reach = jnp.where(coming & self._recodes(state.spec), 1, FOREVER)
        return reach, self.downstream(state.spec) is None


def first(
    n: int | Share, positions: Literal["true", "slot"] | int = "true", codec: Any = None
) -> First:
    """The first n tokens that arrive, exactly; all later ones flow on.

    Args:
      n: tokens kept per row, or a `share` of the prompt.
      positions: "true": keys are read at their positions. "slot": the query is read as if the
        tokens that the chain no longer holds had never been, so that distances count held tokens
        only (StreamingLLM, arXiv 2309.17453). A number: keys further back than that are read as if
        they stood so far back (held before rotation).
      codec: per-token codec, or per_kv of two; None: exact.

    >>> first(4) == first(4)
    True
    """
    return First(n, positions, codec)


@dataclasses.dataclass(frozen=True)
class Recent(SlotStage):
    """See `recent`."""

    n: int | Share
    release: int = 1
    codec: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.n, Share) and self.n < (1 if self.release == 1 else 0):
            raise ValueError(f"recent(n={self.n}): n must be at least 1, or 0 with a release")
        Window(1, self.release)
        self._pair()

    def _keeps_all(self, spec: Spec) -> bool:
        return spec.max_length < tokens_of(self.n, spec) + self.release

    def _window(self, spec: Spec) -> Window:
        # A window that can never be full needs no room for tokens about to leave.
        n = tokens_of(self.n, spec)
        return Window(spec.max_length) if self._keeps_all(spec) else Window(n, self.release)

    def init(self, spec: Spec) -> Slots:
        return self._empty(spec, self._window(spec).capacity)

    def downstream(self, spec: Spec) -> Spec | None:
        return None if self._keeps_all(spec) else spec.less(tokens_of(self.n, spec))

    def releases(self, state: Slots, kv: KV) -> Array:
        window = self._window(state.spec)
        return jnp.any(window.left(state.seen + kv.count) > window.left(state.seen))

    @property
    def light(self) -> bool:
        return self._pair() is None

    def commit(self, state: Slots, kv: KV, context: Commit) -> tuple[Slots, KV | None]:
        window, seen, held = self._window(state.spec), state.seen, state.kv
        total = seen + kv.count
        old = window.left(seen)
        number = old[..., None] + jnp.arange(window.leaving(kv.size), dtype=jnp.int32)
        number = jnp.where(number < window.left(total)[..., None], number, -1)
        rows = dataclasses.replace(
            self._store(kv, state.spec),
            pos=jnp.broadcast_to(kv.pos, (*held.pos.shape[:3], kv.size)),
            extra={name: buffer.column(kv, name) for name in held.extra},
        )

        def leave(held: KV) -> KV:
            over = tree_gather(window, held, rows, seen, number)
            over = dataclasses.replace(over, pos=jnp.where(number >= 0, over.pos, -1))
            return self._load(buffer.head(over, over.size), state.spec)

        over = None
        if not context.last:
            over = buffer.read_if(self.releases(state, kv), kv.size, leave, held)
        before = buffer.after(seen, *jax.tree.leaves(over))
        new = tree_write(window, held, rows, before, kv.count, context.layout)
        new = dataclasses.replace(new, pos=jnp.where(window.held(total) >= 0, new.pos, -1))
        return state.replace(kv=new, seen=total), over

    def horizon(self, state: Slots) -> tuple[Array, bool]:
        reach = least(self._window(state.spec).horizon(state.seen))
        if self._keeps_all(state.spec):
            reach = jnp.full_like(reach, FOREVER)
        return (jnp.ones_like(reach) if self._recodes(state.spec) else reach), True


def recent(n: int | Share, release: int = 1, codec: Any = None) -> Recent:
    """The newest n tokens exactly; older ones flow on, `release` at a time.

    Holds up to n + release - 1 tokens per row, in a ring: nothing is ever shifted.

    Args:
      n: tokens always held, at least 1 (with a release of several, 0), or a `share` of the prompt.
      release: how many leave together, oldest first (a group for a codec that needs one).
      codec: per-token codec, or per_kv of two; None: exact.
    """
    return Recent(n, release, codec)


@dataclasses.dataclass(frozen=True)
class ByPosition(SlotStage):
    """See `by_position`."""

    n: int
    codec: Any = None

    def __post_init__(self) -> None:
        self._pair()
        if self.n < 1:
            raise ValueError(f"by_position(n={self.n}): n must be at least 1")

    @property
    def first_only(self) -> bool:
        return True

    @property
    def by_arrival(self) -> bool:
        return False

    def init(self, spec: Spec) -> Slots:
        if spec.max_length > self.n:
            raise ValueError(
                f"by_position(n={self.n}) holds positions 0 to {self.n - 1}, but the cache is for "
                f"max_length={spec.max_length} tokens"
            )
        return self._empty(spec, spec.slots(self.n))

    def downstream(self, spec: Spec) -> Spec | None:
        return None

    def attend(self, state: Slots, layer: Array, query: Query, carry: Any) -> tuple[Partial, Any]:
        batch, slots = query.pos.shape[0], state.kv.size
        slot = query.pos - query.base(slots)
        slot = jnp.where((query.pos >= 0) & (slot >= 0), slot, slots)
        superseded = jnp.zeros((batch, slots), bool)
        superseded = superseded.at[jnp.arange(batch)[:, None], slot].set(True, mode="drop")
        used = jnp.max(state.kv.pos) + 1
        return self._read(state, layer, query, used=used, hidden=superseded), carry

    def releases(self, state: Slots, kv: KV) -> bool:
        return False

    def commit(self, state: Slots, kv: KV, context: Commit) -> tuple[Slots, None]:
        held = buffer.put(state.kv, kv.pos, self._store(kv, state.spec), context.layout)
        return state.replace(kv=held, seen=held.count), None

    def horizon(self, state: Slots) -> tuple[Array, bool]:
        reach = 1 if self._recodes(state.spec) else FOREVER
        return jnp.full(state.seen.shape[1:2], reach), True


def by_position(n: int, codec: Any = None) -> ByPosition:
    """Every token in the slot of its position; a token committed again replaces itself.

    For diffusion decoding: slots whose position is among the new rows are superseded and not
    read. Must stand first in a chain; nothing flows on.

    Args:
      n: slots, at least the longest sequence.
      codec: per-token codec, or per_kv of two; None: exact.
    """
    return ByPosition(n, codec)
