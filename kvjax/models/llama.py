"""The Llama family: modules that hold parameters only, layers stacked on a leading axis.

The forward pass that reads them is `kvjax.models.decoder`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from kvjax.models.config import Config

# name -> (shape as a function of the config, logical axes, present?)
# Matrices are [out, in], as checkpoints have them; see `linear`.
_LAYER = {
    "q": (lambda c: (c.heads * c.head_dim, c.width), ("heads", "embed"), lambda c: True),
    "k": (lambda c: (c.kv_heads * c.head_dim, c.width), ("kv_heads", "embed"), lambda c: True),
    "v": (lambda c: (c.kv_heads * c.head_dim, c.width), ("kv_heads", "embed"), lambda c: True),
    "o": (lambda c: (c.width, c.heads * c.head_dim), ("embed", "heads"), lambda c: True),
    "gate": (lambda c: (c.mlp_width, c.width), ("mlp", "embed"), lambda c: True),
    "up": (lambda c: (c.mlp_width, c.width), ("mlp", "embed"), lambda c: True),
    "down": (lambda c: (c.width, c.mlp_width), ("embed", "mlp"), lambda c: True),
    "q_bias": (lambda c: (c.heads * c.head_dim,), ("heads",), lambda c: c.qkv_bias),
    "k_bias": (lambda c: (c.kv_heads * c.head_dim,), ("kv_heads",), lambda c: c.qkv_bias),
    "v_bias": (lambda c: (c.kv_heads * c.head_dim,), ("kv_heads",), lambda c: c.qkv_bias),
    "o_bias": (lambda c: (c.width,), ("embed",), lambda c: c.out_bias),
    "gate_bias": (lambda c: (c.mlp_width,), ("mlp",), lambda c: c.mlp_bias),
    "up_bias": (lambda c: (c.mlp_width,), ("mlp",), lambda c: c.mlp_bias),
    "down_bias": (lambda c: (c.width,), ("embed",), lambda c: c.mlp_bias),
    "attention_norm": (lambda c: (c.width,), ("embed",), lambda c: True),
    "mlp_norm": (lambda c: (c.width,), ("embed",), lambda c: True),
    "post_attention_norm": (lambda c: (c.width,), ("embed",), lambda c: c.post_norms),
    "post_mlp_norm": (lambda c: (c.width,), ("embed",), lambda c: c.post_norms),
    "q_norm": (lambda c: (c.head_dim,), ("head_dim",), lambda c: c.qk_norm),
    "k_norm": (lambda c: (c.head_dim,), ("head_dim",), lambda c: c.qk_norm),
}


class Layers(nnx.Module):
    """Parameters of all layers, each [L, ...]; a name absent from the model is None."""

    def __init__(self, params: Mapping[str, jax.Array]):
        for name in _LAYER:
            value = params.get(name)
            setattr(self, name, None if value is None else nnx.Param(value))


class Model(nnx.Module):
    """A decoder: `embed` [V, D], `layers`, `norm` [D], `head` [V, D] or None when tied."""

    def __init__(self, config: Config, params: Mapping[str, jax.Array]):
        """Args:
        config: what the model is.
        params: flat name -> array, exactly the names and shapes of `parameters(config)`.

        Raises:
          ValueError: a name is missing or unknown, or a shape differs.
        """
        expected = parameters(config)
        missing, extra = sorted(expected.keys() - params), sorted(params.keys() - expected)
        if missing or extra:
            raise ValueError(f"parameters missing: {missing or 'none'}; unknown: {extra or 'none'}")
        for name, (shape, _) in expected.items():
            if tuple(params[name].shape) != shape:
                raise ValueError(
                    f"parameter {name!r} has shape {params[name].shape}, expected {shape}"
                )
        self.config = config
        self.embed = nnx.Param(params["embed"])
        self.layers = Layers(
            {k.removeprefix("layers."): v for k, v in params.items() if k.startswith("layers.")}
        )
        self.norm = nnx.Param(params["norm"])
        self.head = None if config.tied else nnx.Param(params["head"])


def parameters(config: Config) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Every parameter of a model: flat name -> (shape, logical axis names).

    Layer parameters are called "layers.q", "layers.mlp_norm", ... and have the layer axis first.
    """
    table = {
        "embed": ((config.vocab_size, config.width), ("vocab", "embed")),
        "norm": ((config.width,), ("embed",)),
    }
    if not config.tied:
        table["head"] = ((config.vocab_size, config.width), ("vocab", "embed"))
    for name, (shape, axes, present) in _LAYER.items():
        if present(config):
            table[f"layers.{name}"] = ((config.layers, *shape(config)), ("layers", *axes))
    return table


def flatten(model: Model) -> dict[str, jax.Array]:
    """The inverse of `Model(config, params)`: flat name -> array."""
    flat = {"embed": model.embed[...], "norm": model.norm[...]}
    if model.head is not None:
        flat["head"] = model.head[...]
    for name in _LAYER:
        if (param := getattr(model.layers, name)) is not None:
            flat[f"layers.{name}"] = param[...]
    return flat


def init(config: Config, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Model:
    """Random parameters: normal with standard deviation fan_in ** -0.5; norms at one."""
    params = {}
    for index, (name, (shape, _)) in enumerate(parameters(config).items()):
        if name.endswith("norm"):
            params[name] = jnp.full(shape, 0.0 if config.norm_offset else 1.0, dtype)
        elif name.endswith("bias"):
            params[name] = jnp.zeros(shape, dtype)
        else:
            noise = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
            params[name] = (noise * shape[-1] ** -0.5).astype(dtype)
    return Model(config, params)


def axes_of(name: str) -> tuple[str | None, ...]:
    """Logical axis names of one parameter, by its flat name alone.

    >>> axes_of("layers.q"), axes_of("head")
    (('layers', 'heads', 'embed'), ('vocab', 'embed'))
    """
    whole = {"embed": ("vocab", "embed"), "norm": ("embed",), "head": ("vocab", "embed")}
    return whole[name] if name in whole else ("layers", *_LAYER[name.removeprefix("layers.")][1])


def logical_axes(config: Config) -> dict[str, tuple[str | None, ...]]:
    """Flat parameter name -> logical axis names, for mapping to a mesh by rules."""
    return {name: axes for name, (_, axes) in parameters(config).items()}
