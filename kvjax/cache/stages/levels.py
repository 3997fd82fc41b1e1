"""`levels`: a finished prompt at two resolutions: relevant blocks as they are, others pooled."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.attention import received
from kvjax.cache.cache import Cache
from kvjax.cache.chain import Pending
from kvjax.cache.rules.groups import Grouped, Groups
from kvjax.cache.scores.score import LastRows
from kvjax.cache.share import as_fraction
from kvjax.cache.stage import Carried, Column, Commit, Statistic
from kvjax.cache.stages.mixing import POSITIONS, blocks_of, dense_blocks, mix, sources
from kvjax.cache.stages.passing import Passing, Stateless
from kvjax.cache.types import KV, New, Observation, Rope, Spec, rotate

RELEVANCE = "relevance"
SCORERS = ("attention", "mean")


@dataclasses.dataclass(frozen=True)
class Levels(Passing):
    """See `levels`."""

    groups: Groups
    stride: int = 4
    block: int = 4
    relevant: int = 4
    keep: Fraction = Fraction(1)
    positions: str = "contiguous"
    bias: bool = False
    window: int = 32
    by: str = "attention"
    turn: bool = True

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("block", 1), ("relevant", 0), ("window", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ValueError(f"levels({name}={number!r}): expected an integer >= {least}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"levels(keep={float(self.keep):g}): a part of all lies in (0, 1]")
        for name, known in (("positions", POSITIONS), ("by", SCORERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"levels({name}={getattr(self, name)!r}): expected one of {known}")

    @property
    def streaming(self) -> bool:
        return False

    @property
    def once(self) -> bool:
        return True

    @property
    def unrotated(self) -> bool:
        return True

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.groups.mark, *((Carried("bias"),) if self.bias else ()))

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (LastRows(f"last_{self.window}_rows", self.window),) if self.window else ()

    def _room(self, spec: Spec) -> int:
        return max(-(-spec.prompt * self.keep.numerator // self.keep.denominator), 1)

    def init(self, spec: Spec) -> Stateless:
        if spec.per_layer or spec.per_head or spec.totals is not None:
            raise ValueError(
                "levels(...): layers and heads hold the same tokens here; let it stand before "
                "stages by which they differ"
            )
        return super().init(spec)

    def downstream(self, spec: Spec) -> Spec:
        spec = spec.replace(unrotated=spec.unrotated and not self.turn)
        if not spec.prompt:
            return spec
        room = self._room(spec)
        return spec.replace(prompt=room, max_length=room + spec.max_length - spec.prompt)

    def _turned(self, kv: KV, context: Commit) -> KV:
        return dataclasses.replace(kv, k=context.rotated(kv, True)) if self.turn else kv

    def commit(self, state: Stateless, kv: KV, context: Commit) -> tuple[Stateless, KV]:
        spec = state.spec
        if context.phase != "prefill" or not spec.prompt:
            return state, self._turned(kv, context)
        grouped = self.grouped(kv)
        room = self._room(spec)
        worth = self._worth(kv, grouped, context)
        most = self.relevant
        if worth is None:  # nobody says what is relevant
            worth = jnp.zeros((kv.lead[1], blocks_in(kv.size, self.block)))
            most = worth.shape[1]
        dense = dense_blocks(grouped, worth, self.block, most, self.stride, room)
        kv = mix(
            kv, sources(grouped, dense, self.block, self.stride, room), self.positions, self.bias
        )
        return state, self._turned(kv, context)

    def grouped(self, kv: KV) -> Grouped:
        said = kv.extra.get(self.groups.name)
        return self.groups(None if said is None else said[0, :, 0], kv.pos[0, :, 0])

    def _worth(self, kv: KV, grouped: Grouped, context: Commit) -> Array | None:
        """Worth of blocks, float32 [B, N]: as given, or as the prompt's last rows say."""
        number = blocks_in(kv.size, self.block)
        given = context.stats.get(RELEVANCE)
        if given is not None:
            given = jnp.asarray(given, jnp.float32)
            if given.ndim != 2 or given.shape[0] != kv.lead[1]:
                raise ValueError(
                    f"stats[{RELEVANCE!r}] has shape {given.shape}: expected [{kv.lead[1]}, blocks]"
                )
            more = max(number - given.shape[1], 0)
            given = jnp.pad(given, ((0, 0), (0, more)), constant_values=-jnp.inf)
            return given[:, :number]
        if not self.window:
            return None
        rows = context.stats[self.statistics[0].name]
        seen = Observation(rows.q, rows.max, rows.sum, rows.pos, rows.span)
        return self.worth(kv, grouped, seen, context.rope, context.softcap)

    def worth(
        self, kv: KV, grouped: Grouped, seen: Observation, rope: Rope, softcap: float | None
    ) -> Array:
        """What rows that ask say of the blocks of a prompt: float32 [B, N].

        Args:
          kv: the prompt, keys before rotation. seen: the rows.
        """
        number = blocks_in(kv.size, self.block)
        own = blocks_of(grouped, self.block)
        row = jnp.arange(own.shape[0])[:, None]
        at = jnp.where(own >= 0, own, number)
        asks = (seen.pos >= 0).astype(jnp.float32)
        if self.by == "attention":
            got = received(rotate(kv.k, kv.pos, rope), kv.pos, seen, asks, softcap)
            got = jnp.mean(got, (0, 2))
            return jnp.zeros((own.shape[0], number)).at[row, at].add(got, mode="drop")
        q = rotate(seen.q.astype(jnp.float32), jnp.maximum(seen.pos, 0)[:, None], rope, True)
        q = jnp.einsum("lbhtd,bt->lbhd", q, asks)
        q = q / jnp.maximum(jnp.sum(asks, 1), 1.0)[:, None, None]
        heads = kv.lead[2]
        q = jnp.mean(q.reshape(*q.shape[:2], heads, -1, q.shape[-1]), 3)
        score = jnp.einsum("lbhd,lbhtd->bt", q, kv.k.astype(jnp.float32))
        score = score / (kv.lead[0] * heads)
        sums = jnp.zeros((2, own.shape[0], number))
        sums = sums.at[:, row, at].add(jnp.stack([score, jnp.ones_like(score)]), mode="drop")
        return sums[0] / jnp.maximum(sums[1], 1.0)


