"""Mamba-2: a linear recurrence with one decay per head, chunk by chunk or token by token.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,    y_t = S_t C_t + D x_t

Source: Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
Space Duality, arXiv 2405.21060. Speculation by replay of accepted rows: STree, arXiv 2505.14969.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kvjax.cache.recurrent import previous
from kvjax.models.linear import apply
from kvjax.models.recurrent import RecurrentLayer

# Up to so many rows are replayed one by one, which gives the state of decoding to the last bit.
FEW = 16
_EXACT = jax.lax.Precision.HIGHEST  # float32 is float32 on accelerators too


@dataclasses.dataclass(frozen=True)
class Mamba2(RecurrentLayer):
    """Sizes of a Mamba-2 layer, and what it does.

    State, per layer and row: "memory" float32 [H, P, N] and "tail" [K - 1, H P + 2 G N], the last
    inputs of the convolution (before its activation).

    Attributes:
      heads, head_dim: H, P; together the inner width.
      state_size, groups: N, and G groups of heads that share B, C and the norm's statistics.
      kernel: K, length of the causal depthwise convolution over x, B and C.
      chunk: rows that one step of the scan over a prompt takes; changes speed only.
      dt_min, dt_max: bounds of the time step, None: no upper one.
      bias, conv_bias: whether the projections, and the convolution, have biases.
    """

    heads: int
    head_dim: int
    state_size: int
    groups: int = 1
    kernel: int = 4
    chunk: int = 256
    dt_min: float = 0.0
    dt_max: float | None = None
    bias: bool = False
    conv_bias: bool = True

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "state_size", "groups", "kernel", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.heads % self.groups:
            raise ValueError(f"heads={self.heads} must be a multiple of groups={self.groups}")
        if self.dt_min < 0 or (self.dt_max is not None and self.dt_max < self.dt_min):
            raise ValueError(
                f"dt_min={self.dt_min}, dt_max={self.dt_max}: expected 0 <= dt_min <= dt_max"
            )

    @property
    def inner(self) -> int:
        """H P."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size

    # --- parameters ---

    @property
    def float32(self) -> tuple[str, ...]:
        return ("dt_bias", "A_log", "D")

    def parameters(self, width: int) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
        everything = self.inner + self.channels + self.heads
        table = {
            "project": ((everything, width), ("inner", "embed")),  # z, x, B, C, dt
            "conv": ((self.channels, self.kernel), ("inner", None)),
            "dt_bias": ((self.heads,), ("heads",)),
            "A_log": ((self.heads,), ("heads",)),
            "D": ((self.heads,), ("heads",)),
            "gated_norm": ((self.inner,), ("inner",)),
            "out": ((width, self.inner), ("embed", "inner")),
        }
        if self.conv_bias:
            table["conv_bias"] = ((self.channels,), ("inner",))
        if self.bias:
            table |= {"project_bias": ((everything,), ("inner",)), "out_bias": ((width,), (None,))}
        return table

    def draw(self, name: str, shape: tuple[int, ...], key: Array) -> Array | None:
        if name == "A_log":
            return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0))
        if name == "D":
            return jnp.ones(shape, jnp.float32)
        if name == "dt_bias":  # softplus of it is log-uniform from 1e-3 to 1e-1
            dt = jnp.exp(
                jax.random.uniform(key, shape, jnp.float32, math.log(1e-3), math.log(1e-1))
            )
            return dt + jnp.log(-jnp.expm1(-dt))
        return None

    # --- the contract of recurrent layers ---

    def init(self, layers: int, batch: int, dtype: Any) -> dict[str, Array]:
        memory = (layers, batch, self.heads, self.head_dim, self.state_size)
        return {
            "memory": jnp.zeros(memory, jnp.float32),
            "tail": jnp.zeros((layers, batch, self.kernel - 1, self.channels), dtype),
        }

    def axes(self, state: dict[str, Array]) -> dict[str, tuple[str | None, ...]]:
        memory = ("layers", "batch", "heads", None, None)
        return {"memory": memory, "tail": ("layers", "batch", None, "inner")}

    def prepare(self, valid: Array) -> Array:
        return previous(valid, self.kernel - 1)

    def mix(
        self, layer: Any, x: Array, state: dict[str, Array], valid: Array, shared: Array,
        eps: float, split: bool = False,
    ) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        batch, rows = valid.shape
        there = valid[..., None]
        mixed = apply(x, layer.project, getattr(layer, "project_bias", None), split)
        z, raw, dt = jnp.split(mixed, [self.inner, self.inner + self.channels], -1)
        raw = jnp.where(there, raw, jnp.zeros((), raw.dtype))
        wide = self._convolve(layer, raw, state["tail"], shared).astype(raw.dtype)
        wide = jax.nn.silu(wide.astype(jnp.float32))
        cut = self.groups * self.state_size
        u, key, query = jnp.split(wide, [self.inner, self.inner + cut], -1)
        u = u.reshape(batch, rows, self.heads, self.head_dim)
        key, query = (k.reshape(batch, rows, self.groups, self.state_size) for k in (key, query))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + layer.dt_bias[...].astype(jnp.float32))
        dt = jnp.clip(dt, self.dt_min, self.dt_max)
        dt = jnp.where(there, dt, 0.0)  # padding: no decay, no input
        decay = dt * -jnp.exp(layer.A_log[...].astype(jnp.float32))
        scaled = u * dt[..., None]
        y, _ = scan_chunks(state["memory"], decay, scaled, key, query, self.chunk)
        y = y + u * layer.D[...].astype(jnp.float32)[:, None]
        y = y.reshape(batch, rows, self.inner) * jax.nn.silu(z.astype(jnp.float32))
        y = _grouped_norm(y, self.groups, eps).astype(x.dtype) * layer.gated_norm[...]
        out = apply(y, layer.out, getattr(layer, "out_bias", None), split)
        key = jnp.where(there[..., None], key, 0.0)
        return out, {"decay": decay, "input": scaled, "key": key, "conv": raw}

    def _convolve(self, layer: Any, raw: Array, tail: Array, shared: Array) -> Array:
        """Causal depthwise convolution over valid rows, float32 [B, T, channels]."""
        rows = raw.shape[1]
        weight = layer.conv[...].astype(jnp.float32).T
        sequence = jnp.concatenate([tail.astype(raw.dtype), raw], 1)
        out = raw.astype(jnp.float32) * weight[-1]
        for back in range(self.kernel - 1):
            if rows == 1:
                before = sequence[:, back : back + 1]
            else:
                before = jnp.take_along_axis(sequence, shared[:, :rows, back, None], 1)
            out = out + before.astype(jnp.float32) * weight[back]
        bias = getattr(layer, "conv_bias", None)
        return out if bias is None else out + bias[...].astype(jnp.float32)

    def advance(
        self, state: dict[str, Array], rows: dict[str, Array], valid: Array
    ) -> dict[str, Array]:
        there = valid[..., None]
        decay = jnp.where(there, rows["decay"], 0.0)
        scaled = jnp.where(there[..., None], rows["input"], 0.0)
        memory, count = state["memory"], valid.shape[1]
        if count == 1:
            memory = step(memory, decay[:, :, 0], scaled[:, :, 0], rows["key"][:, :, 0])
        elif count <= FEW:

            def replay(t: Array, memory: Array) -> Array:
                at = lambda x: jax.lax.dynamic_index_in_dim(x, t, 2, False)  # noqa: E731
                return step(memory, at(decay), at(scaled), at(rows["key"]))

            last = jnp.max(jnp.where(valid, jnp.arange(1, count + 1), 0))  # rejected rows are free
            memory = jax.lax.fori_loop(0, last, replay, memory)
        else:
            _, memory = scan_chunks(memory, decay, scaled, rows["key"], None, self.chunk)
        return {"memory": memory, "tail": self._tail(state["tail"], rows["conv"], valid)}

    def _tail(self, tail: Array, raw: Array, valid: Array) -> Array:
        if self.kernel == 1:
            return tail
        sequence = jnp.concatenate([tail, raw.astype(tail.dtype)], 2)
        last = previous(valid, self.kernel - 1)[:, -1]
        return jnp.take_along_axis(sequence, last[None, :, :, None], 2)


