"""config.json of Hugging Face's Mamba-2 and Bamba (Mamba-2 and attention) <-> Config."""

from __future__ import annotations

import math
from typing import Any

from kvjax.models.config import Config, RopeConfig
from kvjax.models.mamba2 import Mamba2

_ENDLESS = 2**31 - 1  # a recurrence has no longest sequence
# What transformers assumes where a key is absent.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mamba2": {
        "num_heads": 128,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 8,
        "conv_kernel": 4,
        "chunk_size": 256,
        "expand": 2,
        "use_conv_bias": True,
        "residual_in_fp32": True,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    },
    "bamba": {
        "num_key_value_heads": 8,
        "mamba_n_heads": 128,
        "mamba_d_head": "auto",
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
        "mamba_expand": 2,
        "mamba_conv_bias": True,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262_144,
        "partial_rotary_factor": 0.5,  # transformers says so whatever the file has
    },
}
# Name of a size in Mamba2 -> key in config.json.
_KEYS = {
    "mamba2": {
        "heads": "num_heads",
        "head_dim": "head_dim",
        "state_size": "state_size",
        "groups": "n_groups",
        "kernel": "conv_kernel",
        "chunk": "chunk_size",
        "bias": "use_bias",
        "conv_bias": "use_conv_bias",
    },
    "bamba": {
        "heads": "mamba_n_heads",
        "head_dim": "mamba_d_head",
        "state_size": "mamba_d_state",
        "groups": "mamba_n_groups",
        "kernel": "mamba_d_conv",
        "chunk": "mamba_chunk_size",
        "bias": "mamba_proj_bias",
        "conv_bias": "mamba_conv_bias",
    },
}


def recurrence_of(read: Any, family: str) -> Mamba2:
    """The recurrent layers that a config.json describes; `read` as in huggingface_config."""
    keys = _KEYS[family]
    width, expand = read.size("hidden_size"), "expand" if family == "mamba2" else "mamba_expand"
    inner = width * read.size(expand, limit=2**10)
    heads = read.size(keys["heads"], limit=2**16)
    if read.get(keys["head_dim"]) in ("auto", None):
        head_dim = max(inner // heads, 1)
    else:
        head_dim = read.size(keys["head_dim"])
    if heads * head_dim != inner:
        raise read.fail(keys["heads"], heads, f"{expand} * hidden_size / head size: {inner} wide")
    low, high = _limits(read)
    act = read.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise read.fail("hidden_act", act, "silu")
    kernel, chunk = (read.size(keys[n], limit=2**16) for n in ("kernel", "chunk"))
    return Mamba2(
        heads=heads,
        head_dim=head_dim,
        state_size=read.size(keys["state_size"]),
        groups=read.size(keys["groups"], limit=2**16),
        kernel=kernel,
        chunk=chunk,
        dt_min=low,
        dt_max=high,
        bias=read.flag(keys["bias"]),
        conv_bias=read.flag(keys["conv_bias"]),
    )


def _limits(read: Any) -> tuple[float, float | None]:
    found = read.get("time_step_limit")
    if found is None:
        return 0.0, None
    # transformers 5 writes infinity as an object, for JSON has none.
    values = [
        math.inf if v == {"__float__": "Infinity"} else v
        for v in (found if isinstance(found, list) else [])
    ]
    numbers = len(values) == 2 and all(type(v) in (int, float) for v in values)
    if not (numbers and 0 <= values[0] <= values[1]):
        raise read.fail("time_step_limit", found, "two numbers, the first not above the second")
    return float(values[0]), None if values[1] == math.inf else float(values[1])


def mamba2_config(read: Any, ids: Any) -> Config:
    """The Config of `model_type` "mamba2"; `ids` reads token ids."""
    layers = read.size("num_hidden_layers", limit=4096)
    bos = ids(read, "bos_token_id")
    return Config(
        vocab_size=read.size("vocab_size"),
        width=read.size("hidden_size"),
        mlp_width=0,
        layers=layers,
        heads=0,
        kv_heads=0,
        head_dim=0,
        family="mamba2",
        norm_eps=read.number("layer_norm_epsilon"),
        tied=read.flag("tie_word_embeddings"),
        max_length=_ENDLESS,
        bos=bos[0] if bos else None,
        eos=ids(read, "eos_token_id"),
        recurrence=recurrence_of(read, "mamba2"),
        recurrent_layers=tuple(range(layers)),
        residual_float32=read.flag("residual_in_fp32"),
    )


def bamba_layers(read: Any, layers: int) -> tuple[int, ...]:
    """Which layers of a Bamba model are recurrent."""
    found = read.get("attn_layer_indices")
    found = [] if found is None else found
    known = isinstance(found, list) and all(type(i) is int and 0 <= i < layers for i in found)
    if not known or len(set(found)) != len(found):
        raise read.fail("attn_layer_indices", found, f"different layers below {layers}")
    if len(found) in (0, layers):
        raise read.fail("attn_layer_indices", found, "some of the layers, not none or all")
    return tuple(i for i in range(layers) if i not in found)


def recurrent_json(config: Config) -> dict[str, Any]:
    """What config.json says of recurrent layers."""
    own, keys = config.recurrence, _KEYS[config.family]
    found: dict[str, Any] = {key: getattr(own, name) for name, key in keys.items()}
    found["time_step_limit"] = [own.dt_min, math.inf if own.dt_max is None else own.dt_max]
    if config.family == "mamba2":
        found["expand"] = own.inner // config.width
        found["residual_in_fp32"] = config.residual_float32
        found["layer_norm_epsilon"] = config.norm_eps
    else:
        found["mamba_expand"] = own.inner // config.width
        found["attn_layer_indices"] = list(config.attention_layers)
        found["rope_parameters"] = rope_parameters(config.rope, config.rotated / config.head_dim)
    return found


def rope_parameters(rope: RopeConfig, partial: float) -> dict[str, Any]:
    """`rope_parameters` of config.json: the base, and the part of a head that rotates."""
    return {"rope_type": "default", "rope_theta": rope.base, "partial_rotary_factor": partial}
