"""Codes of about one bit: signs, ternary digits, and channels split between two codecs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import Codec, float_name, masked, saturate, tokens, units
from kvjax.codecs.packing import pack, quantum, unpack
from kvjax.codecs.transform import Transform, multiply


@dataclasses.dataclass(frozen=True)
class Grouped(Codec):
    """Base of the codecs of one scale per channel and `span` tokens."""

    span: int = 32
    scale_dtype: str = "float16"

    def __post_init__(self):
        if not isinstance(self.span, int) or self.span < 1:
            raise ValueError(f"group is {self.span!r}: expected an integer of at least 1")
        object.__setattr__(self, "scale_dtype", float_name("scale_dtype", self.scale_dtype))

    @property
    def block(self) -> int:
        return self.span

    def _units(self, x, valid):
        """x float32 [..., U, g, D], invalid tokens zero; which are valid [..., U, g, 1] or None."""
        valid = None if valid is None else units(valid[..., None], self.span)
        x = units(x.astype(jnp.float32), self.span)
        return masked(x, None if valid is None else valid[..., 0]), valid


def _mean(x, where, axis=-2):
    """The mean over an axis of the entries where `where` holds; 0 where there are none."""
    count = jnp.sum(where, axis, keepdims=True)
    return jnp.sum(jnp.where(where, x, 0.0), axis, keepdims=True) / jnp.maximum(count, 1)


@dataclasses.dataclass(frozen=True)
class Signs(Grouped):
    """See `signs`."""

    def __post_init__(self):
        super().__post_init__()
        if self.span % quantum(1):
            raise ValueError(f"group is {self.span}: expected a multiple of {quantum(1)}")

    def encode(self, x, valid=None, key=None, constants=None):
        del key, constants
        x, valid = self._units(x, valid)
        there = jnp.ones((), bool) if valid is None else valid
        scale = _mean(jnp.abs(x), jnp.broadcast_to(there, x.shape))
        return {
            "codes": pack((x >= 0).astype(jnp.uint8), 1, -2),
            "scale": saturate(scale[..., 0, :], self.scale_dtype),
        }

    def decode(self, code, dtype=jnp.float32, constants=None):
        del constants
        sign = 2.0 * unpack(code["codes"], 1, -2).astype(jnp.float32) - 1.0
        scale = code["scale"].astype(jnp.float32)[..., None, :]
        return tokens(sign * scale).astype(dtype)


def signs(group: int = 32) -> Signs:
    """One bit per number: its sign; per channel and `group` tokens one scale, the mean magnitude.

    Of all two-level codes +-s this s has the least squared error. Stored bits per value:
    1 + 16/group.

    >>> import jax.numpy as jnp
    >>> c, x = signs(8), jnp.arange(-4.0, 4.0)[:, None]
    >>> [float(v) for v in c.decode(c.encode(x))[:, 0]]
    [-2.0, -2.0, -2.0, -2.0, 2.0, 2.0, 2.0, 2.0]
    """
    return Signs(group)


@dataclasses.dataclass(frozen=True)
class Ternary(Grouped):
    """See `ternary`."""

    threshold: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        if self.threshold < 0:
            raise ValueError(f"threshold is {self.threshold}: expected at least 0")
        object.__setattr__(self, "threshold", float(self.threshold))

    def encode(self, x, valid=None, key=None, constants=None):
        del key, constants
        x, valid = self._units(x, valid)
        there = jnp.broadcast_to(jnp.ones((), bool) if valid is None else valid, x.shape)
        size = jnp.abs(x)
        large = there & (size > self.threshold * _mean(size, there))
        scale = _mean(size, large)
        trits = jnp.where(large, jnp.sign(x), 0.0).astype(jnp.int8) + 1
        return {"codes": pack_trits(trits), "scale": saturate(scale[..., 0, :], self.scale_dtype)}

    def decode(self, code, dtype=jnp.float32, constants=None):
        del constants
        scale = code["scale"].astype(jnp.float32)[..., None, :]
        trits = unpack_trits(code["codes"], (self.span, scale.shape[-1]))
        return tokens((trits.astype(jnp.float32) - 1.0) * scale).astype(dtype)


def ternary(group: int = 32, threshold: float = 0.7) -> Ternary:
    """Each number as -s, 0 or s, per channel of `group` tokens, five numbers to a byte.

    Zero where |x| <= threshold * mean|x|; s is the mean magnitude of the others, which is the best
    for these codes (with mean|x| itself as s, a Gaussian has 1.5 times the squared error). Stored
    bits per value: 1.6 + 16/group.

    Source: VidKV, arXiv 2503.16257.

    >>> import jax.numpy as jnp
    >>> c, x = ternary(4), jnp.array([[-3.0], [0.1], [5.0], [-0.1]])
    >>> [float(v) for v in c.decode(c.encode(x))[:, 0]]
    [-4.0, 0.0, 4.0, 0.0]
    """
    return Ternary(group, "float16", threshold)


def pack_trits(x: jax.Array) -> jax.Array:
    """Digits 0 to 2, [..., g, D], five to a byte: uint8 [..., ceil(g D / 5)]."""
    x = x.reshape(*x.shape[:-2], -1)
    short = -x.shape[-1] % 5
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]).astype(jnp.uint8)
    x = x.reshape(*x.shape[:-1], 5, -1)
    return jnp.sum(x * np.uint8(3) ** np.arange(5, dtype=np.uint8)[:, None], -2, dtype=jnp.uint8)


def unpack_trits(packed: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Inverts `pack_trits`: uint8 [..., g, D]."""
    digits = packed[..., None, :] // (np.uint8(3) ** np.arange(5, dtype=np.uint8)[:, None]) % 3
    digits = digits.reshape(*packed.shape[:-1], -1)[..., : shape[0] * shape[1]]
    return digits.reshape(*packed.shape[:-1], *shape)


