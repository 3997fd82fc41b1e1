"""GEAR: quantised, low-rank error, sparse outliers."""

from kvjax.cache import Chain, Window, chain, store
from kvjax.codecs import Codec, low_rank, per_kv, with_outliers
from kvjax.codecs import residual as sum_of
from kvjax.compress.common import bits_of, grouped

BACKBONES = ("kivi", "kcvt")


def gear(
    bits: int = 2,
    rank: int = 2,
    outliers: float = 0.02,
    backbone: str = "kivi",
    group: int = 64,
    buffer: int = 64,
    iterations: int = 3,
) -> Chain:
    """A coarse code, the low rank of its error, and the extreme entries exactly.

        store(residual(with_outliers(quantize(bits), outliers), low_rank(rank)), keys=values=
              Window(0, buffer)),  X = D + L + S

    S holds the outliers of each vector (keys: a channel over the block; values: a token), D codes
    the rest with their vector's mean in their place, L = Q Q'(X - D - S) by power iteration. New
    tokens wait exactly until `buffer` of them are coded as a block; blocks are never coded again.

    Choices where the paper has several: a prompt is coded in the same blocks as what follows, so
    that there is one rank, by default that of the paper's decode blocks (a prompt as one block has
    rank 4 there); values are coded per KV head, where KCVT's groups and outliers run over all heads
    of a token; L is added at outliers too, as released.

    Args:
      bits: of a code, 1 to 8, or 16 for exact.
      rank: of L, at most `buffer` and the head size; 0: without.
      outliers: share of entries kept exactly; 0: without (GEAR-L).
      backbone: "kivi": keys in groups of tokens per channel, values in groups of channels per
        token (2 bits in the paper); "kcvt": one group per channel and block, one per token (4).
      group: of "kivi", divides `buffer` and the head size.
      buffer: tokens coded together.
      iterations: of the power iteration.

    Raises:
      ValueError: arguments out of range; on init_cache, group or rank that do not suit the head
        size.

    Source: GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference
    of LLM, arXiv 2403.05527.

    >>> gear(rank=0, outliers=0.0).stages[0].codec.bits(64)
    2.5
    >>> round(gear().stages[0].codec.bits(64), 2)
    4.25
    """
    bits_of("gear", bits)
    if backbone not in BACKBONES:
        raise ValueError(f"gear(backbone={backbone!r}): expected one of {', '.join(BACKBONES)}")
    if not isinstance(buffer, int) or buffer < 1:
        raise ValueError(f"gear(buffer={buffer!r}): expected an integer of at least 1")
    if not isinstance(rank, int) or not 0 <= rank <= buffer:
        raise ValueError(f"gear(rank={rank!r}): expected an integer from 0 to buffer={buffer}")
    if not 0 <= outliers <= 1:
        raise ValueError(f"gear(outliers={outliers!r}): a share of the entries lies in [0, 1]")
    if backbone == "kivi" and (not isinstance(group, int) or group < 1 or buffer % group):
        raise ValueError(f"gear(group={group!r}): expected a divisor of buffer={buffer}")
    keys, values = (group, group) if backbone == "kivi" else (buffer, None)

    def side(axis: str, group: int | None) -> Codec:
        code = with_outliers(grouped(bits, axis, group), outliers, axis, buffer)
        return sum_of(code, low_rank(rank, buffer, iterations)) if rank else code

    codec = per_kv(k=side("channel", keys), v=side("token", values))
    window = Window(0, buffer)
    return chain(store(codec, keys=window, values=window))
