"""The state of a store."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from kvjax.cache.paging import Pool, Rectangle
from kvjax.cache.types import Spec, pytree


@pytree("spec")
class Stored:
    """State of a store.

    Attributes:
      seen: int32 [L or 1, B, H or 1], tokens that have arrived.
      pos: positions by order of arrival, and `extra` columns likewise.
      k, v: coded units. k_ring, v_ring: [L, B, H, capacity, D], exact tokens not coded yet.
      place: where units lie (`Rectangle` or `Pool`).
      fitted: constants of the codec found from the prompt. index: of the reader.
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

    def replace(self, **changes: Any) -> Stored:
        return dataclasses.replace(self, **changes)
