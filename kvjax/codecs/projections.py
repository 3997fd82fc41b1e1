"""Projections of several heads together: fewer numbers for what heads have in common."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from kvjax.codecs.base import Codec, masked
from kvjax.codecs.dense import Dense
from kvjax.codecs.heads import join, split
from kvjax.codecs.transform import Transform, _constant, multiply

DENSE = Dense()


@dataclasses.dataclass(frozen=True)
class MergeHeads(Codec):
    """See `merge_heads`."""

    heads: int | Fraction
    name: str = "heads"
    codec: Codec = DENSE

    joins_heads = True

    def __post_init__(self):
        share = isinstance(self.heads, Fraction)
        if not (0 < self.heads <= 1 if share else self.heads >= 1):
            raise ValueError(
                f"heads is {float(self.heads) if share else self.heads}: expected a number of at "
                "least 1, or a share in (0, 1]"
            )
        if self.codec.constants_spec(8):
            raise ValueError(f"codec is {self.codec}: expected one without constants")

    @property
    def block(self) -> int:
        return self.codec.block

    def sizes(self, heads: int, width: int) -> tuple[int, int]:
        """(heads merged together, channels of what they become), of `heads` heads of `width`.

        Raises:
          ValueError: a number of heads that does not divide `heads`.
        """
        if not isinstance(self.heads, Fraction):
            if heads % self.heads:
                raise ValueError(
                    f"heads is {self.heads}: expected a divisor of the {heads} heads there are"
                )
            return heads // self.heads, width
        whole = (t for t in range(1, heads) if heads % t == 0 and t % self.heads.denominator == 0)
        group = next(whole, heads)
        return group, max(int(self.heads * group * width), 1)

    def constants_spec(self, width):
        return {self.name: jax.ShapeDtypeStruct((width, width), jnp.float32)}

    def _basis(self, constants, heads, width):
        """[..., H, D, W] and the heads merged together."""
        group, rank = self.sizes(heads, width)
        basis = _constant(constants, self.name)
        if basis.ndim == 2:  # shapes alone are asked for
            basis = jnp.zeros((heads, width, rank), basis.dtype)
        if basis.shape[-3:] != (heads, width, rank):
            raise ValueError(
                f"constants[{self.name!r}] is of shape {basis.shape}: expected {heads} heads, "
                f"{width} channels and {rank} columns last"
            )
        return basis, group

    def _merged(self, x, valid, constants):
        """(x of fewer heads, in its dtype; which of its tokens are valid)."""
        basis, group = self._basis(constants, x.shape[-3], x.shape[-1])
        y = multiply(masked(x, valid).astype(jnp.float32), basis)
        y = jnp.sum(y.reshape(*y.shape[:-3], -1, group, *y.shape[-2:]), -3).astype(x.dtype)
        valid = valid if valid is None else jnp.broadcast_to(valid[..., :1, :], y.shape[:-1])
        return y, valid

    def _spread(self, y, constants):
        """The inverse for what U spans, float32."""
        basis = _constant(constants, self.name)
        y = jnp.repeat(y.astype(jnp.float32), basis.shape[-3] // y.shape[-3], -3)
        return multiply(y, jnp.matrix_transpose(basis))

    def encode(self, x, valid=None, key=None, constants=None):
        y, valid = self._merged(x, valid, constants)
        return self.codec.encode(y, valid, key)

    def decode(self, code, dtype=jnp.float32, constants=None):
        return self._spread(self.codec.decode(code, jnp.float32), constants).astype(dtype)

    def roundtrip(self, x, valid=None, key=None, constants=None):
        """Straight-through in the codec only: the gradient of the projection is its own."""
        y, valid = self._merged(x, valid, constants)
        return self._spread(self.codec.roundtrip(y, valid, key), constants).astype(x.dtype)

    def scores(self, q, code, constants=None):
        basis, group = self._basis(constants, q.shape[-3], q.shape[-1])
        q = _together(multiply(q.astype(jnp.float32), basis).astype(q.dtype), group)
        return _apart(self.codec.scores(q, code), group)

    def mix(self, p, code, constants=None):
        basis = _constant(constants, self.name)
        group, _ = self.sizes(*basis.shape[-3:-1])
        y = _apart(self.codec.mix(_together(p, group), code), group)
        return multiply(y, jnp.matrix_transpose(basis))


def _together(x: jax.Array, group: int) -> jax.Array:
    """Rows [..., H, R, C] of the heads of a group as those of one, [..., H / group, group R, C]."""
    return x.reshape(*x.shape[:-3], x.shape[-3] // group, -1, x.shape[-1])


def _apart(x: jax.Array, group: int) -> jax.Array:
    """Inverts `_together`."""
    return x.reshape(*x.shape[:-3], x.shape[-3] * group, -1, x.shape[-1])


def merge_heads(
    heads: int | float | Fraction, name: str = "heads", codec: Codec | None = None
) -> MergeHeads:
    """Stores fewer heads: a token's channels of neighbouring heads, projected together.

        y = sum_h x_h U_h;  x_h' = y U_h^T;  U: the U_h of a group, one below the other, orthonormal

    Queries and mixed values meet y itself, q_h . x_h' = (q_h U_h) . y, so that attention costs what
    it does with that many heads.

    Args:
      heads: how many there are afterwards, each of the same size, a divisor of the number before;
        or a share of the channels: the smallest group of heads of which it leaves a whole number
        is merged, else all heads (half of 3 heads of 64: one vector of 96).
      name: constants[name], [..., H, D, W], the U_h, with leading axes that broadcast against those
        of x (per layer: [L, 1, H, D, W]).
      codec: of y, without constants; None: exactly.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[[1.0, 2.0]], [[1.0, 2.0]]])  # 2 heads, 1 token, 2 channels
    >>> c, u = merge_heads(1), {"heads": jnp.stack([jnp.eye(2)] * 2) * 0.5**0.5}
    >>> code = c.encode(x, constants=u)
    >>> code.shape, bool(jnp.allclose(c.decode(code, constants=u), x))
    ((1, 1, 2), True)
    """
    if isinstance(heads, float):
        heads = Fraction(heads).limit_denominator(1000)
    return MergeHeads(heads, name, DENSE if codec is None else codec)


@dataclasses.dataclass(frozen=True)
class ProjectHeads(Transform):
    """See `project_heads`."""

    part: float
    name: str = "factors"

    folds = False
    joins_heads = True

    def __post_init__(self):
        number = isinstance(self.part, int | float) and not isinstance(self.part, bool)
        if not number or not 0 < self.part <= 1:
            raise ValueError(f"part is {self.part!r}: a part of the channels lies in (0, 1]")
        object.__setattr__(self, "part", float(self.part))

    def check(self, width: int) -> None:
        super().check(width)
        if self.out_width(width) < 1:
            raise ValueError(f"part is {self.part}: of {width} channels a head it leaves none")

    def out_width(self, width: int) -> int:
        return int(self.part * width + 1e-9)  # 0.29 of 100 is 29, not 28.999...

    def constants_spec(self, width):
        """Of one head; of H heads both sides are H times as long."""
        rank = self.out_width(width)
        shapes = {"down": (width, rank), "up": (rank, width), "offset": (width,)}
        return {f"{self.name}_{n}": jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}

    def forward(self, x, constants=None):
        heads, (down, _, offset) = x.shape[-3], self._factors(constants)
        x = x.astype(jnp.float32)
        if down.shape[-2] == x.shape[-1]:  # one head, or the shapes of one
            return multiply(x - offset[..., None, :], down)
        return split(multiply(join(x) - offset[..., None, :], down), heads)

    def inverse(self, y, constants=None):
        heads, (_, up, offset) = y.shape[-3], self._factors(constants)
        y = y.astype(jnp.float32)
        if up.shape[-2] == y.shape[-1]:
            return multiply(y, up) + offset[..., None, :]
        return split(multiply(join(y), up) + offset[..., None, :], heads)

    def mixed(self, p, y, constants=None):
        """Images are mixed, and the few mixed ones brought back."""
        heads, (_, up, offset) = y.shape[-3], self._factors(constants)
        p, y = p.astype(jnp.float32), y.astype(jnp.float32)
        if up.shape[-2] == y.shape[-1]:
            return multiply(multiply(p, y), up) + p.sum(-1, keepdims=True) * offset[..., None, :]
        flat = p.reshape(*p.shape[:-3], 1, -1, p.shape[-1])
        m = multiply(flat, join(y)).reshape(*p.shape[:-1], -1)
        offset = split(offset[..., None, :], heads)
        return multiply(m, split(up, heads)) + p.sum(-1, keepdims=True) * offset

    def _factors(self, constants):
        return tuple(_constant(constants, f"{self.name}_{n}") for n in ("down", "up", "offset"))


def project_heads(part: float, name: str = "factors") -> ProjectHeads:
    """Stores a token as y = (x - o) E with x its channels of all H heads, read as x' = y B + o.

    E = constants[name_down] [..., 1, H D, H r], B = constants[name_up] [..., 1, H r, H D] and
    o = constants[name_offset] [..., 1, H D], float32, r = floor(part D); leading axes broadcast
    against those of x (per layer: [L, 1, 1, H D, H r] for x [L, B, H, T, D]). One factorisation
    serves all heads, since what one head's channels say of another's need not be stored twice; that
    y is handed on as H heads of r channels is a matter of layout. Values are mixed as they are
    stored. Gradients reach x, E and B.

    Args:
      part: of the channels, in (0, 1].
      name: of the constants.

    >>> import jax.numpy as jnp
    >>> p = project_heads(0.5)  # of 2 heads of 2 channels: 2 numbers
    >>> e = jnp.eye(4)[:, ::2]
    >>> given = {"factors_down": e, "factors_up": e.T, "factors_offset": jnp.ones(4)}
    >>> x = jnp.array([[[3.0, 4.0]], [[5.0, 6.0]]])  # 2 heads, 1 token
    >>> y = p.encode(x, constants=given)
    >>> y.tolist(), p.decode(y, constants=given).tolist()
    ([[[2.0]], [[4.0]]], [[[3.0, 1.0]], [[5.0, 1.0]]])
    """
    return ProjectHeads(part, name)
