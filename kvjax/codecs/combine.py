"""Combinations of codecs: one after another, one on the error of another, outliers apart.

The block of a combination is the least common multiple of its parts' blocks. A part of a smaller
block is given x as [..., T / block, block, D]: its own unit axis then follows the combination's,
and its leaves are [..., T / block, block / part.block, *rest].
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax.codecs.base import Codec, masked, tokens, units
from kvjax.codecs.dense import Dense
from kvjax.codecs.sparse import Outliers
from kvjax.codecs.transform import Transform


@dataclasses.dataclass(frozen=True)
class Part:
    """A codec as a part of a combination of a larger block: the same methods, regrouped."""

    codec: Codec
    block: int

    def encode(self, x, valid=None, key=None, constants=None):
        valid = valid if valid is None else self._in(valid[..., None])[..., 0]
        return self.codec.encode(self._in(x), valid, key, self._given(constants))

    def decode(self, code, dtype=jnp.float32, constants=None):
        return self._out(self.codec.decode(code, dtype, self._given(constants)))

    def overwrite(self, code, x):
        return self._out(self.codec.overwrite(code, self._in(x)))

    def fill(self, code, x, valid=None):
        valid = valid if valid is None else self._in(valid[..., None])[..., 0]
        return self._out(self.codec.fill(code, self._in(x), valid))

    def scores(self, q, code, constants=None):
        if self._same:
            return self.codec.scores(q, code, constants)
        s = self.codec.scores(q[..., None, :, :], code, self._given(constants))
        return _join(jnp.moveaxis(s, -3, -2))

    def mix(self, p, code, constants=None):
        if self._same:
            return self.codec.mix(p, code, constants)
        p = p.reshape(*p.shape[:-1], -1, self.block)
        p = jnp.moveaxis(p, -2, -3)
        return jnp.sum(self.codec.mix(p, code, self._given(constants)), -3)

    @property
    def _same(self) -> bool:
        return self.codec.block == self.block

    def _in(self, x):
        return x if self._same else units(x, self.block)

    def _out(self, x):
        return x if self._same else tokens(x)

    def _given(self, constants):
        """Constants with an axis for the units, so that they still broadcast against x."""
        if self._same or not constants:
            return constants
        spec = self.codec.constants_spec(1)
        given = {n: jnp.expand_dims(constants[n], -len(s.shape) - 1) for n, s in spec.items()}
        return {**constants, **given}


def _join(x):
    """[..., a, b] as [..., a b]."""
    return x.reshape(*x.shape[:-2], -1)


@dataclasses.dataclass(frozen=True)
class Compose(Codec):
    """See `compose`."""

    parts: tuple[Codec, ...]

    def __post_init__(self):
        for part in self.parts[:-1]:
            if not isinstance(part, Transform):
                raise ValueError(
                    f"part {part} of compose is not a transform: only the last may be another codec"
                )

    @property
    def block(self) -> int:
        return self.parts[-1].block

    def check(self, width: int) -> None:
        super().check(width)
        for part in self.parts[:-1]:
            part.check(width)
            width = part.out_width(width)
        self.parts[-1].check(width)

    def constants_spec(self, width):
        spec = {}
        for part in self.parts:
            spec |= part.constants_spec(width)
            width = part.out_width(width) if isinstance(part, Transform) else width
        return spec

    def encode(self, x, valid=None, key=None, constants=None):
        *first, last = self.parts
        y = masked(x, valid)
        for part in first:
            part.check(y.shape[-1])
            y = part.forward(y, constants)
        y = y.astype(x.dtype) if isinstance(last, Transform) else y
        return last.encode(y, valid, key, constants)

    def decode(self, code, dtype=jnp.float32, constants=None):
        *first, last = self.parts
        y = last.decode(code, jnp.float32, constants)
        return self._inverse(first, y, constants).astype(dtype)

    def roundtrip(self, x, valid=None, key=None, constants=None):
        """Straight-through in the last part only: the gradient of the transforms is their own."""
        *first, last = self.parts
        y = masked(x, valid).astype(jnp.float32)
        for part in first:
            y = part.forward(y, constants)
        y = last.roundtrip(y, valid, key, constants)
        return self._inverse(first, y, constants).astype(x.dtype)

    @property
    def _folds(self) -> bool:
        return all(part.folds for part in self.parts if isinstance(part, Transform))

    def scores(self, q, code, constants=None):
        if not self._folds:
            return super().scores(q, code, constants)
        *first, last = self.parts
        y = q
        for part in first:
            y = part.adjoint(y, constants)
        return last.scores(y.astype(q.dtype), code, constants)

    def mix(self, p, code, constants=None):
        *first, last = self.parts
        if not self._folds:
            y = last.decode(code, jnp.float32, constants)
            return first[0].mixed(p, self._inverse(first[1:], y, constants), constants)
        return self._inverse(first, last.mix(p, code, constants), constants)

    def _inverse(self, first, y, constants):
        for part in reversed(first):
            y = part.inverse(y, constants)
        return y


def compose(*codecs: Codec) -> Codec:
    """Codes through each codec in turn: encode left to right, decode right to left.

    All but the last must be transforms (`rotate`, `projection`, `balance`). `compose` flattens and
    drops `dense()`, its identity, so that laws are literal equality. Queries are transformed once
    and meet coded keys directly; the mix of coded values is transformed back once.

    >>> from kvjax.codecs import dense, quantize, rotate
    >>> a, b, c = rotate(0), rotate(1), quantize(4)
    >>> compose(compose(a, b), c) == compose(a, compose(b, c)) == compose(a, dense(), b, c)
    True
    >>> compose(c) == c, compose() == dense()
    (True, True)
    """
    flat = []
    for codec in codecs:
        flat.extend(codec.parts if isinstance(codec, Compose) else (codec,))
    flat = [codec for codec in flat if codec != Dense()]
    return Compose(tuple(flat)) if len(flat) > 1 else flat[0] if flat else Dense()


@dataclasses.dataclass(frozen=True)
class Residual(Codec):
    """See `residual`."""

    parts: tuple[Codec, ...]

    @property
    def block(self) -> int:
        return math.lcm(*(part.block for part in self.parts))

    @property
    def _parts(self) -> list[Part]:
        return [Part(codec, self.block) for codec in self.parts]

    def check(self, width: int) -> None:
        for part in self.parts:
            part.check(width)

    def constants_spec(self, width):
        return {n: s for part in self.parts for n, s in part.constants_spec(width).items()}

    def encode(self, x, valid=None, key=None, constants=None):
        self.check(x.shape[-1])
        keys = [None] * len(self.parts) if key is None else jax.random.split(key, len(self.parts))
        error, codes = masked(x, valid).astype(jnp.float32), []
        for i, part in enumerate(self._parts):
            codes.append(part.encode(error, valid, keys[i], constants))
            if i < len(self.parts) - 1:
                error = error - part.decode(codes[-1], jnp.float32, constants)
        return tuple(codes)

    def decode(self, code, dtype=jnp.float32, constants=None):
        parts = zip(self._parts, code)
        return sum(part.decode(c, jnp.float32, constants) for part, c in parts).astype(dtype)

    def scores(self, q, code, constants=None):
        return sum(part.scores(q, c, constants) for part, c in zip(self._parts, code))

    def mix(self, p, code, constants=None):
        return sum(part.mix(p, c, constants) for part, c in zip(self._parts, code))


def residual(*codecs: Codec) -> Codec:
    """Each codec codes the error left by the sum of those before it; the value is the sum of all.

    The code is a tuple of the parts' codes. `residual(a)` is a, and a residual in first place is
    flattened. Errors are float32: a part without a dtype of its own (`dense()`) stores that.

    >>> from kvjax.codecs import low_rank, quantize
    >>> r = residual(with_outliers(quantize(2, "channel", 64), 0.02), low_rank(4))
    >>> r.block, r.bits(64)
    (64, 5.25)
    """
    if not codecs:
        raise ValueError("residual needs at least one codec")
    first, *others = codecs
    parts = (*(first.parts if isinstance(first, Residual) else (first,)), *others)
    return Residual(parts) if len(parts) > 1 else first


@dataclasses.dataclass(frozen=True)
class WithOutliers(Codec):
    """See `with_outliers`."""

    rest: Codec
    outliers: Outliers

    @property
    def block(self) -> int:
        return math.lcm(self.rest.block, self.outliers.block)

    @property
    def _parts(self) -> tuple[Part, Part]:
        return Part(self.outliers, self.block), Part(self.rest, self.block)

    def check(self, width: int) -> None:
        self.outliers.check(width)
        self.rest.check(width)

    def constants_spec(self, width):
        return self.rest.constants_spec(width)

    def encode(self, x, valid=None, key=None, constants=None):
        self.check(x.shape[-1])
        outliers, rest = self._parts
        sparse = outliers.encode(x, valid, key, constants)
        filled = outliers.fill(sparse, x, valid)
        return {"outliers": sparse, "rest": rest.encode(filled, valid, key, constants)}

    def decode(self, code, dtype=jnp.float32, constants=None):
        outliers, rest = self._parts
        x = rest.decode(code["rest"], jnp.float32, constants)
        return outliers.overwrite(code["outliers"], x).astype(dtype)


def with_outliers(
    codec: Codec,
    fraction: float,
    axis: str | None = None,
    block: int | None = None,
    dtype="float16",
) -> Codec:
    """Stores each vector's extreme entries exactly, and the rest by `codec`.

    `codec` sees the vector's mean in the place of its outliers, so that they no longer stretch its
    range, and the outliers are written over what it gives back. With `fraction` 0 it is `codec`.

    Args:
      codec: codes the rest.
      fraction: share of entries kept exactly, see `outliers`.
      axis: of the outliers' vectors; None: the axis of `codec` ("token" where it has none).
      block: tokens of a vector along "channel"; None: the block of `codec`.
      dtype: of the kept values.

    Source: GEAR, arXiv 2403.05527.

    >>> import jax.numpy as jnp
    >>> from kvjax.codecs import quantize
    >>> c = with_outliers(quantize(1), 0.25)
    >>> x = jnp.array([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, -90.0, 90.0]])
    >>> bool((c.decode(c.encode(x)) == x).all())
    True
    """
    axis = axis or getattr(codec, "axis", "token")
    block = block or (codec.block if codec.block > 1 else 64)
    sparse = Outliers(fraction, axis, block, None, dtype)
    return WithOutliers(codec, sparse) if sparse.fraction else codec
