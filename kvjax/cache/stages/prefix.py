"""`prefix`: tokens that several rows of a batch share, held once and read once for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.attention import attend_slots
from kvjax.cache.stage import FOREVER, Commit, Stage
from kvjax.cache.types import KV, Partial, Query, Spec


@dataclasses.dataclass(frozen=True)
class Prefix(Stage):
    """See `prefix`."""

    name: str = "prefix"

    @property
    def every_layer(self) -> bool:
        return True

    def given(self, constants: Mapping[str, Any], batch: int) -> tuple[Array, int] | None:
        shared = constants.get(self.name)
        if shared is None:
            return None
        sequences = shared.pos.shape[1]
        if batch % sequences:
            raise ValueError(
                f"constants[{self.name!r}] holds {sequences} sequences, each shared by as many "
                f"rows, but batch={batch} is no multiple of that"
            )
        return jnp.repeat(shared.count[0, :, 0], batch // sequences), shared.size

    def init(self, spec: Spec) -> Array:
        return jnp.zeros((spec.batch,), jnp.int32)

    def downstream(self, spec: Spec) -> Spec:
        return spec

    def attend(
        self, state: Array, layer: Array, query: Query, carry: Any
    ) -> tuple[Partial | None, Any]:
        shared: KV | None = query.constants.get(self.name)
        if shared is None:
            return None, carry
        batch, heads, rows, width = query.q.shape
        sequences = shared.pos.shape[1]
        each = batch // sequences

        def together(x: Array) -> Array:
            """[B, Hq, T, D] -> [S, Hq, B / S * T, D]: the rows of a sequence as rows of one query,
            so that its keys meet all of them in one matrix product per head."""
            x = jnp.moveaxis(x.reshape(sequences, each, *x.shape[1:]), 1, 2)
            return x.reshape(sequences, heads, each * rows, width)

        pos = query.pos.reshape(sequences, each * rows)
        merged = dataclasses.replace(
            query, q=together(query.q), raw=together(query.raw), pos=pos, kernels="xla"
        )
        part = attend_slots(shared, layer, merged)

        def apart(x: Array) -> Array:
            x = x.reshape(sequences, heads, each, rows, *x.shape[3:])
            return jnp.moveaxis(x, 2, 1).reshape(batch, heads, rows, *x.shape[4:])

        return Partial(*(apart(x) for x in (part.out, part.max, part.sum))), carry

    def commit(self, state: Array, kv: KV, context: Commit) -> tuple[Array, KV]:
        return state, kv

    def held(self, state: Array) -> Array:
        return state * 0

    def horizon(self, state: Array) -> tuple[Array, bool]:
        return jnp.full(state.shape, FOREVER), False


def prefix(name: str = "prefix") -> Prefix:
    """Tokens that rows of the batch share, held once and read once (Hydragen, arXiv 2402.05099).

    The tokens are a constant of the cache: `constants[name]` is a KV of S sequences, k, v
    [L, S, H, N, D] and pos [1, S, 1, N] (-1: none), keys rotated; `kvjax.decode.share` makes it.
    Row j of a batch of B has sequence floor(j S / B), and all rows of a sequence attend to it by
    one matrix product per head. Where no such constant is given there is no prefix. Everything
    committed flows on; several stages with other names make a tree.
    """
    return Prefix(name)


def level(number: int) -> str:
    """The name of the constant that holds that level of a tree of prefixes, 0 the root.

    >>> level(0), level(1)
    ('prefix', 'prefix_1')
    """
    return f"prefix_{number}" if number else "prefix"
