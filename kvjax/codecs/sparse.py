"""The extreme entries of each vector kept exactly, at a fixed number per vector."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import Codec, float_name, masked, saturate, tokens, units


@dataclasses.dataclass(frozen=True)
class Outliers(Codec):
    """See `outliers`."""

    fraction: float
    axis: str = "token"
    span: int = 64
    width: int | None = None
    dtype: str = "float16"

    def __post_init__(self):
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}: expected 0 to 1")
        if self.axis not in ("token", "channel"):
            raise ValueError(f"axis is {self.axis!r}: expected 'token' or 'channel'")
        if self.span < 1:
            raise ValueError(f"block is {self.span}: expected at least 1")
        object.__setattr__(self, "fraction", float(self.fraction))
        object.__setattr__(self, "dtype", float_name("dtype", self.dtype))
        if self.axis == "token":
            object.__setattr__(self, "span", 1)

    @property
    def block(self) -> int:
        return self.span

    def counts(self, n: int) -> tuple[int, int]:
        """How many of the smallest and of the largest entries of a vector of n are kept.

        >>> outliers(0.02).counts(64), outliers(1.0).counts(5), outliers(0.0).counts(64)
        ((1, 1), (2, 3), (0, 0))
        """
        if not self.fraction:
            return 0, 0
        low = max(1, round(n * self.fraction / 2))
        high = n - low if self.fraction == 1 else min(low, n - low)
        return min(low, n), max(high, 0)

    def encode(self, x, valid=None, key=None, constants=None):
        del key, constants
        self.check(x.shape[-1])
        vectors, valid = self._vectors(masked(x, valid), valid)
        n = vectors.shape[self._axis]
        low, high = self.counts(n)
        keys, axis = vectors.astype(jnp.float32), self._axis
        # Three levels, so that invalid entries are chosen last and nothing is chosen twice.
        far = float(jnp.finfo(jnp.float32).max)
        if valid is not None:
            keys = jnp.where(valid, keys, far)
        first = _take(jnp.argsort(keys, axis), 0, low, axis)
        if valid is not None:
            keys = jnp.where(valid, keys, -far)
        keys = jnp.put_along_axis(keys, first, -jnp.inf, axis, inplace=False)
        last = _take(jnp.argsort(keys, axis), n - high, n, axis)
        index = jnp.concatenate([first, last], axis)
        values = saturate(jnp.take_along_axis(vectors, index, axis), self.dtype)
        small = jnp.uint8 if n <= 256 else jnp.uint16 if n <= 65536 else jnp.int32
        return {"values": values, "index": index.astype(small)}

    def check(self, width: int) -> None:
        super().check(width)
        if self.width not in (None, width):
            raise ValueError(f"width is {self.width}: the head size is {width}")

    def decode(self, code, dtype=jnp.float32, constants=None):
        del constants
        values = code["values"]
        if self.axis == "channel":
            shape = (*values.shape[:-2], self.span, values.shape[-1])
        elif self.width is None:
            raise ValueError("width is None: outliers of tokens by themselves need the head size")
        else:
            shape = (*values.shape[:-1], self.width)
        x = _put(jnp.zeros(shape, dtype), code["index"], values.astype(dtype), self._axis)
        return tokens(x) if self.axis == "channel" else x

    def overwrite(self, code, x):
        """x [..., T, D] with the kept entries put in their places."""
        vectors, _ = self._vectors(x, None)
        x = _put(vectors, code["index"], code["values"].astype(x.dtype), self._axis)
        return tokens(x) if self.axis == "channel" else x

    def fill(self, code, x, valid=None):
        """x [..., T, D], float32, with the kept entries replaced by their vector's mean."""
        vectors, valid = self._vectors(masked(x, valid).astype(jnp.float32), valid)
        count = vectors.shape[self._axis] if valid is None else jnp.sum(valid, -2, keepdims=True)
        mean = jnp.sum(vectors, self._axis, keepdims=True) / jnp.maximum(count, 1)
        x = _put(vectors, code["index"], mean, self._axis)
        return tokens(x) if self.axis == "channel" else x

    @property
    def _axis(self) -> int:
        return -1 if self.axis == "token" else -2

    def _vectors(self, x, valid):
        """[..., T, D] for token, [..., T/g, g, D] for channel; a token is valid as a whole."""
        if self.axis == "token":
            return x, None
        valid = valid if valid is None else units(valid[..., None], self.span)
        return units(x, self.span), valid


def _take(x, start, stop, axis):
    return jax.lax.slice_in_dim(x, start, stop, axis=x.ndim + axis)


def _put(x, index, values, axis):
    """x with values at index along axis.

    Measured on CPU: a few entries along channels are placed faster by selection, entries along
    tokens by a scatter (a fifth of the time of selection).
    """
    kept = index.shape[axis]
    values = jnp.broadcast_to(values, index.shape)
    if axis != -1 or kept > 8:
        return jnp.put_along_axis(x, index.astype(jnp.int32), values, axis, inplace=False)
    place = np.arange(x.shape[axis], dtype=index.dtype)
    for j in range(kept):
        x = jnp.where(_take(index, j, j + 1, axis) == place, _take(values, j, j + 1, axis), x)
    return x


def outliers(
    fraction: float,
    axis: str = "token",
    block: int = 64,
    width: int | None = None,
    dtype="float16",
) -> Outliers:
    """Keeps the largest and the smallest entries (by value) of every vector; zero elsewhere.

    Of a vector of n entries, k = max(1, round(n fraction / 2)) per side are kept (none when
    `fraction` is 0, all when it is 1) with their indices. See `with_outliers` for the way to code
    the rest with the outliers out of the way.

    Args:
      fraction: share of entries kept, 0 to 1.
      axis: "token": a vector is one token's channels; "channel": one channel of a block of tokens.
      block: tokens of a vector, for "channel".
      width: the head size, which `decode` of "token" needs when not within `with_outliers`.
      dtype: of the kept values.

    Code: values and index (the smallest unsigned type that fits), [..., T, 2k] for "token",
    [..., T/block, 2k, D] for "channel".

    Source: GEAR, arXiv 2403.05527.

    >>> import jax.numpy as jnp
    >>> c = outliers(0.5, width=4)
    >>> [float(v) for v in c.decode(c.encode(jnp.array([[1.0, -9.0, 8.0, 2.0]])))[0]]
    [0.0, -9.0, 8.0, 0.0]
    """
    return Outliers(fraction, axis, block, width, dtype)
