"""MiKV: no token left behind, the unimportant ones at few bits."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from kvjax.cache import (
    Chain,
    Commit,
    Fit,
    Spec,
    Statistic,
    accumulated_attention,
    chain,
    growth,
    heavy,
    recent,
    store,
)
from kvjax.codecs import balance, compose, per_kv
from kvjax.compress.common import bits_of, grouped, split

LIMITS = (1e-4, 1e4)


@dataclasses.dataclass(frozen=True)
class Maxima(Statistic):
    """Largest |query| (over a group's heads) and |key| per channel, float32 [L, B, H, D] each."""

    name: str = "channel_maxima"

    def init(self, spec: Spec) -> dict[str, Array]:
        shape = (spec.layers, spec.batch, spec.kv_heads, spec.width)
        # Two arrays: what is donated may stand in a state only once.
        return {"q": jnp.zeros(shape, jnp.float32), "k": jnp.zeros(shape, jnp.float32)}

    def update(self, value: dict[str, Array], k: Array, context: Commit) -> dict[str, Array]:
        q, valid = jnp.abs(context.seen.q.astype(jnp.float32)), context.seen.pos >= 0
        q = jnp.max(jnp.where(valid[:, None, :, None], q, 0.0), 3)
        q = jnp.max(q.reshape(*value["q"].shape[:3], -1, q.shape[-1]), 3)
        k = jnp.max(jnp.abs(k.astype(jnp.float32)), 3)
        return {"q": jnp.maximum(value["q"], q), "k": jnp.maximum(value["k"], k)}


@dataclasses.dataclass(frozen=True)
class Balancer(Fit):
    """b = sqrt(max_t |q_t| / max_t |k_t|) per channel, over the whole prompt; 1 where either is 0.

    Queries as the cache sees them, with the attention scale: a constant factor, which quantising
    channels together does not feel.
    """

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return (Maxima(),)

    def init(self, spec: Spec) -> dict[str, Array]:
        return {"balance": jnp.ones((spec.layers, spec.batch, spec.kv_heads, spec.width))}

    def __call__(self, context: Commit) -> dict[str, Array]:
        top = context.stats[Maxima().name]
        some = (top["q"] > 0) & (top["k"] > 0)
        ratio = top["q"] / jnp.where(some, top["k"], 1.0)
        return {"balance": jnp.where(some, jnp.clip(jnp.sqrt(ratio), *LIMITS), 1.0)}


def mikv(
    keep: float | None = None,
    tokens: int | None = None,
    bits: int = 2,
    important_bits: int = 16,
    recent_part: float = 0.5,
    balanced: bool = True,
    grow: bool = False,
) -> Chain:
    """H2O's choice of important tokens, and all the others at few bits in place of being dropped.

        recent(n_recent) > heavy(n_heavy, accumulated_attention()) >
        store(per_kv(k=compose(balance(), quantize(bits, parts=2)), v=quantize(bits, parts=2)))

    Per token and head, two groups of half the channels each, so that no group mixes the halves
    that rotary embedding pairs. Keys are multiplied by b, queries divided by it, with
    b = sqrt(max |q| / max |k|) per channel over the prompt, frozen when it ends. A token that
    loses its importance is coded after the step that read it exactly, and stays where it is.

    Args:
      keep: important tokens per head as a fraction of the prompt, fixed when it ends (default
        0.2). tokens: a number in its place, at least 2.
      bits: of the other tokens, 1 to 8, or 16 for exact; 0: they are dropped (H2O).
      important_bits: of the important ones, 16 (exact) or 1 to 8.
      recent_part: the part of the important ones that goes to the newest.
      balanced: whether keys are balanced; False: plain quantisation.
      grow: whether the important ones stay the fraction `keep` of all tokens as more come (the
        newest keep their number); False: their number is that of the prompt.

    Raises:
      ValueError: both sizes, or tokens that are to grow; sizes or bits out of range; on init_cache,
        a head size that does not split into two groups.

    Source: No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision
    Quantization, arXiv 2402.18096 (equations 1 to 4).

    >>> from kvjax.compress.h2o import h2o
    >>> mikv(tokens=64, bits=0) == h2o(tokens=64)
    True
    """
    newest, best = split("mikv", keep, tokens, recent_part, default=0.2)
    bits_of("mikv", bits, least=0)
    if grow and tokens is not None:
        raise ValueError(
            f"mikv(tokens={tokens}, grow=True): give keep, the fraction that is to stay"
        )
    best = growth(0.2 if keep is None else keep, beside=newest) if grow else best
    high = bits_of("mikv", important_bits, "important_bits")
    codec = None if high == 16 else grouped(high, parts=2)
    kept = chain(recent(newest, codec=codec), heavy(best, accumulated_attention(), codec=codec))
    if bits == 0:
        return kept
    low = grouped(bits, parts=2)
    if not balanced or bits == 16:
        return chain(kept, store(low))
    return chain(kept, store(per_kv(k=compose(balance(), low), v=low), fit=Balancer()))
