"""Host memory: arrays that lie beside the device's own memory, written and read there in part.

Where an array lies is part of its type, so that what is jitted knows it: `in_host(x)`. On whole
arrays such as [L, B, H, N, ...] there are three operations, each done by the host where they lie:
`put` rows, `take` rows, and `read` what a function says. Only indices and rows cross over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.compute_on import compute_on

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@functools.cache
def has_host() -> bool:
    """Whether the platform lets arrays lie in host memory that devices can read."""
    return any(m.kind == "pinned_host" for m in jax.local_devices()[0].addressable_memories())


def to_host(tree: Any) -> Any:
    """The arrays in host memory; unchanged where the platform has none."""
    return jax.device_put(tree, HOST) if has_host() else tree


def in_host(x: Any) -> bool:
    """Whether an array, or a tracer of one, lies in host memory."""
    return jax.typeof(x).memory_space == HOST


def _there(run: Callable, *args: Any) -> Array:
    """run(*args) by the host, in whose memory all of them and the result lie."""
    return compute_on("device_host")(jax.jit(run))(*jax.device_put(args, HOST))


def read(run: Callable, x: Array, *where: Any) -> Array:
    """run(x, *where) on the device: computed where x lies, by the host or by the device itself."""
    if not in_host(x):
        return run(x, *where)
    return jax.device_put(_there(run, x, *map(jnp.asarray, where)), DEVICE)


def _number(shape: tuple[int, ...], at: Array) -> Array:
    """Which row of all [L * B * H * N] slot `at` [L, B, H, M] is; outside [0, N): past the end."""
    rows = math.prod(shape[:4])
    if rows >= 2**31:
        raise ValueError(f"host memory: {rows:,} slots in one array {shape}, expected below 2^31")
    head = jnp.arange(math.prod(shape[:3])).reshape(*shape[:3], 1)
    return jnp.where((at >= 0) & (at < shape[3]), head * shape[3] + at, rows)


def put(x: Array, at: Array, rows: Array) -> Array:
    """x [L, B, H, N, ...] with rows [L, B, H, M, ...] at slots `at`; outside [0, N): dropped."""
    number = _number(x.shape, at).reshape(-1)
    flat = rows.astype(x.dtype).reshape(-1, *x.shape[4:])

    def run(x: Array, number: Array, flat: Array) -> Array:
        every = x.reshape(-1, *x.shape[4:])
        return every.at[number].set(flat, mode="drop").reshape(x.shape)

    return _there(run, x, number, flat)


def take(x: Array, at: Array, layer: Array | None = None) -> Array:
    """Rows of x [L, B, H, N, ...] at slots `at` [L, B, H, M], or [B, H, M] of one layer, on the
    device; slots outside [0, N) are the nearest."""
    at = jnp.clip(at, 0, x.shape[3] - 1)
    if layer is None:
        number = _number(x.shape, jnp.broadcast_to(at, (*x.shape[:3], at.shape[3])))
    else:
        own = _number((1, *x.shape[1:]), jnp.broadcast_to(at, (1, *x.shape[1:3], at.shape[2])))
        number = own[0] + (layer if x.shape[0] > 1 else 0) * math.prod(x.shape[1:4])
    return read(lambda x, number: x.reshape(-1, *x.shape[4:])[number], x, number)
