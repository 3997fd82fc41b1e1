"""config.json of Hugging Face transformers <-> Config."""

from __future__ import annotations

import math
from typing import Any

from kvjax.models.config import Config, RopeConfig
from kvjax.models.errors import CheckpointError
from kvjax.models.huggingface_llada import llada_config
from kvjax.models.huggingface_recurrent import (
    DEFAULTS,
    bamba_layers,
    mamba2_config,
    recurrence_of,
)

_SILU_EPS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_GEMMA = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "head_dim": 256}
# What transformers assumes where a key is absent.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SILU_EPS,
    "mistral": _SILU_EPS | {"sliding_window": 4096},
    "qwen2": _SILU_EPS | {"max_window_layers": 28},
    "qwen3": _SILU_EPS | {"max_window_layers": 28, "head_dim": 128},
    "smollm3": _SILU_EPS
    | {
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "no_rope_layer_interval": 4,
    },
    "gemma": _GEMMA,
    "gemma2": _GEMMA
    | {
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": _GEMMA
    | {
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
    "phi3": _SILU_EPS | {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    **DEFAULTS,
}


class _Reader:
    """Typed look-ups in a config.json; every failure names the file and the key."""

    def __init__(self, values: dict, defaults: dict, source: str):
        self.values, self.defaults, self.source = values, defaults, source

    def fail(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} is {value!r:.80}, expected {expected}")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, self.defaults.get(key, default))

    def size(self, key: str, default: int | None = None, limit: int = 2**24) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= limit:
            raise self.fail(key, value, f"an integer from 1 to {limit}")
        return value

    def number(self, key: str, default: float | None = None, inside: dict | None = None) -> float:
        value = self.get(key) if inside is None else inside.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self.fail(key, value, "a number above zero")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.fail(key, value, "true or false")
        return value


def parse_config(values: dict, source: str = "config.json") -> Config:
    """A Config from the object in a config.json, of transformers 4 or 5.

    Raises:
      CheckpointError: `model_type` is none of `FAMILIES`, "gemma3" (whose text model is taken) and
        "llada"; a key is missing, of the wrong type or out of range; or the model does something
        that kvjax does not.
    """
    if values.get("quantization_config") is not None:
        raise CheckpointError(f"{source}: quantization_config: quantised weights are not read")
    if values.get("model_type") == "gemma3":
        inner = values.get("text_config")
        if not isinstance(inner, dict):
            raise CheckpointError(f"{source}: text_config is missing")
        outer = {k: values[k] for k in ("eos_token_id", "bos_token_id") if k in values}
        values = {**outer, **inner, "model_type": "gemma3_text"}
    family = values.get("model_type")
    if not isinstance(family, str) or family not in (*FAMILIES, "llada"):
        known = ", ".join(FAMILIES)
        raise CheckpointError(
            f"{source}: model_type is {family!r:.80}, expected one of {known}, gemma3, llada"
        )
    try:
        if family == "llada":
            return llada_config(_Reader(values, {}, source))
        return _config(_Reader(values, FAMILIES[family], source), family)
    except CheckpointError:
        raise
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: {error}") from None


def _config(read: _Reader, family: str) -> Config:
    if family == "mamba2":
        return mamba2_config(read, _ids)
    gemma, sandwich = family.startswith("gemma"), family in ("gemma2", "gemma3_text")
    width, layers = read.size("hidden_size"), read.size("num_hidden_layers", limit=4096)
    heads = read.size("num_attention_heads", limit=2**16)
    head_dim = read.size("head_dim", max(width // heads, 1))
    bias = family in ("llama", "smollm3", "qwen3", "bamba") or gemma
    bias = family == "qwen2" or (bias and read.flag("attention_bias"))
    if read.get("use_bidirectional_attention"):
        raise read.fail("use_bidirectional_attention", True, "false: attention is causal")
    full, local, rotated = _ropes(read, family, head_dim)
    return Config(
        vocab_size=read.size("vocab_size"),
        width=width,
        mlp_width=read.size("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=read.size("num_key_value_heads", heads),
        head_dim=head_dim,
        family=family,
        norm_eps=read.number("rms_norm_eps"),
        norm_offset=gemma,
        activation=_activation(read, gemma),
        qkv_bias=bias,
        out_bias=bias and family != "qwen2",
        mlp_bias=family in ("llama", "smollm3", "bamba") and read.flag("mlp_bias"),
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=sandwich,
        embed_scale=math.sqrt(width) if gemma else None,
        query_scale=read.number("query_pre_attn_scalar") ** -0.5 if sandwich else None,
        attention_softcap=_softcap(read, "attn_logit_softcapping") if sandwich else None,
        final_softcap=_softcap(read, "final_logit_softcapping") if sandwich else None,
        windows=_windows(read, family, layers),
        rope=full,
        local_rope=local,
        unrotated=_unrotated(read, layers) if family == "smollm3" else (),
        rotary_width=None if rotated == head_dim else rotated,
        tied=read.flag("tie_word_embeddings"),
        max_length=read.size("max_position_embeddings", limit=2**31),
        bos=_ids(read, "bos_token_id")[0] if read.get("bos_token_id") is not None else None,
        eos=_ids(read, "eos_token_id"),
        recurrence=recurrence_of(read, family) if family == "bamba" else None,
        recurrent_layers=bamba_layers(read, layers) if family == "bamba" else (),
    )


def _ids(read: _Reader, key: str) -> tuple[int, ...]:
    value = read.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids) or value == []:
        raise read.fail(key, value, "a token id or a list of them")
    return tuple(ids)


def _softcap(read: _Reader, key: str) -> float | None:
    return None if read.get(key) is None else read.number(key)


def _activation(read: _Reader, gemma: bool) -> str:
    if gemma:  # old files say "gelu" and mean the tanh form
        name = read.get("hidden_activation") or read.get("hidden_act") or "gelu_pytorch_tanh"
        known = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
    else:
        name, known = read.get("hidden_act") or "silu", {"silu": "silu", "swish": "silu"}
    if not isinstance(name, str) or name not in known:
        raise read.fail("hidden_act", name, f"one of {', '.join(known)}")
    return known[name]


def _windows(read: _Reader, family: str, layers: int) -> tuple[int | None, ...]:
    used = family not in ("llama", "gemma", "bamba")
    if family in ("smollm3", "qwen2", "qwen3"):
        used = read.flag("use_sliding_window")
    if not used or read.get("sliding_window") is None:
        return ()
    window = read.size("sliding_window", limit=2**31)
    types = read.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if (
            not isinstance(types, list)
            or len(types) != layers
            or any(t not in known for t in types)
        ):
            raise read.fail("layer_types", types, f"{layers} entries, each one of {known}")
        sliding = [t == "sliding_attention" for t in types]
    elif family == "gemma2":
        sliding = [layer % 2 == 0 for layer in range(layers)]
    elif family == "gemma3_text":
        period = read.size("sliding_window_pattern", 6)
        sliding = [(layer + 1) % period != 0 for layer in range(layers)]
    elif family == "smollm3":
        sliding = [layer in _unrotated(read, layers) for layer in range(layers)]
    elif family in ("qwen2", "qwen3"):
        first = read.get("max_window_layers")
        sliding = [layer >= first for layer in range(layers)]
    else:
        sliding = [True] * layers
    return tuple(window if s else None for s in sliding) if any(sliding) else ()


def _unrotated(read: _Reader, layers: int) -> tuple[int, ...]:
    """Layers without rotary embedding: 0 in `no_rope_layers`, else the last of every few."""
    flags = read.get("no_rope_layers")
    if flags is None:
        every = read.size("no_rope_layer_interval")
        return tuple(range(every - 1, layers, every))
    if not isinstance(flags, list) or len(flags) != layers or any(f not in (0, 1) for f in flags):
        raise read.fail("no_rope_layers", flags, f"{layers} entries, each 0 or 1")
    return tuple(i for i, flag in enumerate(flags) if not flag)


def _ropes(read: _Reader, family: str, head_dim: int) -> tuple[RopeConfig, RopeConfig | None, int]:
    """(rule of full layers, rule of windowed layers or None, rotated channels)."""
    new, old = read.get("rope_parameters"), read.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not (value is None or isinstance(value, dict)):
            raise read.fail(key, value, "an object or null")
    full = old or new or {}
    local = {}
    if "full_attention" in full or "sliding_attention" in full:
        full, local = full.get("full_attention") or {}, full.get("sliding_attention") or {}
        for key, value in (("full_attention", full), ("sliding_attention", local)):
            if not isinstance(value, dict):
                raise read.fail(f"rope_parameters.{key}", value, "an object")
    partial = full.get("partial_rotary_factor")
    partial = read.get("partial_rotary_factor", 1.0) if partial is None else partial
    if type(partial) not in (int, float) or not 0 < partial <= 1:
        raise read.fail("partial_rotary_factor", partial, "a number above 0 and at most 1")
    if family == "bamba":
        partial = read.defaults["partial_rotary_factor"]
    if partial != 1 and family not in ("phi3", "bamba"):
        raise read.fail("partial_rotary_factor", partial, f"1 for model_type {family!r}")
    base = read.number("rope_theta", 1e4)
    local_base = read.number("rope_local_base_freq", 1e4)
    return (
        _rope(read, full, family, base),
        _rope(read, local, family, local_base) if family == "gemma3_text" else None,
        int(head_dim * partial),
    )


def _rope(read: _Reader, values: dict, family: str, base: float) -> RopeConfig:
    kind = values.get("rope_type", values.get("type")) or "default"
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    base = read.number("rope_theta", base, values)
    original = values.get("original_max_position_embeddings")
    if original is None or family == "phi3":
        original = read.get("original_max_position_embeddings", original)
    if original is not None and (type(original) is not int or original < 1):
        raise read.fail("original_max_position_embeddings", original, "an integer above zero")

    def optional(key: str) -> float | None:
        return None if values.get(key) is None else read.number(key, None, values)

    def factors(key: str) -> tuple[float, ...]:
        found = values.get(key)
        if not isinstance(found, list) or len(found) > 2**16:
            raise read.fail(key, found, "a list of numbers")
        return tuple(read.number(key, None, {key: value}) for value in found)

    if kind == "default":
        return RopeConfig(base=base)
    if kind in ("linear", "dynamic"):
        return RopeConfig(base=base, kind=kind, factor=read.number("factor", None, values))
    if kind == "llama3":
        return RopeConfig(
            base=base,
            kind=kind,
            factor=read.number("factor", None, values),
            original_length=original,
            low_freq=read.number("low_freq_factor", None, values),
            high_freq=read.number("high_freq_factor", None, values),
        )
    if kind == "yarn":
        if values.get("truncate", True) is not True:
            raise read.fail("truncate", values["truncate"], "true")
        ratio = read.size("max_position_embeddings", limit=2**31) / original if original else None
        return RopeConfig(
            base=base,
            kind=kind,
            factor=read.number("factor", ratio, values),
            original_length=original,
            beta_fast=optional("beta_fast") or 32.0,
            beta_slow=optional("beta_slow") or 1.0,
            attention_factor=optional("attention_factor"),
            mscale=optional("mscale"),
            mscale_all_dim=optional("mscale_all_dim"),
        )
    if kind == "longrope":
        return RopeConfig(
            base=base,
            kind=kind,
            original_length=original,
            attention_factor=optional("attention_factor"),
            short_factor=factors("short_factor"),
            long_factor=factors("long_factor"),
        )
    raise read.fail("rope_type", kind, "default, linear, dynamic, llama3, yarn or longrope")
