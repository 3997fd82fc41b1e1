"""A tiny model, caches of several kinds, and drafters that know nothing, everything, or half."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache import (
    Window,
    accumulated_attention,
    chain,
    heavy,
    prune,
    recent,
    store,
    window_attention,
)
from kvjax.codecs import per_kv, quantize
from kvjax.models import Config, llama
from kvjax.speculate import Context, Drafter, Outcome, Template, Tree, chain_of, template

CONFIG = Config(29, 32, 48, 2, 4, 2, 8, tied=False)
BATCH, PROMPT, NEW = 3, 16, 24
ROOM = PROMPT + 2 * NEW
LENGTHS = jnp.asarray([16, 9, 13])
kivi = per_kv(k=quantize(2, axis="channel", group=8), v=quantize(4))
METHODS = {
    "dense": chain(store()),
    "h2o": chain(recent(4, release=4), heavy(5, accumulated_attention())),
    "kivi": chain(store(kivi, keys=Window(0, 8), values=Window(8, 8))),
    "snapkv": chain(prune(9, window_attention(4)), store()),
}
BUSHY = template(
    [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0, 0)]
)


def model() -> Any:
    """Sharper than random, so that the best two tokens are seldom close, and not repeating itself:
    its head is not its embedding, and attention has a say."""
    own = llama.init(CONFIG, jax.random.key(0))
    own.layers.v[...] = own.layers.v[...] * 4.0
    own.head[...] = own.head[...] * 4.0
    return own


def prompts() -> jax.Array:
    tokens = jax.random.randint(jax.random.key(1), (BATCH, PROMPT), 0, CONFIG.vocab_size)
    return jnp.where(jnp.arange(PROMPT) < LENGTHS[:, None], tokens, -1)


@dataclasses.dataclass(frozen=True)
class Guess(Drafter):
    """Adversarial: every node's token drawn at random, holes included."""

    shape: Template = BUSHY

    def draft(self, state: Any, context: Context) -> Tree:
        size = (context.root.shape[0], self.shape.size)
        tokens = jax.random.randint(context.key, size, -1, context.model.config.vocab_size)
        tokens = tokens.at[:, 0].set(context.root)
        return Tree(tokens, self.shape.parent(), self.shape.depth)


@dataclasses.dataclass(frozen=True)
class Oracle(Drafter):
    """Knows the answer (constants: int32 [B, S] by position), and errs at every `wrong`th place.

    The right token stands at the last of `branches` siblings; the others are wrong.
    """

    length: int = 5
    wrong: int = 0
    branches: int = 1

    def draft(self, state: Any, context: Context) -> Tree:
        at = context.length[:, None] + jnp.arange(self.length)
        answer = context.constants
        right = jnp.take_along_axis(answer, jnp.minimum(at, answer.shape[1] - 1), 1)
        right = jnp.where(at < answer.shape[1], right, 0)
        if self.wrong:
            right = jnp.where(at % self.wrong == 0, (right + 1) % CONFIG.vocab_size, right)
        others = [(right + 2 + i) % CONFIG.vocab_size for i in range(self.branches - 1)]
        levels = jnp.stack([*others, right], 2)  # [B, length, branches]
        tokens = jnp.concatenate([context.root[:, None], levels.reshape(len(levels), -1)], 1)
        spine = [0] + [self.branches * (i + 1) for i in range(self.length - 1)]
        parent = jnp.asarray([[-1] + [p for p in spine for _ in range(self.branches)]])
        return Tree(tokens, parent, self.length)


@dataclasses.dataclass(frozen=True)
class Scratch(Oracle):
    """A scratch row of noise below every node, run but not accepted."""

    def draft(self, state: Any, context: Context) -> Tree:
        tree = super().draft(state, context)
        size = tree.size
        tokens = jnp.concatenate([tree.tokens, jnp.full(tree.tokens.shape, -1)], 1)
        parent = jnp.concatenate([tree.parent, jnp.arange(size)[None]], 1)
        noise = jax.random.normal(context.key, (*tokens.shape, CONFIG.width))
        return Tree(tokens, parent, tree.depth + 1, embeddings=noise)


@dataclasses.dataclass(frozen=True)
class Drawn(Drafter):
    """A chain drawn from a fixed law per place; its state counts calls and keeps what it saw."""

    length: int = 2
    layers: tuple[int, ...] = ()

    @property
    def hidden(self) -> tuple[int, ...]:
        return self.layers

    def draft(self, state: Any, context: Context) -> Tree:
        logits = context.constants  # [length, V]
        batch = context.root.shape[0]
        shape = (batch, *logits.shape)
        tokens = jax.random.categorical(context.key, jnp.broadcast_to(logits, shape))
        tokens = jnp.concatenate([context.root[:, None], tokens.astype(jnp.int32)], 1)
        q = jnp.broadcast_to(jax.nn.softmax(logits, -1), shape)
        return chain_of(tokens, jnp.concatenate([jnp.zeros((batch, 1, shape[2])), q], 1))


@dataclasses.dataclass(frozen=True)
class Witness(Guess):
    """Its state keeps what `update` was given."""

    @property
    def hidden(self) -> tuple[int, ...]:
        return (1, CONFIG.layers)

    def init(self, model: Any, prompt: Any, max_length: int, constants: Any = None) -> Any:
        batch, size = prompt.shape[0], self.shape.size
        rows = jnp.zeros((batch, size, CONFIG.width))
        return {
            "calls": jnp.zeros((), jnp.int32),
            "hidden": {1: rows, CONFIG.layers: rows},
            "logits": jnp.zeros((batch, size, CONFIG.vocab_size)),
        }

    def update(self, state: Any, context: Context, outcome: Outcome) -> Any:
        return {
            "calls": state["calls"] + 1,
            "hidden": outcome.hidden,
            "logits": outcome.logits,
        }
