"""Planar bit packing: b-bit codes in exactly b bits each, unpacked by shift and mask.

Inside a group of n codes, plane j of a byte holds the j-th part of the group. At 2 bits, with
n = 16, byte i holds codes i, i + 4, i + 8 and i + 12, lowest bits first, so that unpacking writes
four contiguous runs and never interleaves. A width that is not a power of two is split into
sub-planes, widest first, over the low bits first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1.
The bytes of the sub-planes follow one another along the packed axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

PLANES = {
    bits: tuple(w for w in (8, 4, 2, 1) if bits & w) for bits in range(1, 9)
}  # sub-plane widths of each code width


def quantum(bits: int) -> int:
    """The number a group's length must be a multiple of to pack whole bytes at this width.

    >>> [quantum(b) for b in range(1, 9)]
    [8, 4, 8, 2, 8, 4, 8, 1]
    """
    if bits not in PLANES:
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    return 8 // PLANES[bits][-1]


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Packs codes along one axis.

    Args:
      codes: [..., n, ...] integers in [0, 2^bits); n is one group, a multiple of `quantum(bits)`.
      bits: width of a code, 1 to 8.
      axis: the group's axis.

    Returns:
      uint8 [..., n * bits / 8, ...].

    >>> import jax.numpy as jnp
    >>> [int(b) for b in pack(jnp.array([1, 2, 3, 0]), 2)]
    [57]
    """
    axis %= codes.ndim
    n = codes.shape[axis]
    if n % quantum(bits):
        raise ValueError(
            f"codes.shape[{axis}] is {n}: at {bits} bits a group must be a multiple of "
            f"{quantum(bits)} long"
        )
    codes = codes.astype(jnp.uint8)
    parts, low = [], 0
    for width in PLANES[bits]:
        planes = 8 // width
        part = (codes >> low) & np.uint8(2**width - 1)
        part = part.reshape(*codes.shape[:axis], planes, n // planes, *codes.shape[axis + 1 :])
        parts.append(jnp.sum(part << _shifts(width, part.ndim, axis), axis, dtype=jnp.uint8))
        low += width
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def unpack(packed: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Inverts `pack`.

    Args:
      packed: uint8 [..., n * bits / 8, ...].
      bits: width of a code, 1 to 8.
      axis: the packed axis.

    Returns:
      uint8 [..., n, ...].

    >>> import jax.numpy as jnp
    >>> [int(c) for c in unpack(jnp.array([57], jnp.uint8), 2)]
    [1, 2, 3, 0]
    """
    axis %= packed.ndim
    step = quantum(bits) * bits // 8
    if packed.shape[axis] % step:
        raise ValueError(
            f"packed.shape[{axis}] is {packed.shape[axis]}: at {bits} bits it must be a multiple "
            f"of {step}"
        )
    n = packed.shape[axis] * 8 // bits
    codes, start, low = None, 0, 0
    for width in PLANES[bits]:
        stop = start + n * width // 8
        part = jax.lax.slice_in_dim(packed, start, stop, axis=axis)
        part = jnp.expand_dims(part, axis)
        part = (part >> _shifts(width, part.ndim, axis)) & np.uint8(2**width - 1)
        part = part.reshape(*packed.shape[:axis], n, *packed.shape[axis + 1 :]) << low
        codes = part if codes is None else codes | part
        start, low = stop, low + width
    return codes


def _shifts(width: int, ndim: int, axis: int) -> np.ndarray:
    """The shift of each plane of a byte, along `axis` of an array of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = 8 // width
    return np.arange(0, 8, width, dtype=np.uint8).reshape(shape)
