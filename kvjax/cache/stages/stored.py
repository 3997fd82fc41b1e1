"""The state of a store."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from kvjax.cache.memory import to_host
from kvjax.cache.paging import Pool, Rectangle
from kvjax.cache.types import Spec, pytree


@pytree("spec", "host")
class Stored:
    """State of a store.

    Attributes:
      seen: int32 [L or 1, B, H or 1], tokens that have arrived.
      pos: positions by order of arrival, and `extra` columns likewise.
      k, v: coded units. k_ring, v_ring: [L, B, H, capacity, D], exact tokens not coded yet.
      place: where units lie (`Rectangle` or `Pool`).
      fitted: constants of the codec found from the prompt. index: of the reader.
      host: whether k and v are to lie in host memory, where the platform has it; static.
    """

    seen: Array
    pos: Array
    extra: dict[str, Array]
    k: Any
    v: Any
    k_ring: Array
    v_ring: Array
    place: Rectangle | Pool
    fitted: dict[str, Array]
    index: Any
    spec: Spec
    host: bool = False

    def replace(self, **changes: Any) -> Stored:
        return dataclasses.replace(self, **changes)

    def settled(self) -> Stored:
        """With k and v in the memory where they are to lie."""
        if not self.host:
            return self
        k, v = to_host((self.k, self.v))
        return self.replace(k=k, v=v)