def step(memory: Array, decay: Array, scaled: Array, key: Array) -> Array:
    """One token of the recurrence.

    Args:
      memory: float32 [..., H, P, N].
      decay: log of the decay, [..., H]. scaled: dt x, [..., H, P]. key: B, [..., G, N].
    """
    key = jnp.repeat(key, memory.shape[-3] // key.shape[-2], -2)
    return jnp.exp(decay)[..., None, None] * memory + scaled[..., None] * key[..., None, :]


def scan_chunks(
    memory: Array, decay: Array, scaled: Array, key: Array, query: Array | None, chunk: int
) -> tuple[Array | None, Array]:
    """The recurrence over T tokens, a chunk at a time: matrix products within, a scan between.

    Args:
      memory: float32 [..., H, P, N], before the first token.
      decay: [..., T, H], scaled: [..., T, H, P], key, query: [..., T, G, N], as in `step`; query is
        C, or None where only the state is wanted.
      chunk: tokens per step.

    Returns:
      (y [..., T, H, P] with y_t = S_t C_t, or None; memory after the last token).
    """
    lead, time = decay.shape[:-2], decay.shape[-2]
    axis = len(lead)
    groups = key.shape[-2]
    split = lambda x, at: x.reshape(*x.shape[:at], groups, -1, *x.shape[at + 1 :])  # noqa: E731
    memory, decay, scaled = split(memory, axis), split(decay, axis + 1), split(scaled, axis + 1)
    if time <= chunk:
        y, memory = _chunk(memory, decay, scaled, key, query)
    else:
        more = -time % chunk

        def cut(x: Array) -> Array:  # padding decays nothing and adds nothing
            x = jnp.pad(x, [(0, more if a == axis else 0) for a in range(x.ndim)])
            x = x.reshape(*lead, -1, chunk, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        def body(memory: Array, xs: Any) -> tuple[Array, Array | None]:
            y, memory = _chunk(memory, *xs)
            return memory, y

        memory, y = jax.lax.scan(body, memory, jax.tree.map(cut, (decay, scaled, key, query)))
        if y is not None:
            y = jnp.moveaxis(y, 0, axis)
            y = y.reshape(*lead, time + more, *y.shape[axis + 2 :])
            y = jax.lax.slice_in_dim(y, 0, time, axis=axis)
    join = lambda x, at: x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])  # noqa: E731
    return None if y is None else join(y, axis + 1), join(memory, axis)


