"""Spans: runs of neighbouring tokens (sentences, chunks) that are found and read together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kvjax.cache.readers.reader import Reader
from kvjax.cache.stage import FOREVER, Column, Commit, TokenMark
from kvjax.cache.types import KV, Query, Spec, pytree


@dataclasses.dataclass(frozen=True)
class Ends(TokenMark):
    """Which tokens end a span; of a finished prompt, how many spans ended before each token."""

    def complete(self, old: Array, pos: Array) -> Array:
        ends = jnp.where(pos >= 0, old, 0.0)
        return jnp.cumsum(ends, -1) - ends


@dataclasses.dataclass(frozen=True)
class EndsIn(Ends):
    """See `ends_in`."""

    endings: tuple[str, ...] = ()

    @property
    def constants(self) -> tuple[str, ...]:
        return (self.name,)

    def listed(self, texts: Sequence[str]) -> np.ndarray:
        """bool [1, V]: which tokens of a vocabulary end a span, by their texts."""
        return np.asarray([[text.rstrip(" ").endswith(self.endings) for text in texts]])

    def of_tokens(self, tokens: Array, positions: Array, constants: Mapping) -> Array:
        ends = constants[self.name][0].astype(jnp.float32)
        return jnp.take(ends, tokens, mode="fill", fill_value=0.0)


def ends_in(*endings: str, name: str = "ends") -> Ends:
    """Spans end with every token whose text, but for spaces after it, ends in one of `endings`.

    The list of such tokens is a constant of the cache, bool [1, V]: see
    `kvjax.decode.token_lists`.

    >>> ends_in(".", "?").listed(["why?", "e.g", '."', ". "])[0].tolist()
    [True, False, False, True]
    """
    if not endings or not all(endings):
        raise ValueError(f"ends_in{endings}: expected endings of at least one character each")
    return EndsIn(name, endings)


@dataclasses.dataclass(frozen=True)
class EndsEvery(Ends):
    """See `ends_every`."""

    tokens: int = 1

    def of_tokens(self, tokens: Array | None, positions: Array, constants: Mapping) -> Array:
        return (positions % self.tokens == self.tokens - 1).astype(jnp.float32)


def ends_every(tokens: int, name: str = "ends") -> Ends:
    """Spans of `tokens` positions each, whatever the tokens say."""
    if tokens < 1:
        raise ValueError(f"ends_every({tokens}): a span has at least 1 token")
    return EndsEvery(name, tokens)


@pytree("later")
class Spans:
    """Index of `best_spans`: spans by their first token, which are runs of tokens by arrival.

    Attributes:
      total: float32 [L, B, H, S, D], the sum of each span's keys.
      first, count: int32 [L or 1, B, H or 1, S], a span's first token, and how many it has.
      newest: int32 [L or 1, B, H or 1], number of the newest token's span, -1: no token yet.
      ended, writing: bool, likewise: whether the newest token ended its span; whether that span is
        of tokens after the prompt and not ended.
      asked: float32 [L, B, H, D] ([L, B, Hq, D] where query heads choose apart), sum of the queries
        since the last end, after the prompt.
      times: int32 [1, B, 1], how many these are.
      later: of the S, those that a prompt leaves free for what comes after it; static.
    """

    total: Array
    first: Array
    count: Array
    newest: Array
    ended: Array
    writing: Array
    asked: Array
    times: Array
    later: int


@dataclasses.dataclass(frozen=True)
class BestSpans(Reader):
    """See `best_spans`."""

    ends: Ends = EndsEvery("ends", 1)
    first: int = 0
    recent: int = 0
    shortest: int = 8
    mean: bool = True
    whole_steps: int = 0
    each_query: bool = False

    def __post_init__(self) -> None:
        for name, least in (("first", 0), ("recent", 0), ("shortest", 1), ("whole_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"best_spans({name}={getattr(self, name)}): at least {least}")
        if self.pages <= self.first + self.recent:
            raise ValueError(
                f"best_spans(tokens={self.pages}): first={self.first} and recent={self.recent} are "
                "among them, so expected more than these"
            )

    @property
    def by_page(self) -> bool:
        return False

    @property
    def apart(self) -> bool:
        return self.each_query

    @property
    def columns(self) -> tuple[Column, ...]:
        return (self.ends,)

    @property
    def observes(self) -> bool:
        return self.mean or self.whole_steps > 0

    def init(self, spec: Spec, pages: int) -> Spans:
        growth = spec.max_length - spec.prompt
        spans = max(-(-(spec.whole_prompt + growth) // self.shortest), 1)
        spans = min(spans, max(spec.max_length, 1))
        head = (spec.layers, spec.batch, spec.kv_heads)
        return Spans(
            jnp.zeros((*head, spans, spec.width)),
            jnp.full((*spec.lead, spans), FOREVER, jnp.int32),
            jnp.zeros((*spec.lead, spans), jnp.int32),
            jnp.full(spec.lead, -1, jnp.int32),
            jnp.ones(spec.lead, bool),
            jnp.zeros(spec.lead, bool),
            jnp.zeros((*head[:2], spec.heads if self.apart else spec.kv_heads, spec.width)),
            jnp.zeros((1, spec.batch, 1), jnp.int32),
            min(-(-growth // self.shortest), spans - 1),
        )

    def note(self, index: Spans, kv: KV, seen: Array, context: Commit, unrotated: bool) -> Spans:
        if self.ends.name not in kv.extra:
            raise ValueError(
                f"a reader of spans needs the column {self.ends.name!r} of new tokens: call "
                "forward(..., cache) with the same cache, so that it makes it"
            )
        lead, size = seen.shape, index.first.shape[-1]
        there = jnp.broadcast_to(kv.pos >= 0, (*lead, kv.size))
        value = kv.extra[self.ends.name][: lead[0], :, : lead[2]]
        opens = self._opens(index, value, context)
        span = index.newest[..., None] + jnp.cumsum(opens, -1)
        if context.whole:  # where they are too many, neighbours are one
            count = jnp.max(jnp.where(there, span, 0), -1, keepdims=True) + 1
            most = size - index.later
            span = jnp.where(count > most, span * most // count, span)
        span = jnp.minimum(span, size - 1)
        at = jnp.where(there, span, size)
        grid = jnp.ogrid[: lead[0], : lead[1], : lead[2], :1][:3]
        number = seen[..., None] + jnp.arange(kv.size, dtype=jnp.int32)
        first = index.first.at[(*grid, at)].min(number, mode="drop")
        count = index.count.at[(*grid, at)].add(1, mode="drop")
        whole = kv.lead
        grid = jnp.ogrid[: whole[0], : whole[1], : whole[2], :1][:3]
        k = context.rotated(kv, unrotated).astype(jnp.float32)
        at = jnp.broadcast_to(at, (*whole, kv.size))
        total = index.total.at[(*grid, at)].add(k, mode="drop")
        # What the newest token leaves behind, where any came.
        last = jnp.sum(there, -1, keepdims=True) - 1
        newest = lambda x: jnp.take_along_axis(x, jnp.maximum(last, 0), -1)[..., 0]  # noqa: E731
        came = last[..., 0] >= 0
        prefill = context.phase == "prefill"
        ended = jnp.ones_like(came) if context.whole else newest(value) > 0
        writing = jnp.zeros_like(came) if prefill else ~ended
        index = dataclasses.replace(
            index, total=total, first=first, count=count,
            newest=jnp.where(came, newest(span), index.newest),
            ended=jnp.where(came, ended, index.ended),
            writing=jnp.where(came, writing, index.writing),
        )  # fmt: skip
        return index if prefill or not self.observes else self._ask(index, context)

    def _opens(self, index: Spans, value: Array, context: Commit) -> Array:
        """Which new tokens open a span, int32 [L or 1, B, H or 1, T]."""
        if context.whole:  # numbers of spans, some of which nothing may be left of
            before = jnp.concatenate([jnp.full_like(value[..., :1], -1), value[..., :-1]], -1)
            return (value != before).astype(jnp.int32)
        opening = index.ended if context.phase == "prefill" else ~index.writing
        return jnp.concatenate([opening[..., None], value[..., :-1] > 0], -1).astype(jnp.int32)

    def _ask(self, index: Spans, context: Commit) -> Spans:
        """Takes up the queries of new rows; those up to an end are forgotten."""
        there = context.seen.pos >= 0
        ends = there & (context.columns[self.ends.name][0, :, 0] > 0)
        after = there & (jnp.cumsum(ends[:, ::-1], 1)[:, ::-1] == 0)
        kept = ~jnp.any(ends, 1)
        q = jnp.where(after[None, :, None, :, None], context.seen.q.astype(jnp.float32), 0.0)
        asked = jnp.sum(q, 3).reshape(*index.asked.shape[:3], -1, q.shape[-1])
        return dataclasses.replace(
            index,
            asked=jnp.sum(asked, 3) + jnp.where(kept[None, :, None, None], index.asked, 0.0),
            times=jnp.sum(after, 1, dtype=jnp.int32)[None, :, None]
            + jnp.where(kept[None, :, None], index.times, 0),
        )

    def reads_whole(self, index: Spans, query: Query) -> Array | None:
        if not self.whole_steps:
            return None
        ended = query.columns[self.ends.name][:, 0] > 0
        few = jnp.where(ended, 0, index.times[:, 0] + 1) < self.whole_steps
        return few & (query.pos[:, 0] >= 0)

    def select(
        self, index: Spans, query: Query, q: Array, complete: Array, free: Array | None = None,
        constants: Mapping | None = None,
    ) -> Array:  # fmt: skip
        batch, heads, groups, width = q.shape
        own = groups if self.apart else 1  # choices for each key-value head
        asked = q.astype(jnp.float32).reshape(batch, heads, own, -1, width).sum(3)
        if self.mean:
            asked = asked + index.asked.reshape(asked.shape)
        complete = jnp.broadcast_to(complete, (batch, heads))[..., None]
        low = jnp.minimum(self.first, complete)
        high = jnp.maximum(complete - self.recent, low)
        # Of each span what lies between the first and the recent tokens, which are read anyhow.
        start, stop = (jnp.clip(x, low, high) for x in (index.first, index.first + index.count))
        length = stop - start
        mean = index.total / jnp.maximum(index.count, 1)[..., None]
        score = jnp.einsum("bhgd,bhsd->bhgs", asked, mean)
        # The span being written comes last: it is read where room is left.
        number = jnp.arange(score.shape[-1])
        open_ = (number == index.newest[..., None]) & index.writing[..., None]
        score = jnp.where(open_[:, :, None], jnp.finfo(jnp.float32).min, score)
        score = jnp.where((length > 0)[:, :, None], score, -jnp.inf)
        room = self.pages - self.first - self.recent
        best, span = jax.lax.top_k(score, min(room, score.shape[-1]))
        wide = lambda x: jnp.broadcast_to(x[:, :, None], (batch, heads, own, x.shape[-1]))  # noqa: E731
        take = lambda x: jnp.take_along_axis(wide(x), span, -1)  # noqa: E731
        length = jnp.where(jnp.isneginf(best), 0, take(length))
        ends = jnp.cumsum(length, -1)
        place = jnp.arange(room, dtype=jnp.int32)
        # Place j of the room belongs to the first span, best first, that ends behind it.
        find = lambda ends: jnp.searchsorted(ends, place, side="right")  # noqa: E731
        which = jnp.apply_along_axis(find, -1, ends)
        of = lambda x: jnp.take_along_axis(x, jnp.minimum(which, x.shape[-1] - 1), -1)  # noqa: E731
        token = of(take(start)) + place - (of(ends) - of(length))
        early, late = jnp.arange(self.first), high + jnp.arange(self.recent)
        always = [jnp.where(early < low, early, -1), jnp.where(late < complete, late, -1)]
        found = jnp.where(place < ends[..., -1:], token, -1)
        found = jnp.concatenate([*map(wide, always), found], -1).astype(jnp.int32)
        return found.reshape(batch, heads * own, -1)


def best_spans(
    tokens: int,
    ends: Ends,
    *,
    first: int = 0,
    recent: int = 0,
    shortest: int = 8,
    mean: bool = True,
    whole_steps: int = 0,
    each_query: bool = False,
) -> Reader:
    """Reads the tokens of the spans whose mean key has the largest product with what is asked.

        s = q . mean(k_j, j in span);  q the sum of queries since the last span ended, and over the
        query heads that share the keys

    Spans are taken best first, their tokens in order, until `tokens` are read; the last one is cut.
    Of a pruned prompt a span is what is left of it. Tokens after the prompt form spans of their
    own; the one being written is read only where room is left.

    Args:
      tokens: read per key-value head and step, the first and recent ones included.
      ends: which tokens end a span, such as `ends_in(".", "!", "?")`, `ends_every(16)`.
      first, recent: the oldest and the newest tokens held, always read.
      shortest: there is room for one span per so many tokens that can come (of the whole prompt,
        where it is pruned); if a finished prompt has more, neighbours are one, evenly; further ones
        of what is stored as it comes are one with the last.
      mean: ask with all queries since the last end; False: with the newest alone.
      whole_steps: so many queries at the beginning of each span after the prompt (the first is
        that of the token that ends the one before) read everything.
      each_query: every query head asks for itself, and reads `tokens` tokens of its own choice.
    """
    return BestSpans(tokens, 1, ends, first, recent, shortest, mean, whole_steps, each_query)
