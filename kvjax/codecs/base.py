"""What a codec is: a frozen value with a pure pair encode and decode over arrays.

A codec says how the keys, or the values, of one cache stage are stored. Tokens are coded in
*units* of `block` consecutive tokens, and every leaf of a code carries the unit axis right after
the leading axes, so a stage slices, gathers and scatters units without knowing the format.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Code = Any  # a pytree of arrays, every leaf [..., T // block, *rest]
Constants = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Codec:
    """Base of all codecs: subclasses give `encode` and `decode`, the rest follows from them.

    Two codecs built twice from the same arguments are equal and hash alike, so they are static
    arguments of `jit` and never retrace. A new codec is a frozen dataclass of hashable fields.

    Shared conventions:
      x: [..., T, D], any leading axes, T a multiple of `block`.
      valid: bool [..., T] (leading axes may broadcast) or None for all. Tokens that are not valid
        take no part in any statistic, may hold NaN, and decode to unspecified finite numbers.
      key: a PRNG key for codecs that draw at random, or None.
      constants: arrays the codec was calibrated with, by name (`constants_spec` lists them): their
        leading axes broadcast against those of x. They cannot be fields, since fields are compared
        by value.
    """

    @property
    def block(self) -> int:
        """How many consecutive tokens are coded together."""
        return 1

    def encode(
        self,
        x: jax.Array,
        valid: jax.Array | None = None,
        key: jax.Array | None = None,
        constants: Constants | None = None,
    ) -> Code:
        """Codes x [..., T, D]; every leaf of the result is [..., T // block, *rest]."""
        raise NotImplementedError

    def decode(self, code: Code, dtype=jnp.float32, constants: Constants | None = None):
        """The stored tokens, [..., T, D] in `dtype`."""
        raise NotImplementedError

    def check(self, width: int) -> None:
        """Raises ValueError when heads of `width` channels cannot be coded."""
        if width < 1:
            raise ValueError(f"width is {width}: a head has at least one channel")

    def constants_spec(self, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, trailing shapes and dtypes of the constants needed for heads of `width`."""
        del width
        return {}

    def pick(self, found: Constants, width: int) -> dict[str, jax.Array] | None:
        """The constants that this codec needs, of those found; None: it needs none.

        Raises:
          ValueError: some are not there.
        """
        names = self.constants_spec(width)
        if missing := sorted(names.keys() - found.keys()):
            raise ValueError(f"{self} needs the constants {missing}; give them to init_cache")
        return {name: found[name] for name in names} or None

    def empty(self, leading: tuple[int, ...], tokens: int, width: int, dtype=jnp.float32) -> Code:
        """A zero-filled code of tokens // block units, which decodes to zeros."""
        shapes = self.code_spec(leading, tokens, width, dtype)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def code_spec(self, leading: tuple[int, ...], tokens: int, width: int, dtype=jnp.float32):
        """Shapes and dtypes of the code of x [*leading, tokens, width], as a pytree."""
        self.check(width)
        x = jax.ShapeDtypeStruct((*leading, tokens, width), jnp.dtype(dtype))
        given = self.constants_spec(width)
        return jax.eval_shape(lambda x, given: self.encode(x, None, None, given), x, given)

    def bits(self, width: int, dtype=jnp.bfloat16) -> float:
        """Stored bits per value, metadata included, for heads of `width` channels.

        `dtype` is that of x, which matters only where a codec stores parts in it (`dense()`).
        Constants are not counted: they are shared by all tokens.
        """
        leaves = jax.tree.leaves(self.code_spec((1,), self.block, width, dtype))
        return 8.0 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / (self.block * width)

    def roundtrip(self, x, valid=None, key=None, constants=None) -> jax.Array:
        """decode(encode(x)) in x's dtype, with the identity as its gradient (straight-through).

        Rounding has a zero derivative almost everywhere; what is trained through a codec uses this.
        Tokens that are not valid get zero gradient.
        """
        x = masked(x, valid)
        code = jax.lax.stop_gradient(self.encode(x, valid, key, constants))
        y = jax.lax.stop_gradient(self.decode(code, x.dtype, constants))
        return y + (x - jax.lax.stop_gradient(x))

    def scores(self, q: jax.Array, code: Code, constants: Constants | None = None) -> jax.Array:
        """q [..., R, D] against coded keys: float32 [..., R, T]."""
        k = self.decode(code, q.dtype, constants)
        return jnp.einsum("...rd,...td->...rt", q, k, preferred_element_type=jnp.float32)

    def mix(self, p: jax.Array, code: Code, constants: Constants | None = None) -> jax.Array:
        """Probabilities p [..., R, T] against coded values: float32 [..., R, D]."""
        v = self.decode(code, p.dtype, constants)
        return jnp.einsum("...rt,...td->...rd", p, v, preferred_element_type=jnp.float32)


def masked(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """x [..., T, D] with the rows that are not valid set to zero, by selection (NaN is dropped)."""
    return x if valid is None else jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))


def units(x: jax.Array, block: int) -> jax.Array:
    """x [..., T, D] as [..., T // block, block, D]."""
    if x.shape[-2] % block:
        raise ValueError(f"x has {x.shape[-2]} tokens: expected a multiple of the block, {block}")
    return x.reshape(*x.shape[:-2], x.shape[-2] // block, block, x.shape[-1])


def tokens(x: jax.Array) -> jax.Array:
    """Inverts `units`: [..., U, block, D] as [..., U * block, D]."""
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def saturate(x: jax.Array, dtype) -> jax.Array:
    """x in `dtype`, clipped to its finite range: float16 ends at 65504 and must not become inf."""
    top = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -top, top).astype(dtype)


def float_name(name: str, dtype) -> str:
    """The canonical name of a floating dtype, so that equal dtypes make equal codecs."""
    try:
        value = jnp.dtype(dtype)
    except TypeError:
        value = None
    if value is None or not jnp.issubdtype(value, jnp.floating):
        raise ValueError(f"{name} is {dtype!r}: expected a floating dtype")
    return value.name
