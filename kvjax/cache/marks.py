"""What new tokens are marked with, by their ids and positions."""

from __future__ import annotations

from collections.abc import Mapping

from jax import Array

from kvjax.cache.cache import Cache


def token_columns(
    cache: Cache, tokens: Array | None, positions: Array, given: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """The columns of new tokens that a cache asks for and that their ids and positions say.

    Args:
      tokens: int32 [B, T], or None where only embeddings are known. positions: int32 [B, T].
      given: columns that are known already.

    Returns:
      `given` and the others, float32 [B, T] by name.
    """
    found = dict(given or {})
    wanted = (mark for n in cache.chains for mark in cache.transforms[n].token_marks)
    for mark in dict.fromkeys(wanted):
        if mark.name in found:
            continue
        if tokens is None and mark.constants:
            raise ValueError(
                f"the column {mark.name!r} is made from token ids, and there are embeddings alone: "
                f"give columns={{{mark.name!r}: ...}}, float32 [B, T]"
            )
        found[mark.name] = mark.of_tokens(tokens, positions, cache.constants)
    return found
