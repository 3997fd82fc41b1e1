"""Bases of stages that hold nothing, and of stages around another stage that holds."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.stage import FOREVER, Stage
from kvjax.cache.types import Query, Spec, pytree


@pytree("spec")
class Stateless:
    """A state without arrays."""

    spec: Spec


class Passing(Stage):
    """A stage that holds nothing: all that is left of its tokens passes on."""

    def init(self, spec: Spec) -> Stateless:
        return Stateless(spec)

    def attend(self, state: Any, layer: Array, query: Query, carry: Any) -> tuple[None, Any]:
        return None, carry

    def held(self, state: Stateless) -> Array:
        return jnp.zeros((state.spec.batch,), jnp.int32)

    def horizon(self, state: Stateless) -> tuple[Array, bool]:
        return jnp.full((state.spec.batch,), FOREVER), False


class Around(Stage):
    """A stage that says which tokens come to another one, its field `inner`, which holds them."""

    @property
    def unrotated(self) -> bool:
        return self.inner.unrotated

    def constants(self, width: int) -> tuple[str, ...]:
        return self.inner.constants(width)

    def lasting(self, spec: Spec) -> tuple[str, ...]:
        """Columns that tokens still carry inside: not those that are only of use to come there."""
        brief = {column.name for column in self.columns if not column.lasting}
        return tuple(name for name in spec.columns if name not in brief)

    def attend(self, state: Any, layer: Array, query: Query, carry: Any) -> Any:
        return self.inner.attend(state, layer, query, carry)

    def held(self, state: Any) -> Array:
        return self.inner.held(state)

    def tokens(self, state: Any) -> Array | int:
        return self.inner.tokens(state)

    def slots(self, state: Any) -> int:
        return self.inner.slots(state)
