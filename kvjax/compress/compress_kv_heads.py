"""Effectively Compress KV Heads: the heads of a group projected to fewer, where the data lie."""

from kvjax.cache import Chain, chain, first, store
from kvjax.codecs import merge_heads, per_kv, quantize
from kvjax.compress.common import bits_of, is_number

KEYS, VALUES = "merged_keys", "merged_values"
ROPES = ("after", "before", "commuting")
FITS = ("activations", "weights", "mean")


def compress_kv_heads(
    keep: float | None = None,
    kv_heads: int | None = None,
    rope: str = "after",
    fit: str = "activations",
    bits: int = 16,
    sinks: int = 0,
) -> Chain:
    """Fewer KV heads: those of a group side by side, projected to the best subspace of one.

        first(sinks) > store(per_kv(k=merge_heads(keep, keys), v=merge_heads(keep, values)), rope)
        c = [k_1 .. k_t] P;  P: leading eigenvectors of E [k_1 .. k_t]^T [k_1 .. k_t];
        q_h . k_h' = (q_h P_h) . c;  values likewise, and their mix by P_h^T

    Attention then costs what it does with that many heads, for any number of query heads. The
    prompt attends to its exact keys and values. Needs calibration, once per model and setting:
    python -m experiments.calibrate. The same constants make a model with fewer heads, of the
    ordinary layout: `kvjax.models.merge_kv_heads`.

    Rotary embedding does not commute with P, and `rope` says what is done about it. The paper has
    special strategies for it, of which no code is public; the default is the one that agrees with
    its observation that rotated keys have the lower rank. Its recovery by fine-tuning is not here.

    Args:
      keep: share of the KV heads kept; None: 0.5. The smallest group of heads of which it leaves a
        whole number is merged; where there is none, all heads, to so many channels (half of three
        heads of 64: one vector of 96).
      kv_heads: in place of it, how many heads there are afterwards, a divisor of the number before.
      rope: keys are projected "after" rotary embedding; or "before" it, and rebuilt and rotated at
        every step; or by a P that is "commuting" with it: one complex number per head, frequency
        and kept head, which can be folded into weights (whole numbers of kept heads only).
      fit: P from "activations" (SVD-a in the paper), from the "weights" of keys and values alone
        (SVD-w), or the "mean" of a group's heads (one kept head per group).
      bits: of the kept channels, one scale per token and kept head: 1 to 8, or 16 for exact.
      sinks: first tokens held exactly, and not calibrated on; none in the paper.

    Raises:
      ValueError: arguments out of range; on init_cache, heads that do not divide, or constants that
        are missing; on calibration, a fit that does not suit the heads.

    Source: Effectively Compress KV Heads for LLM, arXiv 2406.07056.

    >>> codec = compress_kv_heads(keep=0.25).stages[0].codec.k
    >>> codec.sizes(32, 128), codec.sizes(3, 64)  # (heads merged, channels of the result)
    ((4, 128), (3, 48))
    """
    if keep is not None and kv_heads is not None:
        raise ValueError(
            f"compress_kv_heads(keep={keep}, kv_heads={kv_heads}): give one of them, the share of "
            "the heads or their number"
        )
    keep = 0.5 if keep is None else keep
    if not is_number(keep) or not 0 < keep <= 1:
        raise ValueError(f"compress_kv_heads(keep={keep!r}): a share of the heads lies in (0, 1]")
    if kv_heads is not None and not (isinstance(kv_heads, int) and kv_heads >= 1):
        raise ValueError(
            f"compress_kv_heads(kv_heads={kv_heads!r}): expected an integer of at least 1"
        )
    for name, value, known in (("rope", rope, ROPES), ("fit", fit, FITS)):
        if value not in known:
            raise ValueError(
                f"compress_kv_heads({name}={value!r}): expected one of {', '.join(known)}"
            )
    bits_of("compress_kv_heads", bits)
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"compress_kv_heads(sinks={sinks!r}): expected an integer of at least 0")
    heads = float(keep) if kv_heads is None else kv_heads
    code = None if bits == 16 else quantize(bits)
    keys, values = (merge_heads(heads, name, code) for name in (KEYS, VALUES))
    held = store(per_kv(k=keys, v=values), rope="before" if rope == "before" else "after")
    return chain(first(sinks), held) if sinks else chain(held)