@dataclasses.dataclass(frozen=True)
class Fourier(Transform):
    """See `fourier`."""

    def forward(self, x, constants=None):
        return multiply(x.astype(jnp.float32), _fourier(x.shape[-1]).T)

    def inverse(self, y, constants=None):
        return multiply(y.astype(jnp.float32), _fourier(y.shape[-1]))


def fourier() -> Fourier:
    """The real Fourier transform along channels, orthonormal: as many numbers as channels.

    Mean, then cosine and sine of each frequency, then (even widths) the alternating sum.

    >>> import jax.numpy as jnp
    >>> [abs(round(float(v), 3)) for v in fourier().encode(jnp.ones((1, 4)))[0]]
    [2.0, 0.0, 0.0, 0.0]
    """
    return Fourier()


@functools.lru_cache
def _fourier(n: int) -> np.ndarray:
    angle = 2 * np.pi * np.outer(np.arange(n // 2 + 1), np.arange(n)) / n
    rows = [np.ones(n) / np.sqrt(n)]
    for k in range(1, (n + 1) // 2):
        rows += [np.sqrt(2 / n) * np.cos(angle[k]), np.sqrt(2 / n) * np.sin(angle[k])]
    if n % 2 == 0:
        rows.append(np.cos(angle[n // 2]) / np.sqrt(n))
    return np.stack(rows).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class SplitChannels(Codec):
    """See `split_channels`."""

    share: float
    wide: Codec
    rest: Codec

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share!r}: a share of the channels lies in (0, 1)")
        if self.wide.block != self.rest.block:
            raise ValueError(
                f"wide and rest code {self.wide.block} and {self.rest.block} tokens together: "
                "expected the same number"
            )
        object.__setattr__(self, "share", float(self.share))

    @property
    def block(self) -> int:
        return self.wide.block

    def check(self, width: int) -> None:
        super().check(width)
        wide = self.count(width)
        if not 0 < wide < width or width % 8:
            raise ValueError(
                f"width is {width}: a share of {self.share} gives {wide} wide channels; expected "
                "some of both kinds, and a multiple of 8 channels"
            )
        self.wide.check(wide)
        self.rest.check(width - wide)

    def count(self, width: int) -> int:
        """How many channels are wide."""
        return int(self.share * width)

    def encode(self, x, valid=None, key=None, constants=None):
        self.check(x.shape[-1])
        x = masked(x, valid).astype(jnp.float32)
        unit = units(x, self.block)
        low = high = unit
        if valid is not None:
            there = units(valid[..., None], self.block)
            low, high = jnp.where(there, unit, jnp.inf), jnp.where(there, unit, -jnp.inf)
        extent = jnp.max(high, -2) - jnp.min(low, -2)
        first = self.count(x.shape[-1])
        order = jnp.argsort(-extent, -1, stable=True)
        mask = jnp.argsort(order, -1) < first
        wide, rest = self._parts(unit, mask, first)
        return {
            "mask": pack(mask.astype(jnp.uint8), 1),
            "wide": self.wide.encode(tokens(wide), valid, key, constants),
            "rest": self.rest.encode(tokens(rest), valid, key, constants),
        }

    def decode(self, code, dtype=jnp.float32, constants=None):
        parts = (self.wide.decode(code["wide"], jnp.float32, constants),
                 self.rest.decode(code["rest"], jnp.float32, constants))  # fmt: skip
        x = units(jnp.concatenate(parts, -1), self.block)
        order = self._order(unpack(code["mask"], 1).astype(bool))
        return tokens(jnp.take_along_axis(x, jnp.argsort(order, -1)[..., None, :], -1)).astype(
            dtype
        )

    @staticmethod
    def _order(mask):
        """Wide channels first, each kind in its own order."""
        return jnp.argsort(~mask, -1, stable=True)

    def _parts(self, unit, mask, first):
        x = jnp.take_along_axis(unit, self._order(mask)[..., None, :], -1)
        return x[..., :first], x[..., first:]


def split_channels(share: float, wide: Codec, rest: Codec) -> SplitChannels:
    """Codes the channels of widest range by one codec, the others by another.

    In every block of tokens anew, and apart for every head: the floor(share D) channels of largest
    max - min. Which they are is stored, a bit per channel and block.

    Args:
      share: of the channels, in (0, 1).
      wide, rest: codecs of the same number of tokens.

    Source: VidKV, arXiv 2503.16257.

    >>> from kvjax.codecs import quantize
    >>> split_channels(0.5, quantize(2, "channel", 32), signs(32)).bits(64)
    2.28125
    """
    return SplitChannels(share, wide, rest)