def blocks_in(tokens: int, block: int) -> int:
    """The most blocks of so many groups that a prompt can have: a group has two tokens or more,
    but for the last."""
    return -(-((tokens + 1) // 2) // block)


def levels(
    groups: Groups,
    stride: int = 4,
    block: int = 4,
    relevant: int = 4,
    keep: float | Fraction = 1,
    positions: Literal["contiguous", "original", "centre"] = "contiguous",
    bias: bool = False,
    window: int = 32,
    by: Literal["attention", "mean"] = "attention",
    turn: bool = True,
) -> Levels:
    """Of a complete prompt, relevant blocks flow on as they are, the others pooled along tokens.

        k~_t = mean of `stride` consecutive keys before rotation, v~_t of values

    Acts in `finish`; holds nothing. Prefix, end, carriers and text are never pooled; a block is
    some consecutive groups; the first and the last are always dense. Tokens of a group that fill no
    window are left out. Layers and heads choose alike.

    Until `finish` the chain holds the exact prompt. `finish` is pure: an unfinished cache can be
    finished once for each of several questions, with another relevance,

        logits, exact = prefill(model, video, method, columns=..., hold=True)
        _, new = forward(model, question, positions, exact, phase="append", statistics=True)
        cache = finish(exact, {"relevance": relevance(exact, new)})  # or float32 [B, blocks]
        logits, cache = extend(model, cache, question, positions)

    Otherwise the last rows of the prompt ask.

    Args:
      groups: what the tokens are.
      stride: tokens that become one. block: groups of a block.
      relevant: how many of the others are dense, the most relevant ones; those of -inf are not.
      keep: for which part of the prompt there is room, in (0, 1]. Blocks are dense as long as they
        fit in; where even the pooled ones do not, the oldest are left out.
      positions: "contiguous": numbered anew without gaps, up to where the prompt ends, so that
        later tokens keep their positions; "original": of the first of those pooled; "centre": of
        the middle one.
      bias: whether the log of how many tokens a slot stands for is added to its logits.
      window: last rows of a prompt that ask; 0: none, then all blocks are dense unless `finish` is
        told which are relevant.
      by: "attention": the attention that a block gets from the rows that ask, mean over layers and
        heads. "mean": mean query against mean key of the block, both before rotation.
      turn: whether keys leave rotated; False where a later stage wants them before rotation.

    Raises:
      ValueError: numbers out of range; on init, heads or layers that differ.

    >>> from kvjax.cache import groups
    >>> levels(groups(16)) == levels(groups(16), keep=1.0)
    True
    """
    return Levels(
        groups, stride, block, relevant, as_fraction(keep), positions, bias, window, by, turn
    )


def relevance(cache: Cache, new: New, by: str | None = None) -> Array:
    """What rows that ask say of the blocks of an unfinished prompt, for `finish(cache, stats)`.

    Args:
      cache: one with a stage `levels` that was not finished.
      new: from `forward(..., cache, phase="append", statistics=True)` of the question.
      by: see `levels`; None: as the stage says.

    Returns:
      float32 [B, blocks].

    Raises:
      ValueError: there is no such stage, or it was finished.
    """
    for n in cache.chains:
        state = cache.state[n]
        stage = next((s for s in cache.transforms[n].stages if isinstance(s, Levels)), None)
        if stage is None or not isinstance(state, Pending):
            continue
        stage = stage if by is None else dataclasses.replace(stage, by=by)
        at = np.asarray(cache.groups[n])
        seen = new.seen
        rows = Observation(seen.q[at], seen.max[at], seen.sum[at], seen.pos, seen.span[at])
        grouped = stage.grouped(state.kv)
        return stage.worth(state.kv, grouped, rows, cache.constants["rope"][at], cache.softcap)
    raise ValueError("relevance: this cache has no stage `levels` whose prompt is unfinished")


def named(units: Any, each: int = 1, blocks: int | None = None) -> Array:
    """The relevance of blocks that contain named units, as an outside retriever gives them.

        unit u belongs to block floor(u / each)

    Args:
      units: int [B, K], from 0; -1: none.
      each: units of a block. blocks: how many there are; None: up to the last one named.

    Returns:
      float32 [B, blocks], 1 where named, otherwise -inf.

    >>> named([[5, 0, -1]], each=2).tolist()
    [[1.0, -inf, 1.0]]
    """
    units = np.asarray(units)
    if each < 1 or units.ndim != 2:
        raise ValueError(f"named(units of shape {units.shape}, each={each}): expected [B, K], >= 1")
    own = np.where(units >= 0, units // each, -1)
    blocks = max(int(own.max(initial=0)) + 1, 1) if blocks is None else blocks
    return jnp.where(jnp.any(jnp.asarray(own)[:, :, None] == jnp.arange(blocks), 1), 1.0, -jnp.inf)
