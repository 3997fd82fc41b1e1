"""RotateKV: heads rotated together before rotary embedding, channels of like level in one group."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from kvjax.cache import Chain, InputMark, chain, chosen, marked, store
from kvjax.codecs import Codec, compose, per_kv, permute_heads, quantize, rotate, rotate_heads
from kvjax.compress.common import bits_of

ORDER = "rotatekv_order"
CLIP = {2: 0.8}


@dataclasses.dataclass(frozen=True)
class Peak(InputMark):
    """The largest |x| among the channels that a layer reads of a token."""

    name: str = "input_peak"

    def of_input(self, x: Array) -> Array:
        return jnp.max(jnp.abs(x.astype(jnp.float32)), -1)


def rotatekv(
    bits: int = 2,
    heads: int = 4,
    group: int | None = None,
    clip: float | None = None,
    sinks: int = 20,
    reorder: bool = True,
) -> Chain:
    """Coarse codes per token, of keys rotated before rotary embedding; massive tokens stay exact.

        chosen(sinks, marked(Peak())) > store(per_kv(
            k=compose(rotate_heads(heads), permute_heads(order), quantize(bits, "token", group)),
            v=compose(rotate("hadamard"), quantize(bits, "token", group))), rope="before")

    Channels of `heads` key heads are rotated by one Hadamard matrix (where the number of heads is
    no multiple: by the largest divisor), then put in ascending order of their calibrated mean over
    the whole layer, so that a group holds channels of one level. Reading undoes both and applies
    rotary embedding. Tokens are coded at once; the prompt attends to its exact keys and values.
    Needs calibration, unless `reorder` is False: python -m experiments.calibrate.

    Choices where paper and released code differ: the rotation comes first and the order acts on
    rotated channels, as released; clipping shrinks a group's range about its centre (as released,
    toward zero, it cuts one end alone where ordered channels are of one sign); levels are 2^b - 1;
    the mean is taken over keys of a model that attends to its exact keys; the minimum is stored,
    not a rounded zero point; sinks are the `sinks` tokens of largest entry, not the tokens of the
    20 largest entries, of which one token may have all: the room is the same.

    Args:
      bits: of a code, 1 to 8, or 16 for exact.
      heads: key heads rotated together, at most.
      group: consecutive channels that share a scale; None: the head size (128 in the paper, of
        heads of 128).
      clip: part of a group's range that codes cover; None: 0.8 at 2 bits, else 1.
      sinks: tokens of the prompt kept exactly, in each layer those whose input to the layer has
        the largest entries; 0: none.
      reorder: whether channels are put in the calibrated order.

    Raises:
      ValueError: arguments out of range; on init_cache, a head size that is no power of two, a
        group that does not divide it, or constants that are missing.

    Source: RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware
    Adaptive Rotations, arXiv 2501.16383.

    >>> rotatekv().stages[1].codec.bits(128)
    2.25
    """
    bits_of("rotatekv", bits)
    for name, number, least in (("heads", heads, 1), ("sinks", sinks, 0)):
        if not isinstance(number, int) or number < least:
            raise ValueError(f"rotatekv({name}={number!r}): expected an integer >= {least}")
    codec = _codec(bits, heads, group, clip, reorder)
    held = store() if codec is None else store(codec, rope="before")
    return chain(chosen(sinks, marked(Peak())), held) if sinks else chain(held)


def _codec(bits: int, heads: int, group: int | None, clip: float | None, reorder: bool) -> Any:
    if bits == 16:
        return None
    clip = CLIP.get(bits, 1.0) if clip is None else clip
    code: Codec = quantize(bits, "token", group, clip=clip)
    order = (permute_heads(ORDER),) if reorder else ()
    keys = compose(rotate_heads(heads), *order, code)
    return per_kv(k=keys, v=compose(rotate("hadamard"), code))
