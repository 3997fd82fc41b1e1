"""Levels learnt beforehand: a normalising map and a codec whose tables are constants."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from kvjax.codecs.base import Codec, float_name, masked, saturate
from kvjax.codecs.packing import pack, quantum, unpack
from kvjax.codecs.transform import Transform, _constant


@dataclasses.dataclass(frozen=True)
class Normalize(Transform):
    """See `normalize`."""

    name: str = "normalize"

    folds = False

    def constants_spec(self, width):
        row = jax.ShapeDtypeStruct((width,), jnp.float32)
        return {f"{self.name}_centre": row, f"{self.name}_range": row}

    def forward(self, x, constants=None):
        centre, extent = self._given(constants)
        return (x.astype(jnp.float32) - centre) / extent

    def inverse(self, y, constants=None):
        centre, extent = self._given(constants)
        return y.astype(jnp.float32) * extent + centre

    def _given(self, constants):
        names = (f"{self.name}_centre", f"{self.name}_range")
        return tuple(_constant(constants, n)[..., None, :].astype(jnp.float32) for n in names)


def normalize(name: str = "normalize") -> Normalize:
    """Moves each channel by a given centre and divides it by a given range: a = (x - z) / r.

    z = constants[name + "_centre"], r = constants[name + "_range"], float32 [..., D], r positive.

    >>> import jax.numpy as jnp
    >>> given = {"a_centre": jnp.array([1.0, 0.0]), "a_range": jnp.array([2.0, 4.0])}
    >>> normalize("a").encode(jnp.array([[3.0, 2.0]]), constants=given)
    Array([[1. , 0.5]], dtype=float32)
    """
    return Normalize(name)


@dataclasses.dataclass(frozen=True)
class Levels(Codec):
    """See `levels`."""

    code_bits: int
    name: str = "levels"
    ranged: bool = False
    scale_dtype: str = "float16"

    def __post_init__(self):
        if not isinstance(self.code_bits, int) or not 1 <= self.code_bits <= 8:
            raise ValueError(f"bits is {self.code_bits!r}: expected an integer from 1 to 8")
        object.__setattr__(self, "scale_dtype", float_name("scale_dtype", self.scale_dtype))

    def check(self, width: int) -> None:
        super().check(width)
        if width % quantum(self.code_bits):
            raise ValueError(
                f"width is {width}: at {self.code_bits} bits a vector must have a multiple of "
                f"{quantum(self.code_bits)} channels"
            )

    def constants_spec(self, width):
        del width
        row = jax.ShapeDtypeStruct((2**self.code_bits,), jnp.float32)
        return {self.name: row, f"{self.name}_read": row}

    def encode(self, x, valid=None, key=None, constants=None):
        del key
        self.check(x.shape[-1])
        x = masked(x, valid).astype(jnp.float32)
        table = _constant(constants, self.name)
        edges = (table[..., 1:] + table[..., :-1]) / 2
        scales = {}
        if self.ranged:
            high, low = (f(x, -1, keepdims=True) for f in (jnp.max, jnp.min))
            half = saturate((high - low) / 2, self.scale_dtype)
            centre = saturate(low + (high - low) / 2, self.scale_dtype)
            step = half.astype(jnp.float32)
            x = x - centre.astype(jnp.float32)
            x = jnp.where(step > 0, x / jnp.where(step > 0, step, 1.0), 0.0)
            scales = {"range": half, "centre": centre}
        codes = jnp.sum(x[..., None] > edges[..., None, None, :], -1, dtype=jnp.uint8)
        return {"codes": pack(codes, self.code_bits)} | scales

    def decode(self, code, dtype=jnp.float32, constants=None):
        codes = unpack(code["codes"], self.code_bits)
        table = _constant(constants, f"{self.name}_read").astype(jnp.float32)
        # A table that all leading axes share is one lookup.
        if table.size == table.shape[-1]:
            x = table.reshape(-1)[codes]
        else:
            shape = (*codes.shape[:-1], table.shape[-1])
            x = jnp.take_along_axis(jnp.broadcast_to(table[..., None, :], shape), codes, -1)
        if self.ranged:
            x = x * code["range"].astype(jnp.float32) + code["centre"].astype(jnp.float32)
        return x.astype(dtype)


def levels(bits: int, name: str = "levels", ranged: bool = False, scale_dtype="float16") -> Levels:
    """Codes each number by the nearest of 2^bits given levels, and reads it by a second table.

    c = argmin_c |a - table[c]|, a' = read[c], with table = constants[name], read = constants[name +
    "_read"], float32 [..., 2^bits], the first ascending. A tie goes to the lower level.

    Args:
      bits: of a code, 1 to 8.
      name: of the constants.
      ranged: whether a vector is first brought to [-1, 1] by half its range and its centre, which
        are stored; else numbers are coded as they come.
      scale_dtype: of those.

    Code: codes uint8 [..., T, D b/8]; range and centre [..., T, 1] where ranged. Stored bits per
    value: b + 32/D or b.

    Source: KVQuant, arXiv 2401.18079 (nuqX).

    >>> import jax.numpy as jnp
    >>> table = jnp.array([-1.0, 0.0, 0.1, 1.0])
    >>> given = {"levels": table, "levels_read": table}
    >>> c = levels(2, ranged=True)
    >>> x = jnp.array([[1.0, 2.0, 2.2, 3.0]])
    >>> [round(float(v), 3) for v in c.decode(c.encode(x, constants=given), constants=given)[0]]
    [1.0, 2.0, 2.1, 3.0]
    """
    return Levels(bits, name, ranged, scale_dtype)
