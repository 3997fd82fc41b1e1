"""KIVI: keys per channel, values per token."""

from kvjax.cache import Chain, Window, chain, store
from kvjax.codecs import per_kv
from kvjax.compress.common import bits_of, grouped, released


def kivi(
    bits: int = 2,
    group: int = 32,
    residual: int = 128,
    value_bits: int | None = None,
    release: int = 1,
) -> Chain:
    """Keys quantised per channel, values per token, at 2 or 4 bits; the newest stay exact.

        store(per_kv(k=quantize(bits, "channel", group), v=quantize(bits, "token", group)),
              keys=Window(0, residual), values=Window(residual, release))

    After T tokens the first floor(T / R) R keys and the first max(0, T - R) values are coded: the
    keys' buffer empties when it is full, the values' slides. A token is read exactly in the step
    that codes it, and the prompt attends to its exact keys and values.

    Args:
      bits: of a code, 1 to 8, or 16 for exact.
      group: numbers that share a scale: tokens of one channel (keys), channels of one token
        (values). Must divide `residual` and the head size.
      residual: R, how many of the newest are exact.
      value_bits: of the values; None: as the keys.
      release: how many values are coded together. Above 1 (ours) up to release - 1 more are exact,
        and speculation can accept several tokens.

    Raises:
      ValueError: bits or release out of range; group that does not divide residual; on init_cache,
        group that does not divide the head size.

    Source: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750.

    >>> kivi(bits=2).stages[0].codec.bits(64)
    3.0
    """
    bits_of("kivi", bits)
    values = bits if value_bits is None else bits_of("kivi", value_bits, "value_bits")
    for name, number in (("group", group), ("residual", residual)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"kivi({name}={number!r}): expected an integer of at least 1")
    if residual % group:
        raise ValueError(
            f"kivi(group={group}, residual={residual}): the group must divide residual, since "
            "keys are coded when the residual is full"
        )
    codec = per_kv(k=grouped(bits, "channel", group), v=grouped(values, "token", group))
    return chain(
        store(codec, keys=Window(0, residual), values=Window(residual, released("kivi", release)))
    )
