"""Linear maps of a token's channels: rotations, given projections, balancers.

A transform stores its image of a token, [..., T, W]; under `compose` the next codec stores that
image in its own way. Queries meet the image directly: q . inverse(y) = adjoint(q) . y.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import Codec, masked

multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Transform(Codec):
    """Base of the linear maps: subclasses give `forward`, `inverse` and, unless orthogonal,
    `adjoint`, each float32 [..., T, D] -> [..., T, W] or back.

    `folds`: whether a query of one head meets the images of that head by `adjoint`, and mixed
    images are brought back by `inverse`; not so for maps that mix heads or add an offset, of which
    tokens are decoded first.
    """

    folds = True

    def out_width(self, width: int) -> int:
        """Channels of the image of a head of `width` channels."""
        return width

    def forward(self, x, constants=None):
        """The image of x [..., T, D], float32 [..., T, W]."""
        raise NotImplementedError

    def inverse(self, y, constants=None):
        """The token of an image, float32 [..., T, D]."""
        raise NotImplementedError

    def adjoint(self, q, constants=None):
        """The query that scores images as q scores tokens."""
        return self.forward(q, constants)

    def mixed(self, p, y, constants=None):
        """Probabilities p [..., R, T] against the tokens of images y [..., T, W], float32."""
        v = self.inverse(y, constants).astype(p.dtype)
        return jnp.einsum("...rt,...td->...rd", p, v, preferred_element_type=jnp.float32)

    def encode(self, x, valid=None, key=None, constants=None):
        del key
        self.check(x.shape[-1])
        return self.forward(masked(x, valid), constants).astype(x.dtype)

    def decode(self, code, dtype=jnp.float32, constants=None):
        return self.inverse(code, constants).astype(dtype)

    def roundtrip(self, x, valid=None, key=None, constants=None):
        """decode(encode(x)) with its own gradient: nothing is rounded."""
        return self.decode(self.encode(x, valid, key, constants), x.dtype, constants)

    def scores(self, q, code, constants=None):
        if not self.folds:
            return super().scores(q, code, constants)
        q = self.adjoint(q, constants).astype(q.dtype)
        return jnp.einsum("...rd,...td->...rt", q, code, preferred_element_type=jnp.float32)

    def mix(self, p, code, constants=None):
        if not self.folds:
            return self.mixed(p, code, constants)
        y = jnp.einsum("...rt,...td->...rd", p, code, preferred_element_type=jnp.float32)
        return self.inverse(y, constants)


@dataclasses.dataclass(frozen=True)
class Rotate(Transform):
    """See `rotate`."""

    seed: int | str = 0
    kind: str = "hadamard"

    def __post_init__(self):
        if self.kind not in ("hadamard", "orthogonal"):
            raise ValueError(f"kind is {self.kind!r}: expected 'hadamard' or 'orthogonal'")
        if self.kind == "orthogonal" and self.seed == "hadamard":
            raise ValueError("seed is 'hadamard': kind 'orthogonal' needs an integer")
        plain = isinstance(self.seed, int) and not isinstance(self.seed, bool) and self.seed >= 0
        if not plain and self.seed != "hadamard":
            raise ValueError(f"seed is {self.seed!r}: expected an integer >= 0 or 'hadamard'")

    def check(self, width: int) -> None:
        super().check(width)
        if self.seed == "hadamard" and width & (width - 1):
            raise ValueError(f"width is {width}: seed 'hadamard' needs a power of two")

    def forward(self, x, constants=None):
        x, width = x.astype(jnp.float32), x.shape[-1]
        if self._dense(width):
            return multiply(x, _orthogonal(self.seed, width))
        return walsh_hadamard(x if self.seed == "hadamard" else x * _signs(self.seed, width))

    def _dense(self, width: int) -> bool:
        return self.kind == "orthogonal" or bool(width & (width - 1))

    def inverse(self, y, constants=None):
        y, width = y.astype(jnp.float32), y.shape[-1]
        if self._dense(width):
            return multiply(y, _orthogonal(self.seed, width).T)
        x = walsh_hadamard(y)
        return x if self.seed == "hadamard" else x * _signs(self.seed, width)


def rotate(seed: int | str = 0, kind: str = "hadamard") -> Rotate:
    """Rotates the channels of every token: y = H S x / sqrt(D), x = S H y / sqrt(D).

    H is the Walsh-Hadamard matrix and S random signs drawn from `seed` ('hadamard': no signs). A
    width that is not a power of two, and the kind "orthogonal", use a random orthogonal matrix (QR
    of a Gaussian) instead. The latter also suits vectors of a single large channel, whose image
    under H S has all entries of one magnitude, which may lie between two levels.
    Rotated channels of any token are near Gaussian, without outlier channels, so a uniform or a
    fixed grid codes them well.

    Source: QuaRot, arXiv 2404.00456; TurboQuant, arXiv 2504.19874.

    >>> import jax.numpy as jnp
    >>> r = rotate("hadamard")
    >>> [float(v) for v in r.encode(jnp.array([[2.0, 0.0, 0.0, 0.0]]))[0]]
    [1.0, 1.0, 1.0, 1.0]
    """
    return Rotate(seed, kind)


def walsh_hadamard(x: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of the last axis, of a power-of-two length n.

    H of n = a b is the Kronecker product of H of a and of b: the axis is folded so that each factor
    is one product with a matrix of at most 128 rows, which matrix units and CPUs both do faster
    than log2(n) passes of additions.

    >>> import jax.numpy as jnp
    >>> [float(v) for v in walsh_hadamard(jnp.array([1.0, 1.0, 1.0, -1.0]))]
    [1.0, 1.0, 1.0, -1.0]
    """
    n = x.shape[-1]
    if n & (n - 1):
        raise ValueError(f"x has {n} channels: expected a power of two")
    if n <= 128:
        return multiply(x, hadamard(n))
    x = multiply(x.reshape(*x.shape[:-1], n // 128, 128), hadamard(128))
    x = jnp.swapaxes(walsh_hadamard(jnp.swapaxes(x, -1, -2)), -1, -2)
    return x.reshape(*x.shape[:-2], n)


@functools.lru_cache
def hadamard(n: int) -> np.ndarray:
    """The orthonormal Hadamard matrix of order n = 2^k, 12 2^k or 20 2^k, float32 [n, n].

    Symmetric for 2^k (Sylvester's); the cores of 12 and 20 are Paley's, which are not.

    >>> h = hadamard(24)
    >>> bool(np.allclose(h @ h.T, np.eye(24), atol=1e-6)), len(set(np.abs(h).ravel()))
    (True, 1)
    """
    if not has_hadamard(n):
        raise ValueError(f"n is {n}: expected 2^k, 12 2^k or 20 2^k")
    h = _paley(n // (n & -n) * 4) if n & (n - 1) else np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h / np.sqrt(n)).astype(np.float32)


def has_hadamard(n: int) -> bool:
    """Whether `hadamard` knows this order."""
    odd = n // (n & -n)
    return odd == 1 or (odd in (3, 5) and n % 4 == 0)


def _paley(n: int) -> np.ndarray:
    """Paley's Hadamard matrix of order n = q + 1, q a prime that leaves 3 when divided by 4."""
    q = n - 1
    squares = {i * i % q for i in range(1, q)}
    sign = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    core = sign[(np.arange(q)[None] - np.arange(q)[:, None]) % q]
    skew = np.zeros((n, n))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
    return skew + np.eye(n)


@functools.lru_cache
def _signs(seed: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.float32([-1, 1]), width)


@functools.lru_cache
def _orthogonal(seed: int, width: int) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Projection(Transform):
    """See `projection`."""

    rank: int
    name: str = "basis"

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: expected at least 1")

    def check(self, width: int) -> None:
        super().check(width)
        if self.rank > width:
            raise ValueError(f"rank is {self.rank}: at most the head size, {width}")

    def out_width(self, width: int) -> int:
        return self.rank

    def constants_spec(self, width):
        return {self.name: jax.ShapeDtypeStruct((width, self.rank), jnp.float32)}

    def forward(self, x, constants=None):
        return multiply(x.astype(jnp.float32), _constant(constants, self.name))

    def inverse(self, y, constants=None):
        return multiply(
            y.astype(jnp.float32), jnp.matrix_transpose(_constant(constants, self.name))
        )


def projection(rank: int, name: str = "basis") -> Projection:
    """Stores a token's coordinates in a given orthonormal basis: y = x U, x' = y U^T.

    U = constants[name], [..., D, rank] with leading axes that broadcast against those of x (per
    layer and head: [L, 1, H, D, rank] for x [L, B, H, T, D]). Gradients reach x and U.

    >>> import jax.numpy as jnp
    >>> p, basis = projection(1), {"basis": jnp.array([[1.0], [0.0]])}
    >>> code = p.encode(jnp.array([[3.0, 4.0]]), constants=basis)
    >>> p.decode(code, constants=basis)
    Array([[3., 0.]], dtype=float32)
    """
    return Projection(rank, name)


@dataclasses.dataclass(frozen=True)
class Balance(Transform):
    """See `balance`."""

    name: str = "balance"

    def constants_spec(self, width):
        return {self.name: jax.ShapeDtypeStruct((width,), jnp.float32)}

    def forward(self, x, constants=None):
        return x.astype(jnp.float32) * _constant(constants, self.name)[..., None, :]

    def inverse(self, y, constants=None):
        return y.astype(jnp.float32) / _constant(constants, self.name)[..., None, :]

    def adjoint(self, q, constants=None):
        return self.inverse(q, constants)


def balance(name: str = "balance") -> Balance:
    """Scales each channel before it is coded: y = x b, x' = y / b, and queries by 1 / b.

    b = constants[name], [..., D], positive, with leading axes that broadcast against those of x.

    Source: the channel balancer of MiKV, arXiv 2402.18096, equations 2 to 4.

    >>> import jax.numpy as jnp
    >>> b = {"balance": jnp.array([0.5, 2.0])}
    >>> balance().encode(jnp.array([[4.0, 1.0]]), constants=b)
    Array([[2., 2.]], dtype=float32)
    """
    return Balance(name)


def _constant(constants, name: str) -> jax.Array:
    if constants is None or name not in constants:
        raise ValueError(f"constants has no {name!r}: it holds {sorted(constants or ())}")
    return constants[name]