def _chunk(
    memory: Array, decay: Array, scaled: Array, key: Array, query: Array | None
) -> tuple[Array | None, Array]:
    """One chunk of Q tokens; heads as [G, H / G]."""
    product = lambda how, *x: jnp.einsum(how, *x, precision=_EXACT)  # noqa: E731
    decay = jnp.moveaxis(decay, -3, -1)  # [..., G, R, Q]
    size = decay.shape[-1]
    # Sums of decays after j up to i, each summed by itself: differences of running sums lose what
    # is small beside what came before.
    after = jnp.arange(size)[:, None] > jnp.arange(size)
    between = jnp.cumsum(jnp.where(after, decay[..., :, None], 0.0), -2)
    inside = jnp.exp(jnp.where(after | jnp.eye(size, dtype=bool), between, -jnp.inf))
    begin = jnp.exp(jnp.cumsum(decay, -1))  # from before the chunk to i
    y = None
    if query is not None:
        scores = product("...ign,...jgn->...gij", query, key)
        y = product("...grij,...jgrp->...igrp", scores[..., None, :, :] * inside, scaled)
        held = product("...ign,...grpn->...igrp", query, memory)
        y = y + held * jnp.moveaxis(begin, -1, -3)[..., None]
    left = scaled * jnp.moveaxis(inside[..., -1, :], -1, -3)[..., None]
    memory = begin[..., -1, None, None] * memory + product("...jgrp,...jgn->...grpn", left, key)
    return y, memory


def _grouped_norm(y: Array, groups: int, eps: float) -> Array:
    """RMSNorm without weight over each of `groups` parts of the last axis, float32."""
    parts = y.reshape(*y.shape[:-1], groups, -1)
    parts = parts * jax.lax.rsqrt(jnp.mean(parts * parts, -1, keepdims=True) + eps)
    return parts.reshape(y.shape)
