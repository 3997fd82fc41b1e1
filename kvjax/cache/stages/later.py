"""`later`: a stage for what comes after the prompt, which passes it by."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache.stage import Column, Commit, Stage
from kvjax.cache.stages.passing import Around
from kvjax.cache.types import KV, Spec


@dataclasses.dataclass(frozen=True)
class Later(Around):
    """See `later`."""

    inner: Stage

    def __post_init__(self) -> None:
        if self.inner.statistics or self.inner.first_only or self.inner.once:
            raise ValueError(f"later({self.inner}): this stage acts on the prompt")

    @property
    def streaming(self) -> bool:
        return self.inner.streaming

    @property
    def by_arrival(self) -> bool:
        return self.inner.by_arrival

    @property
    def in_order(self) -> bool:
        return self.inner.in_order

    @property
    def columns(self) -> tuple[Column, ...]:
        return self.inner.columns

    def _own(self, spec: Spec) -> Spec:
        return spec.replace(max_length=max(spec.max_length - spec.prompt, 1), prompt=0)

    def init(self, spec: Spec) -> Any:
        return self.inner.init(self._own(spec))

    def downstream(self, spec: Spec) -> Spec | None:
        own = self.inner.downstream(self._own(spec))
        if own is None:
            return spec.replace(max_length=spec.prompt) if spec.prompt else None
        return own.replace(max_length=spec.prompt + own.max_length, prompt=spec.prompt)

    def start(self, state: Any, pos: Array) -> Any:
        return self.inner.start(state, pos)

    def commit(self, state: Any, kv: KV, context: Commit) -> tuple[Any, KV]:
        if context.phase == "prefill":
            return state, kv
        state, over = self.inner.commit(state, kv, context)
        if over is None and not context.last:  # it keeps all
            over = dataclasses.replace(kv, pos=jnp.full_like(kv.pos, -1))
        return state, over

    def releases(self, state: Any, kv: KV) -> Array:
        return jnp.asarray(self.inner.releases(state, kv))

    def observe(self, state: Any, columns: tuple[Column, ...], context: Commit) -> Any:
        return self.inner.observe(state, columns, context)

    def horizon(self, state: Any) -> tuple[Array, bool]:
        return self.inner.horizon(state)


def later(stage: Stage) -> Later:
    """The stage for all that comes after a prompt; tokens of the prompt pass by.

    `chain(later(recent(0, release=100)), store(codec))` codes a prompt at once, and what comes
    later 100 tokens together. At the end of a chain, `later(store())` forgets what of a prompt
    comes that far.

    Raises:
      ValueError: a stage that acts on the prompt.

    >>> from kvjax.cache import recent
    >>> later(recent(8)) == later(recent(8))
    True
    """
    return Later(stage)
