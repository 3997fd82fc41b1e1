"""`cluster`: neighbours with like keys become one slot that stands for all of them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.share import Share, tokens_of
from kvjax.cache.stage import FOREVER, Commit, most
from kvjax.cache.stages.windows import Slots, SlotStage
from kvjax.cache.types import KV, Spec


@dataclasses.dataclass(frozen=True)
class Cluster(SlotStage):
    """See `cluster`."""

    n: int | Share
    chunk: int = 64
    first: int = 0
    recent: int = 0
    release: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        if self.chunk < 2 or self.chunk % 2:
            raise ValueError(f"cluster(chunk={self.chunk}): expected an even number of tokens")
        for name in ("first", "recent"):
            if getattr(self, name) < 0:
                raise ValueError(f"cluster({name}={getattr(self, name)}): expected at least 0")
        if self.release < 1:
            raise ValueError(f"cluster(release={self.release}): expected at least 1")
        if isinstance(self.n, int):
            self._size(self.n)

    def _size(self, n: int) -> int:
        if n <= self.first + self.recent:
            raise ValueError(
                f"cluster(n={n}): {self.first} first and {self.recent} recent tokens never merge, "
                "so at least one slot more is needed"
            )
        return n

    @property
    def streaming(self) -> bool:
        return False

    def init(self, spec: Spec) -> Slots:
        n = self._size(tokens_of(self.n, spec))
        spec = spec.replace(per_layer=True, per_head=True)
        extra = ("absorbed", "bias") if self.bias else ("absorbed",)
        extra = tuple(name for name in extra if name not in spec.columns)
        return self._empty(spec, min(n + self.release, spec.max_length), extra)

    def downstream(self, spec: Spec) -> None:
        return None

    def releases(self, state: Slots, kv: KV) -> bool:
        return False

    def commit(self, state: Slots, kv: KV, context: Commit) -> tuple[Slots, KV]:
        spec = state.spec
        n, slots = tokens_of(self.n, spec), state.kv.size
        arrived = jnp.broadcast_to(kv.count, spec.lead)
        kv = dataclasses.replace(kv, extra={c: buffer.column(kv, c) for c in state.kv.extra})
        kv = self._store(kv, spec)
        if kv.size == 1:  # there is always room for one
            slot = jnp.where(kv.pos >= 0, state.kv.count[..., None], -1)
            held = buffer.put(state.kv, slot, kv, context.layout)
        else:
            held = buffer.by_position(buffer.concat(state.kv, kv))
        if n + self.release <= spec.max_length:
            full = jnp.any(held.count >= n + self.release)
            held = jax.lax.cond(full, lambda held: self._shrink(held, n), lambda held: held, held)
        if held.size != slots:
            held = buffer.head(held, slots)
        return state.replace(kv=held, seen=state.seen + arrived), buffer.head(kv, 0)

    def _shrink(self, held: KV, n: int) -> KV:
        """Contracts heads that are full until they hold n."""
        need = jnp.where(held.count >= n + self.release, held.count - n, 0)

        def more(state: tuple[KV, Array, Array]) -> Array:
            return state[2] & jnp.any(state[1] > 0)

        def once(state: tuple[KV, Array, Array]) -> tuple[KV, Array, Array]:
            kv, need, _ = state
            after = self._contract(kv, need)
            left = need - (kv.count - after.count)
            return after, left, jnp.any(left < need)

        state = (buffer.by_position(held), need, jnp.ones((), bool))
        return jax.lax.while_loop(more, once, state)[0]

    def _contract(self, kv: KV, need: Array) -> KV:
        """One pass over tokens in order: at most `need` [L, B, H] of them join another."""
        half = self.chunk // 2
        chunks = -(-max(kv.size - self.first, 1) // self.chunk)
        length = chunks * self.chunk
        index = jnp.arange(kv.size)
        inside = (index >= self.first) & (index < (kv.count - self.recent)[..., None])

        def cut(x: Array) -> Array:
            """[L, B, H, N, ...] -> [L, B, H, chunks, half, 2, ...]: even and odd tokens."""
            x = x[:, :, :, self.first :]
            pad = [(0, length - x.shape[3] if axis == 3 else 0) for axis in range(x.ndim)]
            return jnp.pad(x, pad).reshape(*x.shape[:3], chunks, half, 2, *x.shape[4:])

        def pair(x: Array) -> tuple[Array, Array]:
            x = cut(x)
            return x[:, :, :, :, :, 0], x[:, :, :, :, :, 1]

        k, v = (x.astype(jnp.float32) for x in (kv.k, kv.v))
        size = 1.0 + kv.extra["absorbed"]
        norm = jnp.linalg.norm(k, axis=-1, keepdims=True)
        ua, ub = pair(k / jnp.where(norm > 0, norm, 1.0))
        ia, ib = pair(inside)
        na, nb = pair(size)
        alike = jnp.einsum("...ad,...bd->...ab", ua, ub)
        alike = jnp.where(ib[..., None, :] & ia[..., :, None], alike, -jnp.inf)
        best, to = jnp.max(alike, -1), jnp.argmax(alike, -1)
        # The most alike of all chunks; among equals the earlier.
        flat = best.reshape(*best.shape[:3], -1)
        place = jnp.argsort(jnp.argsort(-flat, -1, stable=True), -1).reshape(best.shape)
        joins = (place < need[..., None, None]) & (best > -jnp.inf)
        weight = jax.nn.one_hot(to, half, dtype=jnp.float32) * (joins * na)[..., None]
        more = jnp.sum(weight, -2)
        total = jnp.maximum(nb + more, 1.0)  # 0 beyond the end

        def join(x: Array) -> Array:
            a, b = pair(x)
            add = jnp.einsum("...ab,...ad->...bd", weight, a)
            return back(x, a, b + (add - more[..., None] * b) / total[..., None])

        def back(x: Array, a: Array, b: Array) -> Array:
            whole = jnp.stack([a, b], 5).reshape(*x.shape[:3], length, *x.shape[4:])
            rest = whole[:, :, :, : kv.size - self.first]
            return jnp.concatenate([x[:, :, :, : self.first], rest], 3)

        pa, pb = pair(kv.pos)
        number = back(size, na, total)
        extra = {**kv.extra, "absorbed": number - 1.0}
        if self.bias:
            extra["bias"] = jnp.log(number)
        pos = back(kv.pos, jnp.where(joins, -1, pa), pb)
        merged = KV(join(k).astype(kv.k.dtype), join(v).astype(kv.v.dtype), pos, extra)
        return buffer.compact(merged, pos >= 0)[0]

    def horizon(self, state: Slots) -> tuple[Array, bool]:
        n = tokens_of(self.n, state.spec)
        if n + self.release > state.spec.max_length:
            return jnp.full(state.seen.shape[1:2], FOREVER), True
        return n + self.release - most(state.kv.count), True


def cluster(
    n: int | Share,
    chunk: int = 64,
    first: int = 0,
    recent: int = 0,
    release: int = 1,
    bias: bool = True,
) -> SlotStage:
    """Holds everything that comes in n slots: like neighbours become one, their mean.

    When n + release tokens are held, all in between the first and the recent ones are cut into
    chunks, those of even and of odd place set against each other; every even one names the odd one
    of its chunk with the closest key, and of all chunks the closest pairs join, until n are left.
    In passes, if need be: one pass leaves at least half.

        k_b <- (N_b k_b + sum_a N_a k_a) / (N_b + sum_a N_a),  a joins b = argmax cos(k_a, k_b)

    and the same for values; N is how many tokens a slot stands for, and log N is added to its
    logits. A slot has the position of the token that others joined.

    Args:
      n: slots per row and head that are left, or a `share` of the prompt.
      chunk: even number of neighbours that can join one another.
      first, recent: slots at both ends that never join.
      release: how many more come before the next time; slots for n + release are allocated.
      bias: False: without log N.
    """
    return Cluster(n, chunk, first, recent, release, bias)
