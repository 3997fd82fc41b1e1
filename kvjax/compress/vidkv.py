"""VidKV: keys of wide and of plain channels apart, ternary values, salient tokens at more bits."""

import jax.numpy as jnp
from jax import Array

from kvjax.cache import Chain, Mark, Window, chain, chosen, marked, share, store
from kvjax.codecs import (
    Codec,
    compose,
    fourier,
    per_kv,
    quantize,
    signs,
    split_channels,
    ternary,
)

SALIENCE = Mark("salience")
VALUES = (1.58, 2, 16)


def vidkv(
    key_bits: float = 1.5,
    value_bits: float = 1.58,
    group: int = 32,
    residual: int = 128,
    threshold: float = 0.7,
    protect: float = 0.0,
    transform: bool = True,
    value_axis: str = "channel",
) -> Chain:
    """Keys at 2 bits in wide channels and 1 bit in the others, ternary values, per channel.

        chosen(share(protect), marked(salience), store(per_kv(k=mixed, v=quantize(2, "channel")))) >
        store(per_kv(k=mixed, v=ternary(group)), keys=values=Window(0, residual)),
        mixed = split_channels(key_bits - 1, quantize(2, "channel", group),
                               compose(fourier(), signs(group)))

    The plain channels of every token are Fourier transformed before their signs are coded. New
    tokens wait exactly until `residual` of them are coded; blocks are never coded again. Keys are
    coded after rotary embedding; the prompt attends to its exact keys and values.

    Salient tokens: where tokens bring a column "salience" (see `salience`), the best share
    `protect` of the prompt has its values at 2 bits; whatever is worth -inf (text) has not.

    Choices where paper and released code differ: signs read +-s (the released 0 and s have 1.9
    times the error on a Gaussian); the ternary scale is applied on reading, and is the mean of the
    numbers that are not zero; the Fourier transform is real, as many numbers as channels (complex
    parts take twice the bits); wide channels are found per KV head and block of tokens, and stored
    with it; old blocks stay as they are; the prompt is coded in the same blocks of `residual`.

    Args:
      key_bits: nominal bits of a key in [1, 2], 16 for exact; scales come on top.
      value_bits: 1.58 (ternary), 2, or 16 for exact.
      group: tokens of a channel that share a scale; must divide `residual`.
      residual: how many of the newest tokens are exact, at most.
      threshold: of ternary values, in units of a channel's mean magnitude.
      protect: share of the prompt whose values have 2 bits; 0: none.
      transform: whether plain channels are Fourier transformed.
      value_axis: "channel", or "token" (2 bits only): of the values' groups.

    Raises:
      ValueError: arguments out of range; on init_cache, a head size that does not split so.

    Source: Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models,
    arXiv 2503.16257.

    >>> vidkv().stages[0].codec.bits(64)  # (2.28 + 2.10) / 2: scales and masks included
    2.19140625
    """
    if not (key_bits == 16 or 1 <= key_bits <= 2):
        raise ValueError(f"vidkv(key_bits={key_bits!r}): expected 1 to 2, or 16 for exact")
    if value_bits not in VALUES:
        raise ValueError(f"vidkv(value_bits={value_bits!r}): expected one of {VALUES}")
    if value_axis not in ("channel", "token") or (value_axis == "token" and value_bits == 1.58):
        raise ValueError(
            f"vidkv(value_axis={value_axis!r}): expected 'channel', or 'token' at value_bits=2"
        )
    for name, number in (("group", group), ("residual", residual)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"vidkv({name}={number!r}): expected an integer of at least 1")
    if residual % group:
        raise ValueError(f"vidkv(group={group}): expected a divisor of residual={residual}")
    if not 0 <= protect <= 1:
        raise ValueError(f"vidkv(protect={protect!r}): a share of the prompt lies in [0, 1]")
    keys = mixed(key_bits, group, transform)
    values: Codec = ternary(group, threshold)
    if value_bits == 16:
        return chain(store(per_kv(k=keys, v=compose()), keys=Window(0, residual)))
    two = quantize(2, value_axis, group)
    values = values if value_bits == 1.58 else two
    window = Window(0, residual)
    rest = store(per_kv(k=keys, v=values), keys=window, values=window)
    if not protect:
        return chain(rest)
    salient = store(per_kv(k=keys, v=quantize(2, "channel", group)))
    return chain(chosen(share(protect), marked(SALIENCE, refuses=True), salient), rest)


def mixed(bits: float, group: int, transform: bool) -> Codec:
    """The codec of keys at `bits` per value, scales apart."""
    if bits == 16:
        return compose()
    wide, plain = quantize(2, "channel", group), signs(group)
    plain = compose(fourier(), plain) if transform else plain
    if bits in (1, 2):
        return plain if bits == 1 else wide
    return split_channels(bits - 1, wide, plain)


def salience(embeddings: Array, visual: Array, valid: Array | None = None) -> Array:
    """What a visual token is worth: its mean product with the text tokens' embeddings.

    Put it into the new tokens of a prompt before they are committed:
    `dataclasses.replace(new.kv, extra={"salience": ...})`, broadcast to [L, B, H, T].

    Args:
      embeddings: [B, T, D], what the first layer reads.
      visual: bool [B, T]. valid: bool [B, T], or None for all.

    Returns:
      float32 [B, T], -inf for text and padding.

    >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]])
    >>> [float(v) for v in salience(x, jnp.array([[True, True, False]]))[0]]
    [0.0, 2.0, -inf]
    """
    x = embeddings.astype(jnp.float32)
    valid = jnp.ones(visual.shape, bool) if valid is None else valid
    text = (valid & ~visual).astype(jnp.float32)
    mean = jnp.einsum("bt,btd->bd", text, jnp.where(valid[..., None], x, 0.0))
    mean = mean / jnp.maximum(jnp.sum(text, 1, keepdims=True), 1.0)
    return jnp.where(visual & valid, jnp.einsum("btd,bd->bt", x, mean), -jnp.inf)
