"""Non-uniform quantisation: each channel coded by the nearest of a fixed set of levels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import Codec, float_name, masked, saturate
from kvjax.codecs.packing import pack, quantum, unpack


@dataclasses.dataclass(frozen=True)
class Codebook(Codec):
    """See `codebook`."""

    levels: tuple[float, ...]
    group: int | None = None
    scale_dtype: str = "float16"

    def __post_init__(self):
        levels = tuple(float(v) for v in self.levels)
        if not 2 <= len(levels) <= 256 or not all(map(math.isfinite, levels)):
            raise ValueError(f"levels has {len(levels)} entries: expected 2 to 256 finite numbers")
        if any(a >= b for a, b in itertools.pairwise(levels)):
            raise ValueError(f"levels is {levels}: expected increasing numbers")
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "scale_dtype", float_name("scale_dtype", self.scale_dtype))
        if self.group is not None and (self.group < 1 or self.group % quantum(self.code_bits)):
            raise ValueError(
                f"group is {self.group}: at {self.code_bits} bits it must be a positive multiple "
                f"of {quantum(self.code_bits)}"
            )

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (len(self.levels) - 1).bit_length()

    def check(self, width: int) -> None:
        super().check(width)
        group = self.group or width
        if width % group:
            raise ValueError(f"group is {group}: it must divide the head size, {width}")
        if group % quantum(self.code_bits):
            raise ValueError(
                f"width is {width}: at {self.code_bits} bits a head must have a multiple of "
                f"{quantum(self.code_bits)} channels"
            )

    def encode(self, x, valid=None, key=None, constants=None):
        del key, constants
        self.check(x.shape[-1])
        x = masked(x, valid).astype(jnp.float32)
        x = x.reshape(*x.shape[:-1], -1, self.group or x.shape[-1])
        # The root mean square of x / max|x|, so that no square leaves the range of float32.
        top = jnp.max(jnp.abs(x), -1, keepdims=True)
        unit = x / jnp.where(top > 0, top, 1.0)
        square = jnp.mean(unit * unit, -1, keepdims=True)
        rms = top * jnp.sqrt(jnp.where(top > 0, square, 1.0))
        scale = saturate(rms, self.scale_dtype)
        step = scale.astype(jnp.float32)
        y = jnp.where(step > 0, x / jnp.where(step > 0, step, 1.0), 0.0)
        edges = np.float32([(a + b) / 2 for a, b in itertools.pairwise(self.levels)])
        method = "compare_all" if len(edges) < 32 else "scan"
        codes = pack(jnp.searchsorted(edges, y, method=method), self.code_bits)
        return {"codes": codes.reshape(*codes.shape[:-2], -1), "scale": scale[..., 0]}

    def decode(self, code, dtype=jnp.float32, constants=None):
        del constants
        packed, scale = code["codes"], code["scale"].astype(jnp.float32)
        packed = packed.reshape(*packed.shape[:-1], scale.shape[-1], -1)
        y = jnp.asarray(np.float32(self.levels))[unpack(packed, self.code_bits)]
        return (y * scale[..., None]).reshape(*packed.shape[:-2], -1).astype(dtype)


def codebook(
    levels: tuple[float, ...], group: int | None = None, scale_dtype="float16"
) -> Codebook:
    """Codes each channel by the nearest of `levels`, in units of its token's root mean square.

    n = sqrt(mean(x^2)) over the group, c = argmin_c |x / n - levels[c]|, x' = n levels[c]; a tie
    goes to the lower level. A zero group has n = 0 and decodes to zero.

    Args:
      levels: 2 to 256 increasing numbers; a code takes ceil(log2(len(levels))) bits.
      group: consecutive channels that share n (None: the whole head).
      scale_dtype: dtype of n, which saturates at its largest finite value.

    Code: codes uint8 [..., T, D b/8], scale [..., T, D/g]. Stored bits per value: b + 16/g.

    Source: TurboQuant, arXiv 2504.19874: `compose(rotate(seed), codebook(gaussian_levels(b)))`.

    >>> import jax.numpy as jnp
    >>> c = codebook((-1.0, 1.0))
    >>> [float(v) for v in c.decode(c.encode(jnp.full((1, 8), -3.0)))[0, :2]]
    [-3.0, -3.0]
    """
    return Codebook(tuple(levels), group, scale_dtype)


@functools.lru_cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels of least mean squared error for a standard Gaussian (Lloyd-Max).

    Each level is the mean of its cell and each edge lies half-way between two levels; solved by
    Newton's method from the companding approximation.

    Source: Max, Quantizing for minimum distortion, 1960.

    >>> [round(v, 4) for v in gaussian_levels(2)]
    [-1.5104, -0.4528, 0.4528, 1.5104]
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits is {bits!r}: expected an integer from 1 to 8")
    n, normal = 2**bits, NormalDist()
    levels = np.array([math.sqrt(3) * normal.inv_cdf((i + 0.5) / n) for i in range(n)])
    for _ in range(30):
        edges = (levels[1:] + levels[:-1]) / 2
        density = np.array([normal.pdf(e) for e in edges])
        # Mass of each cell from the smaller tail, so that outer cells keep their digits.
        tail = np.array([0.5 * math.erfc(abs(e) / math.sqrt(2)) for e in edges])
        below = np.concatenate([[0.0], np.where(edges < 0, tail, 1 - tail), [1.0]])
        above = np.concatenate([[1.0], np.where(edges < 0, 1 - tail, tail), [0.0]])
        mass = np.where(levels < 0, np.diff(below), -np.diff(above))
        left, right = np.append(0.0, density), np.append(density, 0.0)
        mean = (left - right) / mass
        # d mean / d edge, halved since an edge is the mean of two levels.
        by_left = left * (mean - np.append(0.0, edges)) / mass / 2
        by_right = right * (np.append(edges, 0.0) - mean) / mass / 2
        jacobian = np.diag(1 - by_left - by_right)
        jacobian -= np.diag(by_left[1:], -1) + np.diag(by_right[:-1], 1)
        step = np.linalg.solve(jacobian, levels - mean)
        levels = levels - step
        if np.abs(step).max() < 1e-13:
            break
    levels = (levels - levels[::-1]) / 2
    return tuple(float(v) for v in levels)
