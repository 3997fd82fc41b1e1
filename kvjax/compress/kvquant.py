"""KVQuant: keys before rotary embedding, learnt levels, outliers apart."""

from kvjax.cache import Chain, chain, first, store
from kvjax.codecs import across_heads, compose, levels, normalize, per_kv, with_outliers
from kvjax.compress.common import bits_of

KEYS, VALUES = "kvquant_key", "kvquant_value"


def kvquant(
    bits: int = 3,
    outliers: float = 0.01,
    sinks: int = 1,
    q_norm: bool | None = None,
    range_weight: bool = True,
) -> Chain:
    """Keys per channel before rotary embedding, values per token, by levels learnt beforehand.

        first(sinks) > store(per_kv(
            k=across_heads(compose(normalize(), with_outliers(levels(bits), outliers))),
            v=across_heads(with_outliers(levels(bits, ranged=True), outliers))), rope="before")

    Keys are normalised by each channel's calibrated range, values by the range of their token over
    all heads; both are coded by the nearest of 2^bits levels of their layer, learnt by k-means
    weighted by squared gradients of the loss. The extreme entries of every token, over all heads,
    are kept exactly and do not stretch its range; those of keys are the extremes relative to their
    channels. Tokens are coded at once; the prompt attends to its exact keys and values. Needs
    calibration: python -m experiments.calibrate.

    Choices where paper and released code differ: the k-means weight has the squared range of an
    element as in the paper (`range_weight`), which the released code leaves out; a token always has
    the same number of outlier slots, as deployed, taken by its most extreme entries; an outlier is
    stored itself and written over what the levels read.

    Args:
      bits: of a code, 1 to 8, or 16 for exact.
      outliers: share of a token's entries kept exactly, half of them on each side, at least one.
      sinks: first tokens kept exactly; not calibrated on.
      q_norm: whether levels are read moved and stretched so that mean and deviation are those of
        the numbers coded; None: at 2 bits or fewer.
      range_weight: whether squared gradients are multiplied by squared ranges in the k-means.

    Raises:
      ValueError: arguments out of range; on init_cache, constants that are missing, or heads that
        do not pack at this width.

    Source: KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization,
    arXiv 2401.18079.

    >>> codec = kvquant(bits=3).stages[1].codec.v
    >>> codec.bits(4096)  # 3, a range and a centre, 40 outliers of 16 + 16 bits
    3.3203125
    """
    bits_of("kvquant", bits)
    if not 0 <= outliers < 1:
        raise ValueError(f"kvquant(outliers={outliers!r}): a share of the entries lies in [0, 1)")
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"kvquant(sinks={sinks!r}): expected an integer of at least 0")
    for name, flag in (("q_norm", q_norm), ("range_weight", range_weight)):
        if not (isinstance(flag, bool) or (flag is None and name == "q_norm")):
            raise ValueError(f"kvquant({name}={flag!r}): expected True or False")
    held = store()
    if bits != 16:
        keys = compose(normalize(KEYS), with_outliers(levels(bits, KEYS), outliers, "token"))
        values = with_outliers(levels(bits, VALUES, ranged=True), outliers, "token")
        held = store(per_kv(k=across_heads(keys), v=across_heads(values)), rope="before")
    return chain(first(sinks), held) if sinks else chain(held)
