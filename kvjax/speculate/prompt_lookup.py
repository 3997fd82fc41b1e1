"""Prompt lookup: what followed when the newest tokens stood in the text before."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from kvjax.speculate.drafter import Context, Drafter
from kvjax.speculate.tree import Tree, chain_of


@dataclasses.dataclass(frozen=True)
class PromptLookup(Drafter):
    """See `prompt_lookup`."""

    length: int = 10
    ngram: int = 3
    match: Literal["earliest", "latest"] = "earliest"
    least: int = 10

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"prompt_lookup(length={self.length}): at least 1 token is drafted")
        if self.ngram < 1:
            raise ValueError(f"prompt_lookup(ngram={self.ngram}): at least 1 token is looked up")
        if self.match not in ("earliest", "latest"):
            raise ValueError(
                f"prompt_lookup(match={self.match!r}): expected 'earliest' or 'latest'"
            )
        if not 1 <= self.least <= self.length:
            raise ValueError(
                f"prompt_lookup(least={self.least}): between 1 and length={self.length}"
            )

    def draft(self, state: Any, context: Context) -> Tree:
        guesses = continuation(
            context.tokens, context.length, self.ngram, self.length, self.least,
            latest=self.match == "latest",
        )  # fmt: skip
        return chain_of(jnp.concatenate([context.root[:, None], guesses], 1))


def continuation(
    tokens: Array, length: Array, ngram: int, width: int, least: int, latest: bool
) -> Array:
    """The tokens that followed an earlier occurrence of the last m tokens, m = ngram down to 1.

    Args:
      tokens: int32 [B, S], -1 where unknown (never matched). length: int32 [B], tokens in each row.
      width: tokens wanted. least: how many must be there for an occurrence to count.
      latest: take the last of several occurrences; False: the first.

    Returns:
      int32 [B, width], -1 where there is none.

    >>> text = jnp.asarray([[5, 6, 7, 8, 5, 6, -1]])
    >>> continuation(text, jnp.asarray([6]), 2, 3, 1, False).tolist()
    [[7, 8, 5]]
    """
    batch, size = tokens.shape
    start = jnp.arange(size, dtype=jnp.int32)
    found = jnp.full((batch,), -1, jnp.int32)  # where the continuation begins
    run = jnp.ones((batch, size), bool)
    for m in range(1, ngram + 1):
        # run[s]: the m tokens that end before s are the last m tokens.
        at = jnp.maximum(length - m, 0)
        last = jnp.take_along_axis(tokens, at[:, None], 1)
        before = jnp.pad(tokens, ((0, 0), (m, 0)), constant_values=-1)[:, :size]
        run &= (before == last) & (before >= 0) & (length >= m)[:, None]
        fits = run & (start + least <= length[:, None])
        place = jnp.where(fits, start, -1 if latest else size)
        place = jnp.max(place, 1) if latest else jnp.min(place, 1)
        found = jnp.where(jnp.any(fits, 1), place, found)  # a longer match wins
    at = found[:, None] + jnp.arange(width)
    there = (found >= 0)[:, None] & (at < length[:, None])
    return jnp.where(there, jnp.take_along_axis(tokens, jnp.minimum(at, size - 1), 1), -1)


def prompt_lookup(
    length: int = 10,
    ngram: int = 3,
    match: Literal["earliest", "latest"] = "earliest",
    least: int | None = None,
) -> Drafter:
    """A chain copied from the text so far: what followed the newest tokens when they stood before.

    Looks for the last `ngram` tokens in prompt and output, then for fewer, down to one. Gains where
    the output repeats its input or itself: summaries, answers from a text, code.

    Args:
      length: tokens drafted.
      ngram: tokens looked up at first.
      match: which of several occurrences.
      least: tokens that must follow an occurrence for it to count; None: all of `length`, the
        original's rule, which cannot see a repetition that has just begun; 1 sees it.

    Raises:
      ValueError: a size out of range.

    Source: Prompt Lookup Decoding, Saxena 2023 (github.com/apoorvumang/prompt-lookup-decoding);
    length, ngram and match are its defaults.

    >>> prompt_lookup() == prompt_lookup(length=10, ngram=3, match="earliest", least=10)
    True
    """
    return PromptLookup(length, ngram, match, length if least is None else least)
