"""From logits to a token and a confidence for every candidate."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Confidence = Literal["probability", "margin", "entropy", "random", "left_to_right"]
CONFIDENCES = ("probability", "margin", "entropy", "random", "left_to_right")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How each candidate's token is chosen and how sure of it the decoder is; a value.

    Attributes:
      temperature: of the Gumbel noise added to the logits; 0: the most probable token.
      confidence: "probability" of the chosen token (LLaDA's low_confidence), "margin" between the
        two most probable tokens, "entropy" (negative), "random" (uniform), or "left_to_right".
      suppress: token ids that are never chosen (LLaDA's logits_eos_inf: the eos; the mask token).
      defer: token ids whose probability counts as 0, so that positions where they are chosen are
        committed last (LLaDA's confidence_eos_eot_inf: eos and end of turn).
    """

    temperature: float = 0.0
    confidence: Confidence = "probability"
    suppress: tuple[int, ...] = ()
    defer: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0 (0: greedy)")
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"confidence={self.confidence!r}: expected one of {', '.join(CONFIDENCES)}"
            )

    @property
    def random(self) -> bool:
        """Whether a key is needed."""
        return self.temperature > 0 or self.confidence == "random"

    def __call__(self, logits: Array, position: Array, keys: Array) -> tuple[Array, Array]:
        """Chooses.

        Args:
          logits: float32 [B, K, V] of K candidates per row.
          position: int32 [B, K].
          keys: PRNG keys [B, K], one per row, step and position, so that what is drawn depends
            neither on the rest of the batch nor on which positions are computed.

        Returns:
          (tokens int32 [B, K], confidence float32 [B, K]).
        """
        logits = without(logits.astype(jnp.float32), self.suppress)
        noisy = logits
        if self.temperature > 0:
            draw = lambda key: jax.random.gumbel(key, logits.shape[-1:])  # noqa: E731
            # argmax of l / T + Gumbel, scaled by T: no division by a small temperature.
            noisy = logits + self.temperature * jax.vmap(jax.vmap(draw))(keys)
        token = jnp.argmax(noisy, -1).astype(jnp.int32)
        if self.confidence == "random":
            draw = lambda key: jax.random.uniform(jax.random.fold_in(key, 1))  # noqa: E731
            return token, jax.vmap(jax.vmap(draw))(keys)
        if self.confidence == "left_to_right":
            return token, -position.astype(jnp.float32)
        logprob = jax.nn.log_softmax(without(logits, self.defer), -1)
        if self.confidence == "probability":
            return token, jnp.exp(jnp.take_along_axis(logprob, token[..., None], -1)[..., 0])
        p = jnp.exp(logprob)
        if self.confidence == "margin":
            best = jax.lax.top_k(p, 2)[0]
            return token, best[..., 0] - best[..., 1]
        return token, jnp.sum(jnp.where(p > 0, p * logprob, 0.0), -1)


def without(logits: Array, tokens: tuple[int, ...]) -> Array:
    """Logits with some tokens at -inf."""
    return logits.at[..., list(tokens)].set(-jnp.inf) if tokens else logits
