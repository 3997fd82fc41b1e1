"""Codecs of several heads together: one code for all heads, and linear maps that mix them.

They need x as [..., H, T, D], with the heads' axis before that of the tokens: a store of its own
has it. Heads that hold different tokens cannot be coded together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.codecs.base import Codec
from kvjax.codecs.combine import Part
from kvjax.codecs.transform import Transform, _constant, hadamard, has_hadamard, multiply

INNER = ("codec", "rest", "parts", "k", "v")  # where codecs hold other codecs


@functools.partial(jax.tree_util.register_dataclass, data_fields=["code"], meta_fields=["heads"])
@dataclasses.dataclass(frozen=True)
class Joined:
    """The code of `heads` heads: every leaf is [..., 1, units, *rest]."""

    code: Any
    heads: int


@dataclasses.dataclass(frozen=True)
class AcrossHeads(Codec):
    """See `across_heads`."""

    codec: Codec
    span: int = 1

    def __post_init__(self):
        if self.span % self.codec.block:
            raise ValueError(
                f"block is {self.span}: expected a multiple of the codec's, {self.codec.block}"
            )

    joins_heads = True

    @property
    def block(self) -> int:
        return self.span

    @property
    def _part(self) -> Part:
        return Part(self.codec, self.span)

    def constants_spec(self, width):
        return self.codec.constants_spec(width)

    def encode(self, x, valid=None, key=None, constants=None):
        valid = valid if valid is None else valid[..., :1, :]
        return Joined(self._part.encode(join(x), valid, key, constants), x.shape[-3])

    def decode(self, code, dtype=jnp.float32, constants=None):
        return split(self._part.decode(code.code, dtype, constants), code.heads)

    def code_spec(self, leading, tokens, width, dtype=jnp.float32):
        x = jax.ShapeDtypeStruct((*leading, tokens, width), jnp.dtype(dtype))
        given = self.codec.constants_spec(x.shape[-3] * width)
        return jax.eval_shape(lambda x, given: self.encode(x, None, None, given), x, given)


def join(x: jax.Array) -> jax.Array:
    """[..., H, T, D] as [..., 1, T, H D]."""
    x = jnp.moveaxis(x, -3, -2)
    return x.reshape(*x.shape[:-3], 1, x.shape[-3], -1)


def split(x: jax.Array, heads: int) -> jax.Array:
    """Inverts `join`."""
    x = x.reshape(*x.shape[:-3], x.shape[-2], heads, -1)
    return jnp.moveaxis(x, -2, -3)


def across_heads(codec: Codec, block: int | None = None) -> AcrossHeads:
    """Codes a token's channels of all heads as one vector, [..., H, T, D] as [..., 1, T, H D].

    Groups, outliers and scales then run over all heads, and every leaf of the code has one head.
    Constants have the joined width: [..., 1, H D].

    Args:
      codec: of vectors of H D channels.
      block: tokens coded together, a multiple of the codec's block (None: that); for combination
        with codecs of larger blocks.

    >>> from kvjax.codecs import quantize
    >>> quantize(2).code_spec((3,), 1, 64)["scale"].shape  # heads, tokens, groups
    (3, 1, 1)
    >>> across_heads(quantize(2)).code_spec((3,), 1, 64).code["scale"].shape
    (1, 1, 1)
    """
    return AcrossHeads(codec, codec.block if block is None else block)


@dataclasses.dataclass(frozen=True)
class RotateHeads(Transform):
    """See `rotate_heads`."""

    heads: int

    folds = False
    joins_heads = True

    def __post_init__(self):
        if not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"heads is {self.heads!r}: expected an integer of at least 1")

    def forward(self, x, constants=None):
        return self._map(x, False)

    def inverse(self, y, constants=None):
        return self._map(y, True)

    def _map(self, x, inverse):
        x = x.astype(jnp.float32)
        heads, width = x.shape[-3], x.shape[-1]
        group = together(heads, width, self.heads)
        x = x.reshape(*x.shape[:-3], heads // group, group, *x.shape[-2:])
        matrix = hadamard(group * width)
        y = multiply(join(x), matrix.T if inverse else matrix)
        y = split(y, group)
        return y.reshape(*y.shape[:-4], heads, *y.shape[-2:])


def together(heads: int, width: int, most: int) -> int:
    """How many heads are rotated together: the largest divisor of `heads` of at most `most` for
    whose channels there is a Hadamard matrix.

    >>> together(8, 128, 4), together(3, 64, 4), together(5, 64, 4)
    (4, 3, 1)
    """
    for group in range(min(most, heads), 0, -1):
        if heads % group == 0 and has_hadamard(group * width):
            return group
    raise ValueError(f"width is {width}: there is no Hadamard matrix of that size here")


def rotate_heads(heads: int) -> RotateHeads:
    """Multiplies the joined channels of `heads` heads by one Hadamard matrix, which also evens out
    the heads among each other.

    Where `heads` does not divide the number of heads, the largest number below that does; sizes
    are 2^k, 12 2^k and 20 2^k. Scores and mixed values are computed after decoding.

    Source: RotateKV, arXiv 2501.16383.

    >>> import jax.numpy as jnp
    >>> r = rotate_heads(2)
    >>> y = r.encode(jnp.array([[[2.0, 0.0]], [[0.0, 0.0]]]))  # 2 heads, 1 token, 2 channels
    >>> [float(v) for v in y.reshape(-1)]
    [1.0, 1.0, 1.0, 1.0]
    """
    return RotateHeads(heads)


@dataclasses.dataclass(frozen=True)
class PermuteHeads(Transform):
    """See `permute_heads`."""

    name: str = "order"

    folds = False
    joins_heads = True

    def constants_spec(self, width):
        return {self.name: jax.ShapeDtypeStruct((width,), jnp.int32)}

    def forward(self, x, constants=None):
        return self._take(x, self._order(x, constants))

    def inverse(self, y, constants=None):
        return self._take(y, jnp.argsort(self._order(y, constants), -1))

    def _order(self, x, constants):
        order = _constant(constants, self.name)
        if order.ndim == 1:  # shapes alone are asked for
            order = jnp.broadcast_to(order, (x.shape[-3], x.shape[-1]))
        return order.reshape(*order.shape[:-2], 1, -1)

    @staticmethod
    def _take(x, order):
        heads = x.shape[-3]
        x = join(x.astype(jnp.float32))
        order = jnp.broadcast_to(order[..., None, :], (*x.shape[:-2], 1, order.shape[-1]))
        return split(jnp.take_along_axis(x, order, -1), heads)


def permute_heads(name: str = "order") -> PermuteHeads:
    """Puts the channels of all heads into a given order: those of a group may come from any head.

    constants[name], int32 [..., H, D]: where each channel comes from, h D + d. Leading axes
    broadcast against those of x (per layer: [L, 1, H, D]).

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])  # 2 heads, 1 token, 2 channels
    >>> p, order = permute_heads(), {"order": jnp.array([[3, 2], [1, 0]])}
    >>> [float(v) for v in p.encode(x, constants=order).reshape(-1)]
    [4.0, 3.0, 2.0, 1.0]
    """
    return PermuteHeads(name)


def joins_heads(codec: Any) -> bool:
    """Whether a codec codes several heads together."""
    parts = [getattr(codec, name, ()) for name in INNER]
    inner = [p for part in parts for p in (part if isinstance(part, tuple) else (part,))]
    return getattr(codec, "joins_heads", False) or any(map(joins_heads, inner))


def apart(codec: Any) -> Any:
    """The codec (or pair) with `across_heads` taken off: every head is coded by itself.

    >>> from kvjax.codecs import quantize
    >>> apart(across_heads(quantize(4))) == quantize(4)
    True
    """
    if isinstance(codec, AcrossHeads):
        return apart(codec.codec)
    changes = {}
    for name in INNER:
        inner = getattr(codec, name, ())
        other = tuple(map(apart, inner)) if isinstance(inner, tuple) else apart(inner)
        if other != inner:
            changes[name] = other
    return dataclasses.replace(codec, **changes) if changes else codec
