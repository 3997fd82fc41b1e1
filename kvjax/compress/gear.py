"""GEAR: quantised, low-rank error, sparse outliers."""

from kvjax.cache import Chain, Window, chain, chosen, share, store
from kvjax.codecs import Codec, PerKV, across_heads, low_rank, per_kv, with_outliers
from kvjax.codecs import residual as sum_of
from kvjax.compress.common import bits_of, grouped

BACKBONES = ("kivi", "kcvt")


def gear(
    bits: int = 2,
    rank: int = 2,
    prompt_rank: int = 4,
    outliers: float = 0.02,
    backbone: str = "kivi",
    group: int = 64,
    buffer: int = 64,
    span: int = 256,
    across: bool = True,
    iterations: int = 3,
) -> Chain:
    """A coarse code, the low rank of its error, and the extreme entries exactly.

        chosen(share(1), None, store(codec(prompt_rank, span))) >
        store(codec(rank, buffer), keys=values=Window(0, buffer)),
        codec = residual(with_outliers(quantize(bits), outliers), low_rank(rank)),
        X = D + L + S

    S holds the outliers of each vector (keys: a channel over the block; values: a token, over all
    heads), D codes the rest with their vector's mean in their place, L = Q Q'(X - D - S) by power
    iteration. A prompt is coded in blocks of `span` tokens at `prompt_rank`; what is left of it and
    new tokens wait exactly until `buffer` of them are coded as a block at `rank`. Blocks are never
    coded again. The prompt attends to its exact keys and values.

    Choices where paper and released code differ: counts of outliers are of the vector that they are
    taken from; levels are 2^b - 1; L is added at outliers too, as released; a prompt is coded in
    blocks, not as one of any length: `span` as large as the prompt is the paper's. With span equal
    to buffer and prompt_rank to rank all tokens are coded alike and at once as they come
    (streaming); otherwise the exact prompt is held until it is complete.

    Args:
      bits: of a code, 1 to 8, or 16 for exact.
      rank: of L in blocks of `buffer`, at most `buffer` and the head size; 0: without.
      prompt_rank: the same in the blocks of a prompt.
      outliers: share of entries kept exactly; 0: without (GEAR-L).
      backbone: "kivi": keys in groups of tokens per channel, values in groups of channels per
        token (2 bits in the paper); "kcvt": one group per channel and block, one per token over all
        heads (4).
      group: of "kivi", divides `buffer`, `span` and the head size.
      buffer: new tokens coded together.
      span: tokens of a prompt coded together, a multiple of `group`.
      across: whether outliers and groups of values run over all heads of a token; False: within
        each, for heads that hold different tokens (behind snapkv, adakv and the like).
      iterations: of the power iteration.

    Raises:
      ValueError: arguments out of range; on init_cache, group or rank that do not suit the head
        size.

    Source: GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference
    of LLM, arXiv 2403.05527.

    >>> gear(rank=0, prompt_rank=0, outliers=0.0).stages[1].codec.bits(64)
    2.5
    >>> [round(stage.codec.bits(64), 2) for stage in (gear().stages[0].inner, gear().stages[1])]
    [4.41, 4.25]
    """
    bits_of("gear", bits)
    if backbone not in BACKBONES:
        raise ValueError(f"gear(backbone={backbone!r}): expected one of {', '.join(BACKBONES)}")
    for name, number in (("buffer", buffer), ("span", span)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"gear({name}={number!r}): expected an integer of at least 1")
    ranks = ("rank", rank, "buffer", buffer), ("prompt_rank", prompt_rank, "span", span)
    for name, number, what, most in ranks:
        if not isinstance(number, int) or not 0 <= number <= most:
            raise ValueError(
                f"gear({name}={number!r}): expected an integer from 0 to {what}={most}"
            )
    if not 0 <= outliers <= 1:
        raise ValueError(f"gear(outliers={outliers!r}): a share of the entries lies in [0, 1]")
    if not isinstance(across, bool):
        raise ValueError(f"gear(across={across!r}): expected True or False")
    for name, number in (("buffer", buffer), ("span", span)):
        if backbone == "kivi" and (not isinstance(group, int) or group < 1 or number % group):
            raise ValueError(f"gear(group={group!r}): expected a divisor of {name}={number}")

    def codec(rank: int, block: int) -> PerKV:
        keys, values = (group, group) if backbone == "kivi" else (block, None)

        def coarse(axis: str, group: int | None) -> Codec:
            return with_outliers(grouped(bits, axis, group), outliers, axis, block)

        def finer(code: Codec) -> Codec:
            return sum_of(code, low_rank(rank, block, iterations)) if rank else code

        value = coarse("token", values)
        value = across_heads(value, block if rank else None) if across else value
        return per_kv(k=finer(coarse("channel", keys)), v=finer(value))

    window = Window(0, buffer)
    after = store(codec(rank, buffer), keys=window, values=window)
    if bits == 16 or (span, prompt_rank) == (buffer, rank):
        return chain(after)
    return chain(chosen(share(1), None, store(codec(prompt_rank, span))), after)
