"""A prefix that several rows share, run through the model once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache import KV, chain, first, prefix
from kvjax.cache.stages.prefix import level
from kvjax.decode.loop import prefill
from kvjax.models.llama import Model


def share(
    model: Model,
    tokens: Array,
    *,
    lengths: Array | None = None,
    under: Mapping[str, KV] | None = None,
    chunk: int | None = None,
    dtype: Any = None,
) -> dict[str, KV]:
    """Runs prefixes once, to be given to any number of rows.

        shared = share(model, system)                       # [1, N]
        tree = share(model, [one, other], under=shared)     # the first half of a batch has `one`
        logits, cache = prefill(model, questions, hydragen(levels=2), constants=tree, ...)

    Args:
      tokens: int32 [S, N] (or [N]), S sequences, right-padded; each will be shared by equally many
        neighbouring rows.
      lengths: int32 [S], tokens of each; None: all N.
      under: what this function gave for the levels above, which these tokens see; each of their
        sequences is the beginning of equally many of these.
      chunk, dtype: see `prefill`.

    Returns:
      `constants` for `prefill` and `init_cache`: `under`, and one level more.

    Raises:
      ValueError: S is no multiple of the sequences of a level above, or tokens have no such shape.
    """
    tokens = jnp.atleast_2d(jnp.asarray(tokens, jnp.int32))
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens has shape {tokens.shape}: expected [sequences, time], not empty")
    above = dict(under or {})
    names = [level(i) for i in range(len(above))]
    if set(names) != set(above):
        raise ValueError(f"under has {sorted(above)}: expected what `share` gave, {names}")
    held = chain(*(prefix(name) for name in names), first(tokens.shape[1]))
    _, cache = prefill(
        model, tokens, held, lengths=lengths, new_tokens=0, chunk=chunk, dtype=dtype,
        constants=above,
    )  # fmt: skip
    return {**above, level(len(above)): cache.state[0][-1].kv}
