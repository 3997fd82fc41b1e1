"""Inputs of the kernels, adversarial on purpose, and attention over them in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

MANTISSA = {"float32": 1e-6, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes [L, B, H, G query heads each, T, N, D] and what is special.

    Attributes:
      used: slots that count, per row; None: all.
      holes: share of the slots in use that are empty.
      top: about how large logits get; integers then, so that sums are exact in any order.
      bits, groups: of packed keys and values.
    """

    layers: int = 2
    batch: int = 2
    heads: int = 2
    queries: int = 3
    tokens: int = 1
    slots: int = 300
    width: int = 64
    dtype: str = "float32"
    used: Any = None
    holes: float = 0.2
    top: float | None = None
    softcap: float | None = None
    window: int | None = None
    bias: bool = False
    per_head: bool = False
    bits: tuple[int, int] = (4, 4)
    groups: tuple[int, int] = (32, 32)
    scales: str = "float16"

    def inputs(self, packed: bool) -> tuple[dict, dict, np.ndarray]:
        """(arguments of the kernel, the same in float64 with keys and values plain, empty)."""
        draw = np.random.default_rng(self.slots + self.width)
        lead = (self.layers, self.batch, self.heads)
        q = draw.normal(size=(self.batch, self.heads * self.queries, self.tokens, self.width))
        q = q / self.width**0.5 * (self.softcap or 1.0)
        lens = (self.layers, self.batch, self.heads) if self.per_head else (1, self.batch, 1)
        pos = np.argsort(draw.random((*lens, self.slots)))  # slot order means nothing
        pos = np.where(draw.random(pos.shape) < self.holes, -1, pos).astype(np.int32)
        used = self.slots if self.used is None else np.asarray(self.used, np.int32)
        ends = np.broadcast_to(np.reshape(used, (-1, 1)) if np.ndim(used) else used, lead[1:])
        empty = (pos < 0) | (np.arange(self.slots) >= ends[..., None])
        empty = np.broadcast_to(empty, (*lead, self.slots))
        if self.top is not None:
            q = np.rint(draw.integers(-3, 4, size=q.shape) * 1.0)
        if packed:
            given, plain = self._packed(draw, lead, empty)
        else:
            given, plain = self._exact(draw, lead, empty)
        q = jnp.asarray(q, self.dtype)
        given |= {"q": q, "pos": jnp.asarray(pos), "layer": jnp.int32(self.layers - 1)}
        given["used"] = None if self.used is None else jnp.asarray(used)
        plain |= {"q": np.asarray(q, np.float64), "pos": pos, "softcap": self.softcap}
        if self.window is not None:
            rows = self.slots + np.arange(self.tokens)
            q_pos = np.broadcast_to(rows, (self.batch, self.tokens)).astype(np.int32)
            given |= {"q_pos": jnp.asarray(q_pos), "span": jnp.int32(self.window)}
            plain |= {"q_pos": q_pos, "span": self.window}
        if self.bias:
            bias = draw.normal(size=(*lead, self.slots)).astype(np.float32)
            given["bias"], plain["bias"] = jnp.asarray(bias), bias.astype(np.float64)
        return given, plain, empty

    def _exact(self, draw: Any, lead: tuple, empty: np.ndarray) -> tuple[dict, dict]:
        size = (*lead, self.slots, self.width)
        k, v = draw.normal(size=size), draw.normal(size=size)
        if self.top is not None:
            most = round(self.top / (2 * self.width**0.5))
            k = draw.integers(-most, most + 1, size=size) * 1.0
        k, v = (np.asarray(jnp.asarray(x, self.dtype), np.float64) for x in (k, v))
        poison = lambda x: jnp.asarray(np.where(empty[..., None], np.nan, x), self.dtype)  # noqa: E731
        return {"k": poison(k), "v": poison(v)}, {"k": k, "v": v}

    def _packed(self, draw: Any, lead: tuple, empty: np.ndarray) -> tuple[dict, dict]:
        """Random codes; scales that are powers of two where sums have to be exact."""
        (kb, vb), (g, gv), n, d = self.bits, self.groups, self.slots, self.width
        units = n // g
        codes = draw.integers(0, 2**kb, size=(*lead, units, g, d))
        scale, low = draw.random((2, *lead, units, d)) + 0.5
        low = -scale * (2**kb - 1) / 2
        if self.top is not None:
            one = 2.0 ** np.rint(np.log2(self.top / (2**kb * 2 * d**0.5)))
            scale, low = np.full_like(scale, one), np.full_like(low, -one)
        scale, low = (np.asarray(jnp.asarray(x, self.scales), np.float64) for x in (scale, low))
        k = (codes * scale[..., None, :] + low[..., None, :]).reshape(*lead, n, d)
        unit = empty.reshape(*lead, units, g).all(-1)[..., None]
        poison = lambda x, where: jnp.asarray(np.where(where, np.nan, x), self.scales)  # noqa: E731
        keys = {
            "codes": _planes(codes, kb, -2),
            "scale": poison(scale, unit),
            "min": poison(low, unit),
        }
        codes = draw.integers(0, 2**vb, size=(*lead, n, d // gv, gv))
        scale, low = draw.random((2, *lead, n, d // gv)) + 0.5
        low = -scale * (2**vb - 1) / 2
        scale, low = (np.asarray(jnp.asarray(x, self.scales), np.float64) for x in (scale, low))
        v = (codes * scale[..., None] + low[..., None]).reshape(*lead, n, d)
        values = {
            "codes": _planes(codes, vb, -1).reshape(*lead, n, -1),
            "scale": poison(scale, empty[..., None]),
            "min": poison(low, empty[..., None]),
        }
        return {"k": keys, "v": values}, {"k": k, "v": v}


def _planes(codes: np.ndarray, bits: int, axis: int) -> jnp.ndarray:
    """Packs codes so that plane j of a byte holds the j-th part of the axis."""
    parts = np.split(codes, 8 // bits, axis)
    return jnp.asarray(sum(part << (bits * j) for j, part in enumerate(parts)), jnp.uint8)


def attention(case: Case, plain: dict, empty: np.ndarray) -> tuple[np.ndarray, ...]:
    """(out, max, sum) of the last layer in float64."""
    q = plain["q"].reshape(case.batch, case.heads, case.queries, case.tokens, case.width)
    k, v, bad = (x[-1] for x in (plain["k"], plain["v"], empty))
    s = np.einsum("bhgtd,bhnd->bhgtn", q, k)
    if case.softcap:
        s = case.softcap * np.tanh(s / case.softcap)
    if case.bias:
        s = s + plain["bias"][-1][:, :, None, None]
    seen = ~np.broadcast_to(bad[:, :, None, None], s.shape)
    if case.window is not None:
        at = plain["pos"][-1]
        near = plain["q_pos"][:, None, :, None] - at[:, :, None, :] < plain["span"]
        seen = seen & near[:, :, None]
    s = np.where(seen, s, -np.inf)
    top = s.max(-1)
    p = np.exp(s - np.where(np.isneginf(top), 0, top)[..., None])
    total = p.sum(-1)
    out = np.einsum("bhgtn,bhnd->bhgtd", p, v) / np.where(total > 0, total, 1)[..., None]
    lead = (case.batch, case.heads * case.queries, case.tokens)
    return out.reshape(*lead, -1), top.reshape(lead), total.reshape(lead)


def check(case: Case, part: Any, plain: dict, empty: np.ndarray) -> None:
    """Compares with float64: relative to the largest value, logit and sum that there are."""
    out, top, total = attention(case, plain, empty)
    unit = MANTISSA[case.dtype]
    some = ~np.isneginf(top)
    logit = max(1.0, np.abs(top[some]).max(initial=0.0))
    # Where values were packed or not, rounding of logits moves weights by as much.
    spread = np.abs(plain["v"]).max() * max(1.0, 0.0 if case.top else np.abs(logit))
    np.testing.assert_allclose(part.out, out, rtol=0, atol=unit * spread)
    # Of all outputs together, which average many values and are small beside the largest.
    error = np.linalg.norm(np.asarray(part.out, np.float64) - out)
    assert error <= unit * (1 if case.dtype == "bfloat16" else logit) * np.linalg.norm(out)
    assert np.array_equal(np.isneginf(np.asarray(part.max)), ~some)
    np.testing.assert_allclose(np.asarray(part.max)[some], top[some], rtol=0, atol=unit * logit)
    # log sum exp says both at once: the maximum may be rounded one way and the sum the other.
    lse, expected = (
        np.log(t[some]) + m[some]
        for t, m in ((np.asarray(part.sum), np.asarray(part.max)), (total, top))
    )
    np.testing.assert_allclose(lse, expected, rtol=0, atol=2 * unit * logit)
    assert (np.asarray(part.sum)[~some] == 0).all() and (np.asarray(part.out)[~some] == 0).all()
