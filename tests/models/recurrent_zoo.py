"""Tiny models with recurrent layers, and a kind of layer as a reader would add it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.models import Config, init
from kvjax.models.linear import linear
from kvjax.models.mamba2 import Mamba2
from kvjax.models.recurrent import RecurrentLayer

BATCH, PROMPT, VOCAB = 2, 20, 61
LENGTHS = (20, 13)
KIND = Mamba2(heads=4, head_dim=8, state_size=8, groups=2, chunk=8)


@dataclasses.dataclass(frozen=True)
class Average(RecurrentLayer):
    """A gated running mean, s_t = a_t s_{t-1} + (1 - a_t) v_t, read through a gate."""

    width: int = 24

    def parameters(self, width):
        wide = ((self.width, width), ("inner", "embed"))
        return {
            "keep": wide,
            "value": wide,
            "read": wide,
            "out": ((width, self.width), wide[1][::-1]),
        }

    def init(self, layers, batch, dtype):
        return jnp.zeros((layers, batch, self.width), jnp.float32)

    def mix(self, layer, x, state, valid, shared, eps, split=False):
        product = lambda x, weight: linear(x, weight[...], split=split)  # noqa: E731
        keep = jnp.where(valid[..., None], jax.nn.sigmoid(product(x, layer.keep)), 1.0)
        rows = {"keep": keep, "add": (1 - keep) * product(x, layer.value)}
        s = self._scan(state, rows)[1]
        s = s * jax.nn.silu(product(x, layer.read))
        return product(s.astype(x.dtype), layer.out), rows

    def advance(self, state, rows, valid):
        there = valid[..., None]
        rows = {
            "keep": jnp.where(there, rows["keep"], 1.0), "add": jnp.where(there, rows["add"], 0.0)
        }  # fmt: skip
        return self._scan(state, rows)[0]

    def _scan(self, state, rows):
        def one(s, row):
            s = row["keep"] * s + row["add"]
            return s, s

        first = lambda x: jnp.moveaxis(x, -2, 0)  # noqa: E731
        last, every = jax.lax.scan(one, state, jax.tree.map(first, rows))
        return last, jnp.moveaxis(every, 0, -2)


CONFIGS = {
    "mamba2": Config(
        VOCAB, 16, 0, 3, 0, 0, 0, recurrence=KIND, recurrent_layers=(0, 1, 2), residual_float32=True
    ),
    "hybrid": Config(VOCAB, 16, 24, 5, 4, 2, 8, recurrence=KIND, recurrent_layers=(0, 1, 3)),
    "average": Config(VOCAB, 16, 24, 3, 4, 2, 8, recurrence=Average(), recurrent_layers=(0, 2)),
}


def model(name: str, dtype=jnp.float32):
    """Sharper than random: its best two tokens are seldom close."""
    own = init(CONFIGS[name], jax.random.key(0), dtype)
    own.embed[...] = own.embed[...] * 3
    return own


def prompts() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (BATCH, PROMPT), 0, VOCAB)
