"""Writes a model as a Hugging Face folder that transformers (4 or 5), or LLaDA's code, reads."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np

from kvjax.models.config import Config, RopeConfig
from kvjax.models.errors import CheckpointError
from kvjax.models.huggingface_llada import llada_json
from kvjax.models.huggingface_names import (
    layer_home,
    layer_names,
    layers_of,
    single_names,
    stem,
)
from kvjax.models.huggingface_recurrent import recurrent_json
from kvjax.models.llama import Model, flatten
from kvjax.models.safetensors_file import DTYPES
from kvjax.models.tokenizer import Tokenizer

SHARD_BYTES = 5 * 2**30
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
}


def save_pretrained(
    model: Model, folder: str | os.PathLike, tokenizer: Tokenizer | None = None
) -> None:
    """Writes config.json, generation_config.json and the weights; the tokenizer when given.

    One tensor is in host memory at a time. Files above 5 GiB are split, with an index.

    Raises:
      ValueError: the parameters are spread over several hosts, or of a dtype that safetensors
        does not have.
    """
    folder, config, flat = pathlib.Path(folder), model.config, flatten(model)
    for name, value in flat.items():
        if not value.is_fully_addressable:
            raise ValueError(f"parameter {name!r} is spread over hosts: gather it or use orbax")
    entries = list(_entries(config, flat))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config_json(config, flat), indent=2))
    generation = {"bos_token_id": config.bos, "eos_token_id": _eos(config)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    shards: list[list] = [[]]
    for entry in entries:
        if shards[-1] and sum(map(_bytes, shards[-1])) + _bytes(entry) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    index = folder / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
    else:
        (folder / "model.safetensors").unlink(missing_ok=True)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / name, shard)
            weight_map |= {entry[0]: name for entry in shard}
        total = sum(map(_bytes, entries))
        text = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(text, indent=2))
    if tokenizer is not None:
        tokenizer.save(folder)


def write_safetensors(
    path: str | os.PathLike,
    entries: list[tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]],
) -> None:
    """Writes (name, dtype, shape, function giving the values) one tensor at a time, in order."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        name, dtype, shape, _ = entry
        if np.dtype(dtype) not in codes:
            raise ValueError(f"tensor {name!r}: safetensors has no dtype {dtype}")
        stop = at + _bytes(entry)
        header[name] = {
            "dtype": codes[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = pathlib.Path(f"{os.fspath(path)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, dtype, shape, values in entries:
                array = np.ascontiguousarray(values())
                if array.shape != shape or array.dtype != np.dtype(dtype):
                    raise CheckpointError(f"{path}: {name!r} is {array.dtype} {array.shape}")
                file.write(array.reshape(-1).view(np.uint8).data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _bytes(entry: tuple) -> int:
    return math.prod(entry[2]) * np.dtype(entry[1]).itemsize


def _entries(config: Config, flat: dict[str, jax.Array]) -> Iterator[tuple]:
    def entry(hf_name: str, parts: list[tuple[str, int | None]]):
        def values() -> np.ndarray:
            arrays = [np.asarray(flat[n] if i is None else flat[n][i]) for n, i in parts]
            return np.concatenate(arrays).reshape(shape)

        shapes = [flat[n].shape[0 if i is None else 1 :] for n, i in parts]
        shape = (sum(s[0] for s in shapes), *shapes[0][1:])
        if parts[0][0] == "recurrent.conv":
            shape = (shape[0], 1, shape[1])
        return hf_name, np.dtype(flat[parts[0][0]].dtype), shape, values

    family = config.family
    for name, hf_name in single_names(family).items():
        if name in flat:
            yield entry(hf_name, [(name, None)])
    for layer in range(config.layers):
        fused: dict[str, list] = {}
        home = f"{stem(family)}{layer_home(family)}{layer}."
        for name, tensor in layer_names(family).items():
            if name in flat and layer in (of_kind := layers_of(config, name)):
                fused.setdefault(home + tensor, []).append((name, of_kind.index(layer)))
        for hf_name, parts in fused.items():
            yield entry(hf_name, parts)


def _eos(config: Config) -> int | list[int] | None:
    return list(config.eos) if len(config.eos) > 1 else next(iter(config.eos), None)


def _config_json(config: Config, flat: dict[str, jax.Array]) -> dict:
    if config.family == "llada":
        return llada_json(config, str(flat["embed"].dtype), _eos(config))
    found = {
        "architectures": [_CLASSES[config.family]],
        "model_type": config.family,
        "torch_dtype": str(flat["embed"].dtype),
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "hidden_act": "silu" if config.activation == "silu" else "gelu_pytorch_tanh",
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "pad_token_id": None,  # else transformers takes the class default, Phi-3's being 32000
        "eos_token_id": _eos(config),
    }
    if config.attention_layers:
        found |= _attention_json(config)
    return found | recurrent_json(config) if config.recurrent_layers else found


def _attention_json(config: Config) -> dict:
    gemma = config.family.startswith("gemma")
    window = next((w for w in config.windows if w is not None), None)
    found = {
        "intermediate_size": config.mlp_width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_length,
        "attention_bias": config.qkv_bias and config.family != "qwen2",
        "mlp_bias": config.mlp_bias,
        "sliding_window": window,
        "rope_theta": config.rope.base,
        "rope_scaling": _rope_json(config.rope),
    }
    if gemma:
        found["hidden_activation"] = "silu" if config.activation == "silu" else "gelu_pytorch_tanh"
    if config.family in ("gemma2", "gemma3_text"):
        found["query_pre_attn_scalar"] = _whole(config.scale**-2)
        found["attn_logit_softcapping"] = config.attention_softcap
        found["final_logit_softcapping"] = config.final_softcap
    if config.windows and config.family not in ("mistral", "phi3"):
        kinds = ("full_attention", "sliding_attention")
        found["layer_types"] = [kinds[w is not None] for w in config.windows]
    if config.family in ("smollm3", "qwen2", "qwen3"):
        found["use_sliding_window"] = window is not None
    if config.family == "smollm3":
        found["no_rope_layers"] = [int(i not in config.unrotated) for i in range(config.layers)]
    if config.family in ("qwen2", "qwen3"):
        whole = [i for i, w in enumerate(config.windows) if w is not None]
        found["max_window_layers"] = whole[0] if whole else config.layers
    if config.local_rope is not None:
        found["rope_local_base_freq"] = config.local_rope.base
    if config.family == "phi3":
        found["partial_rotary_factor"] = config.rotated / config.head_dim
        found["original_max_position_embeddings"] = config.rope.original_length or config.max_length
    return found


def _whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _rope_json(rope: RopeConfig) -> dict | None:
    if rope.kind == "default":
        return None
    found: dict = {"rope_type": rope.kind, "rope_theta": rope.base}
    if rope.kind != "longrope":
        found["factor"] = rope.factor
    if rope.kind == "llama3":
        found |= {"low_freq_factor": rope.low_freq, "high_freq_factor": rope.high_freq}
    if rope.kind == "yarn":
        found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        found |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    if rope.kind == "longrope":
        found["short_factor"] = list(rope.short_factor)
        found["long_factor"] = list(rope.long_factor)
    if rope.kind not in ("linear", "dynamic"):
        found["original_max_position_embeddings"] = rope.original_length
        found["attention_factor"] = rope.attention_factor
    return {key: value for key, value in found.items() if value is not None}
