"""Tokens stored as they are."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from kvjax.codecs.base import Codec, float_name, masked, saturate


@dataclasses.dataclass(frozen=True)
class Dense(Codec):
    """See `dense`."""

    dtype: str | None = None

    def __post_init__(self):
        if self.dtype is not None:
            object.__setattr__(self, "dtype", float_name("dtype", self.dtype))

    def encode(self, x, valid=None, key=None, constants=None):
        del key, constants
        x = masked(x, valid)
        return x if self.dtype in (None, x.dtype.name) else saturate(x, self.dtype)

    def decode(self, code, dtype=jnp.float32, constants=None):
        del constants
        return code.astype(dtype)


def dense(dtype=None) -> Dense:
    """Stores tokens in `dtype` (None: as they come), saturating at its largest finite value.

    The code is one array [..., T, D]. `dense()` is the identity of `compose`.

    >>> import jax.numpy as jnp
    >>> dense("float8_e4m3fn").bits(64)
    8.0
    >>> [float(v) for v in dense("float16").encode(jnp.array([[1.0, 1e6]]))[0]]
    [1.0, 65504.0]
    """
    return Dense(dtype)
