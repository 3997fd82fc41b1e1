"""Low rank per block of tokens, by power iteration."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.codecs.base import Codec, float_name, masked, saturate, tokens, units


@dataclasses.dataclass(frozen=True)
class LowRank(Codec):
    """See `low_rank`."""

    rank: int
    span: int = 64
    iterations: int = 3
    seed: int = 0
    dtype: str = "float16"

    def __post_init__(self):
        if not 1 <= self.rank <= self.span:
            raise ValueError(f"rank is {self.rank}: expected 1 to block, {self.span}")
        if self.iterations < 1:
            raise ValueError(f"iterations is {self.iterations}: expected at least 1")
        object.__setattr__(self, "dtype", float_name("dtype", self.dtype))

    @property
    def block(self) -> int:
        return self.span

    def check(self, width: int) -> None:
        super().check(width)
        if self.rank > width:
            raise ValueError(f"rank is {self.rank}: at most the head size, {width}")

    def encode(self, x, valid=None, key=None, constants=None):
        del key, constants
        self.check(x.shape[-1])
        e = units(masked(x, valid).astype(jnp.float32), self.span)
        exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        et = jnp.matrix_transpose(e)
        basis = jax.lax.stop_gradient(e)
        p = jnp.asarray(_start(self.seed, x.shape[-1], self.rank))
        p = jnp.broadcast_to(p, (*e.shape[:-2], *p.shape))
        for _ in range(self.iterations):
            q = exact(basis, orthonormal(p))
            p = exact(jnp.matrix_transpose(basis), q)
        q = orthonormal(q).astype(self.dtype)
        return {"q": q, "p": saturate(exact(et, q.astype(jnp.float32)), self.dtype)}

    def decode(self, code, dtype=jnp.float32, constants=None):
        del constants
        q, p = code["q"].astype(jnp.float32), code["p"].astype(jnp.float32)
        return tokens(jnp.einsum("...tr,...dr->...td", q, p)).astype(dtype)

    def scores(self, q, code, constants=None):
        del constants
        q, left, right = (a.astype(jnp.float32) for a in (q, code["q"], code["p"]))
        s = jnp.einsum("...nd,...udr->...nur", q, right)
        s = jnp.einsum("...nur,...utr->...nut", s, left)
        return s.reshape(*s.shape[:-2], -1)

    def mix(self, p, code, constants=None):
        del constants
        p, left, right = (a.astype(jnp.float32) for a in (p, code["q"], code["p"]))
        p = p.reshape(*p.shape[:-1], -1, self.span)
        return jnp.einsum(
            "...nur,...udr->...nd", jnp.einsum("...nut,...utr->...nur", p, left), right
        )


def low_rank(
    rank: int, block: int = 64, iterations: int = 3, seed: int = 0, dtype="float16"
) -> LowRank:
    """Stores `block` tokens E [block, D] as Q P^T with Q [block, r] orthonormal and P = E^T Q.

    Power iteration: from P drawn from `seed`, each round Q = E P and P = E^T Q, with P made
    orthonormal before and Q after the last product (QR). Q P^T = Q Q^T E is a projection of E, so
    |E - Q P^T| <= |E| in the Frobenius norm: as part of a `residual` it never adds error. It is as
    good as the truncated SVD up to what the rounds have not separated. P is computed from Q as
    stored. Gradients of decode(encode(x)) take the basis Q as given.

    Args:
      rank: r, at most `block` and at most D.
      block: tokens factored together.
      iterations: rounds, at least 1.
      seed: of the start, the same for all blocks.
      dtype: of Q and P.

    Code: q [..., T/block, block, r], p [..., T/block, D, r]. Stored bits per value:
    16 r (block + D) / (block D).

    Source: GEAR, arXiv 2403.05527.

    >>> import jax.numpy as jnp
    >>> x = jnp.outer(jnp.arange(4.0), jnp.array([1.0, -2.0]))
    >>> c = low_rank(1, block=4, dtype="float32")
    >>> bool(jnp.allclose(c.decode(c.encode(x)), x, atol=1e-5))
    True
    """
    return LowRank(rank, block, iterations, seed, dtype)


def orthonormal(x: jax.Array) -> jax.Array:
    """Columns of x [..., n, r] made orthonormal, in order (Gram-Schmidt, each projected twice).

    A column that depends on those before it becomes zero. In place of `jnp.linalg.qr`, whose calls
    into LAPACK wait for one another's threads on CPU: two at once can stop a program for good.
    """
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    small = 1e-6 * jnp.max(jnp.linalg.norm(x, axis=-2), -1)[..., None]

    def column(j: int, q: jax.Array) -> jax.Array:
        v = jax.lax.dynamic_index_in_dim(x, j, -1, keepdims=False)
        for _ in range(2):
            inside = exact(jnp.matrix_transpose(q), v[..., None])
            v = v - exact(q, inside)[..., 0]
        size = jnp.linalg.norm(v, axis=-1, keepdims=True)
        v = jnp.where(size > small, v / jnp.where(size > small, size, 1.0), 0.0)
        return jax.lax.dynamic_update_index_in_dim(q, v, j, -1)

    return jax.lax.fori_loop(0, x.shape[-1], column, jnp.zeros_like(x))


@functools.lru_cache
def _start(seed: int, width: int, rank: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((width, rank)).astype(np.float32)
