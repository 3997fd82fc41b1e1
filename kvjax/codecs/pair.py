"""One codec for keys and one for values."""

from __future__ import annotations

import dataclasses

from kvjax.codecs.base import Codec


@dataclasses.dataclass(frozen=True)
class PerKV:
    """See `per_kv`."""

    k: Codec
    v: Codec

    def __post_init__(self):
        for name, codec in (("k", self.k), ("v", self.v)):
            if not isinstance(codec, Codec):
                raise ValueError(f"{name} is {codec!r}: expected a codec")

    def check(self, width: int) -> None:
        """Raises ValueError when heads of `width` channels cannot be coded."""
        self.k.check(width)
        self.v.check(width)

    def bits(self, width: int) -> float:
        """Stored bits per value, the mean over keys and values."""
        return (self.k.bits(width) + self.v.bits(width)) / 2


def per_kv(k: Codec, v: Codec) -> PerKV:
    """Stores keys by `k` and values by `v`.

    >>> from kvjax.codecs import quantize
    >>> per_kv(k=quantize(2, axis="channel"), v=quantize(2, axis="token", group=32)).bits(64)
    3.0
    """
    return PerKV(k, v)


def as_pair(codec: Codec | PerKV) -> PerKV:
    """The pair itself, or a plain codec used for both keys and values."""
    return codec if isinstance(codec, PerKV) else PerKV(codec, codec)
