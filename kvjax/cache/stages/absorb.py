"""`nearest`: how tokens that lose their place melt into those that stay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache import buffer
from kvjax.cache.types import KV, Spec

WORTH = "worth"  # column of a token's finite score, while it is decided who stays
WEIGHTS = ("count", "similarity", "score")
AT_ONCE = 2**20  # similarities of all layers that are computed at once; more: layer by layer


@dataclasses.dataclass(frozen=True)
class Absorb:
    """Base of merging rules: how tokens that lose their place melt into those that stay."""

    @property
    def extra(self) -> tuple[str, ...]:
        """Columns that the rule keeps in the survivors' buffer."""
        return ()

    @property
    def weighs(self) -> bool:
        """Whether tokens must bring the column `WORTH`."""
        return False

    def init(self, spec: Spec) -> dict[str, Array]:
        """What is remembered from one commit to the next; arrays [L, B, ...]."""
        return {}

    def __call__(
        self, survivors: KV, losers: KV, memory: dict[str, Array], layout: Any = None
    ) -> tuple[KV, Array, dict[str, Array]]:
        """Returns the survivors, which losers [L, B, H, M] were absorbed, and the memory.

        `layout`: how slots lie over devices, for writes; see `buffer.put_rows`.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Moving:
    """See `moving`."""

    rate: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"moving(rate={self.rate}): the part of what is new lies in [0, 1]")


def moving(rate: float = 0.5) -> Moving:
    """A threshold that follows what it is compared with.

        t <- mean of the similarities, the first time; rate mean + (1 - rate) t, from then on

    One threshold for all heads of a layer, per row; the mean is over the heads' losers.

    Args:
      rate: weight of the newest mean; 0: the first one stays.
    """
    return Moving(rate)


@dataclasses.dataclass(frozen=True)
class Nearest(Absorb):
    """See `nearest`."""

    threshold: float | Moving = 0.5
    weight: Literal["count", "similarity", "score"] = "count"
    values: bool = False
    direction: bool = False
    among: float = 1.0
    bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.threshold, Moving) and self.threshold < -1:
            raise ValueError(
                f"nearest(threshold={self.threshold}): a cosine lies in [-1, 1]; above 1 none joins"
            )
        if self.weight not in WEIGHTS:
            raise ValueError(f"nearest(weight={self.weight!r}): expected one of {WEIGHTS}")
        if not 0 <= self.among <= 1:
            raise ValueError(f"nearest(among={self.among}): a part of the whole lies in [0, 1]")

    @property
    def extra(self) -> tuple[str, ...]:
        return ("absorbed", "bias") if self.bias else ("absorbed",)

    @property
    def weighs(self) -> bool:
        return self.weight == "score" or self.among < 1

    def init(self, spec: Spec) -> dict[str, Array]:
        if not isinstance(self.threshold, Moving):
            return {}
        # -inf: none yet.
        return {"threshold": jnp.full((spec.layers, spec.batch, 1), -jnp.inf, jnp.float32)}

    def __call__(
        self, survivors: KV, losers: KV, memory: dict[str, Array], layout: Any = None
    ) -> tuple[KV, Array, dict[str, Array]]:
        layers, batch, heads = survivors.lead
        whole = lambda kv: jnp.broadcast_to(kv.pos >= 0, (layers, batch, heads, kv.size))  # noqa: E731
        here, there = whole(survivors), whole(losers)
        bulk = here.size * losers.size > AT_ONCE
        each = jax.lax.map if bulk else (lambda f, x: f(x))
        sides = (survivors.k, survivors.v, here, losers.k, losers.v)
        best, target = each(self._closest, sides)
        least, memory = self._least(best, there, memory)
        near = there & (best >= least) & self._candidates(survivors, losers, there)

        zeros = jnp.zeros((layers, batch, heads, losers.size))
        count = 1.0 + survivors.extra["absorbed"]
        more = 1.0 + losers.extra.get("absorbed", zeros)
        if self.weight == "count":
            mine, theirs = count, more
        elif self.weight == "similarity":
            mine, theirs = jnp.full(count.shape, math.e), jnp.exp(best)
        else:
            mine, theirs = survivors.extra[WORTH], losers.extra[WORTH]

        if losers.size == 1:
            # Nothing but the target changes.
            slot = jnp.where(near, target, -1)
            one = buffer.take(survivors, slot)
            mine = jnp.take_along_axis(mine, jnp.maximum(slot, 0), -1)
            rows = (one.k, one.v, mine, losers.k, losers.v, theirs, more)
            k, v = self._mean(*rows, lambda x: theirs[..., None] * x)
            return buffer.put(survivors, slot, self._counted(one, k, v, more), layout), near, memory

        def join(x: Any) -> Any:
            k, v, mine, lk, lv, theirs, target, near, more = x
            slots = k.shape[-2]
            to = jax.nn.one_hot(target, slots, dtype=jnp.float32) * near[..., None]
            sum_of = lambda w: jnp.einsum("...mn,...m->...n", to, w)  # noqa: E731
            got = sum_of(theirs)
            add = lambda x: jnp.einsum("...mn,...md->...nd", to, theirs[..., None] * x)  # noqa: E731
            joined = sum_of(more)
            return *self._mean(k, v, mine, lk, lv, got, joined, add), joined

        sides = (
            survivors.k, survivors.v, mine, losers.k, losers.v, theirs, target, near, more
        )  # fmt: skip
        k, v, joined = each(join, sides)
        return self._counted(survivors, k, v, joined), near, memory

    def _mean(
        self, k: Array, v: Array, mine: Array, lk: Array, lv: Array, got: Array, joined: Array,
        add: Callable[[Array], Array],
    ) -> tuple[Array, Array]:  # fmt: skip
        """Keys and values of slots after losers of weight `got` [..., N] joined; `add`: the
        weighted sum of the losers' rows for each slot."""
        total = jnp.where(mine + got > 0, mine + got, 1.0)[..., None]

        def mean(old: Array, new: Array) -> Array:
            # As a difference: whom nobody joins stays the same in every bit.
            return old + (add(new) - got[..., None] * old) / total

        k32 = k.astype(jnp.float32)
        if self.direction:
            turned = _unit(mean(_unit(k32), _unit(lk)))
            turned *= jnp.linalg.norm(k32, axis=-1, keepdims=True)
            key = jnp.where(joined[..., None] > 0, turned, k32)
        else:
            key = mean(k32, lk.astype(jnp.float32))
        value = mean(v.astype(jnp.float32), lv.astype(jnp.float32))
        return key.astype(k.dtype), value.astype(v.dtype)

    def _counted(self, slots: KV, k: Array, v: Array, joined: Array) -> KV:
        """The slots with new keys and values and the tokens that `joined` [..., N]."""
        absorbed = slots.extra["absorbed"] + joined
        extra = {**slots.extra, "absorbed": absorbed}
        if self.bias:
            extra["bias"] = jnp.log(1.0 + absorbed)
        return dataclasses.replace(slots, k=k, v=v, extra=extra)

    def _closest(self, sides: Any) -> tuple[Array, Array]:
        """(similarity to the closest survivor, which) of each loser, [..., M] each."""
        k, v, here, lk, lv = sides

        def cosine(loser: Array, survivor: Array) -> Array:
            return jnp.einsum("...md,...nd->...mn", _unit(loser), _unit(survivor))

        alike = cosine(lk, k)
        if self.values:  # a product of two negative cosines would say that opposites are alike
            alike = jnp.maximum(alike, 0.0) * jnp.maximum(cosine(lv, v), 0.0)
        alike = jnp.where(here[..., None, :], alike, -jnp.inf)
        return jnp.max(alike, -1), jnp.argmax(alike, -1).astype(jnp.int32)

    def _least(
        self, best: Array, there: Array, memory: dict[str, Array]
    ) -> tuple[Any, dict[str, Array]]:
        """The threshold, and what is remembered of it."""
        if not isinstance(self.threshold, Moving):
            return self.threshold, memory
        counted = there & jnp.isfinite(best)
        number = jnp.sum(counted, (2, 3))[..., None]
        mean = jnp.sum(jnp.where(counted, best, 0.0), (2, 3))[..., None] / jnp.maximum(number, 1)
        old, rate = memory["threshold"], self.threshold.rate
        follow = rate * mean + (1 - rate) * jnp.where(jnp.isneginf(old), 0.0, old)
        new = jnp.where(number > 0, jnp.where(jnp.isneginf(old), mean, follow), old)
        return new[..., None], {**memory, "threshold": new}

    def _candidates(self, survivors: KV, losers: KV, there: Array) -> Array:
        """Losers that may join: those that, by falling worth, make up `among` of all worth."""
        if self.among == 1:
            return jnp.ones((), bool)
        worth = jnp.where(there, losers.extra[WORTH], 0.0)
        order = jnp.argsort(-worth, -1, stable=True)
        sorted_ = jnp.take_along_axis(worth, order, -1)
        before = jnp.cumsum(sorted_, -1) - sorted_
        before = jnp.take_along_axis(before, jnp.argsort(order, -1), -1)
        kept = jnp.where(survivors.pos >= 0, survivors.extra[WORTH], 0.0)
        kept = jnp.sum(kept, -1, keepdims=True)
        return kept + before < self.among * (kept + jnp.sum(worth, -1, keepdims=True))


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1.0)


def nearest(
    threshold: float | Moving = 0.5,
    weight: Literal["count", "similarity", "score"] = "count",
    *,
    values: bool = False,
    direction: bool = False,
    among: float = 1.0,
    bias: bool = False,
) -> Absorb:
    """A loser joins the survivor whose key is closest in direction, if close enough.

        x_j <- (w_j x_j + sum_i w_i x_i) / (w_j + sum_i w_i),  i -> j = argmax_j cos(k_i, k_j)

    for keys and values. The column "absorbed" counts who joined. Losers below the threshold flow
    on; so they do if it is above 1.

    Args:
      threshold: least similarity, or `moving(...)`.
      weight: "count": tokens that each stands for; "similarity": exp(cos), the survivor's with
        itself being 1; "score": what each is worth.
      values: similarity is the product of the cosines of keys and of values, negative ones 0.
      direction: of keys the directions are averaged; a survivor's key keeps its norm.
      among: only those losers join that, by falling score, make up this part of the sum of all
        scores, survivors first.
      bias: the column "bias", added to logits, is the log of the tokens that a slot stands for.

    Raises:
      ValueError: a threshold below -1, an unknown weight, a part outside [0, 1].
    """
    return Nearest(threshold, weight, values, direction, among, bias)
