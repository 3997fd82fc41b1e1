"""Double Sparsity: few channels tell which few tokens to read."""

from kvjax.cache import Chain, best_tokens, chain, store
from kvjax.codecs import quantize
from kvjax.compress.common import bits_of

ORDER = "double_sparsity_channels"
SCORES = ("qk", "q", "k", "pairs")


def double_sparsity(
    tokens: int = 256,
    channels: int = 32,
    bits: int = 16,
    score: str = "qk",
    dense_layers: int = 2,
    host: bool = False,
    ahead: bool = False,
) -> Chain:
    """Every token exactly, of which each query head reads those that score best by few channels.

        store(reader=best_tokens(tokens, channels, order, quantize(bits), skip=dense_layers))
        s_j = sum_{c in C_h} q_c k_jc;  out = softmax over the `tokens` largest s_j, all channels

    Beside each key lie its *labels*, its channels C_h for every query head h. C_h is calibrated
    once per model: python -m experiments.calibrate. Nothing is evicted, labels never touch the
    output. The prompt attends to everything, as in the released fast path (its accuracy code
    selects for prompt rows too). New rows see each other beside what they read. The labels of all
    slots are scored at every step, used or not.

    Choices where paper and released code differ: scores are accumulated over all tokens of the
    calibration (as released, "qk" keeps only the last block); a query never reads an empty slot;
    with labels of few bits the query's are coded too, scale and minimum in float16.

    Args:
      tokens: read per query head and step.
      channels: of the labels, at most the head size (32 of 128 in the released defaults).
      bits: of a label, one scale and minimum per token: 1 to 8, or 16 for exact.
      score: what orders channels, a mean over tokens of "qk": |q_t k_t| of the same token, after
        rotary embedding; "q", "k": magnitudes before it; "pairs": |q| |k| over all pairs of tokens,
        after it.
      dense_layers: first layers that read everything.
      host: keys and values lie in host memory, where the platform has it; labels on the device.
      ahead: what a layer reads is chosen and fetched while the layer before is computed, by the
        queries that it would have for that layer's input; the first layer and the last choose for
        themselves.

    Raises:
      ValueError: arguments out of range; on init_cache, more channels than a head has, labels that
        fill no whole bytes, or constants that are missing.

    Source: Post-Training Sparse Attention with Double Sparsity, arXiv 2408.07092.

    >>> double_sparsity().stages[0].reader.channels
    32
    """
    for name, number, least in (
        ("tokens", tokens, 1),
        ("channels", channels, 1),
        ("dense_layers", dense_layers, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(
                f"double_sparsity({name}={number!r}): expected an integer of at least {least}"
            )
    if score not in SCORES:
        raise ValueError(f"double_sparsity(score={score!r}): expected one of {', '.join(SCORES)}")
    codec = None if bits_of("double_sparsity", bits) == 16 else quantize(bits)
    reader = best_tokens(tokens, channels, ORDER, codec, dense_layers, ahead)
    return chain(store(reader=reader, host=host))
