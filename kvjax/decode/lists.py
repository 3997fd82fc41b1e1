"""Lists of a vocabulary's tokens, for caches that mark tokens by them."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kvjax.cache import Chain
from kvjax.models.tokenizer import Tokenizer


def token_lists(tokenizer: Tokenizer, transform: Chain) -> dict[str, Array]:
    """The constants of a chain that are lists of tokens, bool [1, V] by name; {} if there are none.

    Put them among the constants of its cache: `prefill(..., constants=token_lists(...))`. Each
    token's text is looked at by itself; special tokens have none.
    """
    marks = [mark for mark in transform.token_marks if mark.constants]
    if not marks:
        return {}
    texts = tokenizer.decode_batch([[i] for i in range(len(tokenizer))])
    return {mark.name: jnp.asarray(mark.listed(texts)) for mark in marks}
