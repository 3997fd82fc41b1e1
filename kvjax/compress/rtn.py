"""Round to nearest, per token: the plainest quantised cache."""

from kvjax.cache import Chain, chain, store
from kvjax.compress.common import bits_of, grouped


def rtn(bits: int = 4, group: int | None = None) -> Chain:
    """Keys and values coded token by token, at once; the yardstick of quantised caches.

        store(quantize(bits, axis="token", group))

    Within a group of channels of one token: s = (max - min) / (2^b - 1),
    c = round((x - min) / s), read as s c + min.

    Args:
      bits: 1 to 8, or 16 for exact.
      group: channels coded together; None: the whole head.

    Raises:
      ValueError: bits out of range; on init_cache, a group that does not divide the head size.

    As `storage=rtn(bits=4)` it also fits the methods that replace slots one by one.

    >>> from kvjax.cache import chain, store
    >>> from kvjax.codecs import quantize
    >>> rtn(bits=4) == chain(store(quantize(4)))
    True
    """
    return chain(store(grouped(bits_of("rtn", bits), "token", group)))
