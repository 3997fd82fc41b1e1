"""A model with fewer key-value heads, by projections folded into its weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from kvjax.models.llama import Model, flatten


def merge_kv_heads(model: Model, keys: Array, values: Array) -> Model:
    """The heads of each group become one: the same layout, fewer heads, fewer weights.

        W_k' = sum_h W_k,h U_h,  W_q,h' = W_q,h U_h,  W_v' = sum_h W_v,h V_h,  W_o,h' = V_h^T W_o,h

    in the convention y = x W; biases of queries, keys and values likewise. It computes what the
    model would with keys U U^T k and values V V^T v, also within a prompt, if `keys` commute with
    rotary embedding (`compress_kv_heads(rope="commuting")`); other projections of keys suit models
    that rotate nothing. Computed in float32, then cast to the model's dtype.

    Args:
      model: without norms of queries and keys, which stand between projection and rotation.
      keys, values: U_h and V_h, [L, H, D, D] or [L, 1, H, D, D], as a calibration of
        `compress_kv_heads` gives them: how many heads make a group is seen from
        sum over a group of U_h^T U_h = 1.

    Raises:
      ValueError: norms of queries and keys; projections of another shape, or to another number of
        channels than one head has.

    Source: Effectively Compress KV Heads for LLM, arXiv 2406.07056.
    """
    config = model.config
    if config.qk_norm:
        raise ValueError(
            "merge_kv_heads: this model normalises queries and keys after their projection, into "
            "which nothing can then be folded; use compress_kv_heads as a cache"
        )
    layers, heads, width = len(config.attention_layers), config.kv_heads, config.head_dim
    bases = []
    for name, basis in (("keys", keys), ("values", values)):
        basis = jnp.asarray(basis, jnp.float32)
        basis = basis[:, 0] if basis.ndim == 5 else basis
        if basis.shape != (layers, heads, width, width):
            raise ValueError(
                f"merge_kv_heads({name}) is of shape {basis.shape}: expected "
                f"{(layers, heads, width, width)}, each group of heads to one head"
            )
        bases.append(basis)
    u, v = bases
    energy = float(jnp.sum(u[0] ** 2)) / width  # one per group
    merged = round(energy)
    if merged < 1 or heads % merged or abs(energy - merged) > 1e-2:
        raise ValueError(f"merge_kv_heads(keys): {energy:.2f} groups of {heads} heads")
    flat = flatten(model)

    def kept(name: str, basis: Array) -> None:
        """Keys and values: weights [L, H D, ...], summed over a group."""
        w = flat[name]
        x = w.reshape(layers, merged, heads // merged, width, -1).astype(jnp.float32)
        grouped = basis.reshape(layers, merged, heads // merged, width, width)
        x = jnp.einsum("lgtdw,lgtde->lgew", x, grouped, precision="highest")
        flat[name] = x.reshape(layers, merged * width, *w.shape[2:]).astype(w.dtype)

    def each(name: str, basis: Array) -> None:
        """Queries: weights [L, Hq D, ...], every head by its group's part."""
        w = flat[name]
        x = w.reshape(layers, heads, -1, width, *(w.shape[2:] or (1,))).astype(jnp.float32)
        x = jnp.einsum("lhndw,lhde->lhnew", x, basis, precision="highest")
        flat[name] = x.reshape(w.shape).astype(w.dtype)

    for end in ("", "_bias"):
        if f"layers.k{end}" in flat:
            kept(f"layers.k{end}", u)
            kept(f"layers.v{end}", v)
            each(f"layers.q{end}", u)
    out = jnp.swapaxes(flat["layers.o"], 1, 2)  # [L, Hq D, width], as queries lie
    flat["layers.o"] = out
    each("layers.o", v)
    flat["layers.o"] = jnp.swapaxes(flat["layers.o"], 1, 2)
    return Model(dataclasses.replace(config, kv_heads=merged), flat)
