"""Modules that hold parameters only, layers of a kind stacked on a leading axis.

Attention layers are those of the Llama family ("layers.q", ...); recurrent layers ("recurrent....")
have the parameters that `Config.recurrence` names, and the same norms and MLP around them.

The forward pass that reads them is `kvjax.models.decoder`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
    "gate": (lambda c: (c.mlp_width, c.width), ("mlp", "embed"), lambda c: c.mlp_width),
    "up": (lambda c: (c.mlp_width, c.width), ("mlp", "embed"), lambda c: c.mlp_width),
    "down": (lambda c: (c.width, c.mlp_width), ("embed", "mlp"), lambda c: c.mlp_width),
    "q_bias": (lambda c: (c.heads * c.head_dim,), ("heads",), lambda c: c.qkv_bias),
    "k_bias": (lambda c: (c.kv_heads * c.head_dim,), ("kv_heads",), lambda c: c.qkv_bias),
    "v_bias": (lambda c: (c.kv_heads * c.head_dim,), ("kv_heads",), lambda c: c.qkv_bias),
    "o_bias": (lambda c: (c.width,), ("embed",), lambda c: c.out_bias),
    "gate_bias": (lambda c: (c.mlp_width,), ("mlp",), lambda c: c.mlp_width and c.mlp_bias),
    "up_bias": (lambda c: (c.mlp_width,), ("mlp",), lambda c: c.mlp_width and c.mlp_bias),
    "down_bias": (lambda c: (c.width,), ("embed",), lambda c: c.mlp_width and c.mlp_bias),
    "attention_norm": (lambda c: (c.width,), ("embed",), lambda c: True),
    "mlp_norm": (lambda c: (c.width,), ("embed",), lambda c: c.mlp_width),
    "post_attention_norm": (lambda c: (c.width,), ("embed",), lambda c: c.post_norms),
    "post_mlp_norm": (lambda c: (c.width,), ("embed",), lambda c: c.post_norms),
    "q_norm": (lambda c: (c.head_dim,), ("head_dim",), lambda c: c.qk_norm),
    "k_norm": (lambda c: (c.head_dim,), ("head_dim",), lambda c: c.qk_norm),
}

# What a recurrent layer has around its own parameters.
BLOCK = ("mixer_norm", "mlp_norm", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")


class Layers(nnx.Module):
    """Parameters of all layers of a kind, each [L, ...]; a name absent from the model is None."""

    def __init__(self, params: Mapping[str, jax.Array], names: Iterable[str] = tuple(_LAYER)):
        for name in names:
            value = params.get(name)
            setattr(self, name, None if value is None else nnx.Param(value))


class Model(nnx.Module):
    """A decoder: `embed` [V, D], `layers` (attention), `recurrent` (None without such layers),
    `norm` [D], `head` [V, D] or None when tied."""

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
        self.layers = Layers(_within(params, "layers."))
        names = (*BLOCK, *(config.recurrence.parameters(config.width) if config.recurrence else ()))
        recurrent = Layers(_within(params, "recurrent."), names)
        self.recurrent = recurrent if config.recurrent_layers else None
        self.norm = nnx.Param(params["norm"])
        self.head = None if config.tied else nnx.Param(params["head"])


def _within(params: Mapping[str, jax.Array], prefix: str) -> dict[str, jax.Array]:
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}


def stacked(name: str) -> bool:
    """Whether a flat name is that of layers: its array has the layers of that kind first."""
    return name.startswith(("layers.", "recurrent."))


def parameters(config: Config) -> dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]]:
    """Every parameter of a model: flat name -> (shape, logical axis names).

    Parameters of attention layers are called "layers.q", "layers.mlp_norm", ..., those of recurrent
    layers "recurrent.mixer_norm", ...; both have the axis of layers of that kind first.
    """
    table = {
        "embed": ((config.vocab_size, config.width), ("vocab", "embed")),
        "norm": ((config.width,), ("embed",)),
    }
    if not config.tied:
        table["head"] = ((config.vocab_size, config.width), ("vocab", "embed"))
    attention, recurrent = len(config.attention_layers), len(config.recurrent_layers)
    for name, (shape, axes, present) in _LAYER.items():
        if attention and present(config):
            table[f"layers.{name}"] = ((attention, *shape(config)), ("layers", *axes))
    if not recurrent:
        return table
    own = config.recurrence.parameters(config.width)
    if taken := sorted(set(own) & set(BLOCK)):
        raise ValueError(f"recurrence={config.recurrence}: the parameter names {taken} are taken")
    around = {"mixer_norm": ((config.width,), ("embed",))}
    around |= {n: (_LAYER[n][0](config), _LAYER[n][1]) for n in BLOCK[1:] if _LAYER[n][2](config)}
    for name, (shape, axes) in (around | own).items():
        table[f"recurrent.{name}"] = ((recurrent, *shape), ("layers", *axes))
    return table


def dtype_of(config: Config, name: str, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a parameter where the model's is `dtype`: float32 for some of recurrences."""
    kept = config.recurrence is not None and name.removeprefix("recurrent.")
    return jnp.dtype(jnp.float32 if kept and kept in config.recurrence.float32 else dtype)


def flatten(model: Model) -> dict[str, jax.Array]:
    """The inverse of `Model(config, params)`: flat name -> array."""
    flat = {}
    for name in parameters(model.config):
        home, _, leaf = name.rpartition(".")
        flat[name] = getattr(getattr(model, home) if home else model, leaf)[...]
    return flat


def init(config: Config, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Model:
    """Random parameters: normal with standard deviation fan_in ** -0.5; norms at one; what is a
    recurrence's own as it says."""
    params = {}
    for index, (name, (shape, _)) in enumerate(parameters(config).items()):
        own = None
        if name.startswith("recurrent."):
            leaf = name.removeprefix("recurrent.")
            own = config.recurrence.draw(leaf, shape, jax.random.fold_in(key, index))
        if own is not None:
            params[name] = own.astype(dtype_of(config, name, dtype))
        elif name.endswith("norm"):
            params[name] = jnp.full(shape, 0.0 if config.norm_offset else 1.0, dtype)
        elif name.endswith("bias"):
            params[name] = jnp.zeros(shape, dtype)
        else:
            # Drawn as [in, out], the order of earlier versions: a seed stays the same model.
            drawn = shape if name == "embed" else (*shape[:-2], shape[-1], shape[-2])
            noise = jax.random.normal(jax.random.fold_in(key, index), drawn, jnp.float32)
            noise = noise if name == "embed" else jnp.swapaxes(noise, -1, -2)
            params[name] = (noise * shape[-1] ** -0.5).astype(dtype)
    return Model(config, params)


def logical_axes(config: Config) -> dict[str, tuple[str | None, ...]]:
    """Flat parameter name -> logical axis names, for mapping to a mesh by rules."""
    return {name: axes for name, (_, axes) in parameters(config).items()}
