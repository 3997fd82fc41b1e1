"""A model from a GGUF file: metadata -> Config, tensors -> parameters."""

from __future__ import annotations

import math
import os

import jax.numpy as jnp
import numpy as np

from kvjax.models.config import Config, RopeConfig
from kvjax.models.errors import CheckpointError
from kvjax.models.gguf_file import GGUFFile, open_gguf
from kvjax.models.llama import Model
from kvjax.models.weights import Piece, Sharding, assemble

# GGUF architecture -> family; "llama" also holds Mistral.
FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}

_NAMES = {
    "embed": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers.q": "attn_q.weight",
    "layers.k": "attn_k.weight",
    "layers.v": "attn_v.weight",
    "layers.o": "attn_output.weight",
    "layers.gate": "ffn_gate.weight",
    "layers.up": "ffn_up.weight",
    "layers.down": "ffn_down.weight",
    "layers.q_bias": "attn_q.bias",
    "layers.k_bias": "attn_k.bias",
    "layers.v_bias": "attn_v.bias",
    "layers.o_bias": "attn_output.bias",
    "layers.gate_bias": "ffn_gate.bias",
    "layers.up_bias": "ffn_up.bias",
    "layers.down_bias": "ffn_down.bias",
    "layers.attention_norm": "attn_norm.weight",
    "layers.mlp_norm": "ffn_norm.weight",
    "layers.post_attention_norm": "post_attention_norm.weight",
    "layers.post_mlp_norm": "post_ffw_norm.weight",
    "layers.q_norm": "attn_q_norm.weight",
    "layers.k_norm": "attn_k_norm.weight",
}


def load_gguf(
    path: str | os.PathLike | GGUFFile,
    *,
    dtype: jnp.dtype = jnp.float32,
    sharding: Sharding = None,
    check_finite: bool = False,
) -> Model:
    """Loads and dequantises a GGUF file (arguments as in `kvjax.models.weights.assemble`).

    Raises:
      CheckpointError: the file is malformed, or its architecture is none of `FAMILIES`.
    """
    file = path if isinstance(path, GGUFFile) else open_gguf(path)
    config = gguf_config(file)
    return assemble(
        config,
        lambda name, layer: _piece(file, config, name, layer),
        dtype=dtype,
        sharding=sharding,
        check_finite=check_finite,
        source=file.path,
    )


def gguf_config(file: GGUFFile) -> Config:
    """The configuration that a GGUF file's metadata and tensor names describe.

    Raises:
      CheckpointError: unknown architecture, a key missing, of the wrong type or out of range.
    """
    arch = file.get("general.architecture", str)
    if arch not in FAMILIES:
        raise CheckpointError(
            f"{file.path}: general.architecture is {arch!r}, expected one of {', '.join(FAMILIES)}"
        )
    if file.metadata.get(f"{arch}.expert_count"):
        raise CheckpointError(f"{file.path}: mixture-of-experts models are not supported")

    def size(key: str, default: int | None = None, limit: int = 2**24) -> int:
        value = file.get(f"{arch}.{key}", int, default)
        if not 0 < value <= limit:
            raise CheckpointError(f"{file.path}: {arch}.{key} is {value}, expected 1 to {limit}")
        return value

    def number(key: str, default: float) -> float:
        value = file.get(f"{arch}.{key}", float, default)
        if not (math.isfinite(value) and value > 0):
            raise CheckpointError(f"{file.path}: {arch}.{key} is {value}, expected above zero")
        return _plain(value)

    layers, width = size("block_count", limit=4096), size("embedding_length")
    heads = size("attention.head_count", limit=2**16)
    head_dim = size("attention.key_length", max(width // heads, 1))
    max_length = size("context_length", limit=2**31)
    rotated = size("rope.dimension_count", head_dim)
    gemma = arch.startswith("gemma")
    window = file.metadata.get(f"{arch}.attention.sliding_window") or None
    windows = ()
    if window is not None and arch in ("gemma2", "gemma3", "phi3"):
        window = size("attention.sliding_window", limit=2**31)
        period = {"gemma2": 2, "gemma3": 6, "phi3": None}[arch]
        full = [period is not None and (i + 1) % period == 0 for i in range(layers)]
        windows = tuple(None if is_full else window for is_full in full)
    embed = file.tensors.get("token_embd.weight")
    scalar = head_dim
    if (arch, layers) in (("gemma2", 46), ("gemma3", 62)):  # the 27B models
        scalar = width // heads
    try:
        return Config(
            vocab_size=embed.shape[0] if embed else size("vocab_size"),
            width=width,
            mlp_width=size("feed_forward_length"),
            layers=layers,
            heads=heads,
            kv_heads=size("attention.head_count_kv", heads),
            head_dim=head_dim,
            family=FAMILIES[arch],
            norm_eps=number("attention.layer_norm_rms_epsilon", 1e-5),
            norm_offset=gemma,
            activation="gelu_tanh" if gemma else "silu",
            qkv_bias="blk.0.attn_q.bias" in file.tensors,
            out_bias="blk.0.attn_output.bias" in file.tensors,
            mlp_bias="blk.0.ffn_down.bias" in file.tensors,
            qk_norm=arch in ("qwen3", "gemma3"),
            post_norms=arch in ("gemma2", "gemma3"),
            embed_scale=math.sqrt(width) if gemma else None,
            query_scale=scalar**-0.5 if arch in ("gemma2", "gemma3") else None,
            attention_softcap=number("attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
            final_softcap=number("final_logit_softcapping", 30.0) if arch == "gemma2" else None,
            windows=windows,
            # The file does not say it: every fourth layer has no rotary embedding.
            unrotated=tuple(range(3, layers, 4)) if arch == "smollm3" else (),
            rope=_rope(file, arch, number, size, max_length),
            local_rope=RopeConfig(base=number("rope.freq_base_swa", 10000.0))
            if arch == "gemma3"
            else None,
            rotary_width=rotated if rotated != head_dim else None,
            tied="output.weight" not in file.tensors,
            max_length=max_length,
            bos=file.metadata.get("tokenizer.ggml.bos_token_id"),
            eos=_eos(file),
        )
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _plain(value: float) -> float:
    """A float32 stored in the file as the decimal number that was meant: 1e-5, not 9.9999e-06."""
    return float(str(np.float32(value)))


def _eos(file: GGUFFile) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [file.metadata[key] for key in keys if type(file.metadata.get(key)) is int]
    return tuple(dict.fromkeys(ids))


def _rope(file: GGUFFile, arch: str, number, size, max_length: int) -> RopeConfig:
    base = number("rope.freq_base", 1e6 if arch == "gemma3" else 1e4)
    original = f"{arch}.rope.scaling.original_context_length"
    original = size("rope.scaling.original_context_length") if original in file.metadata else None
    factors = [
        tuple(float(x) for x in file.tensors[name].rows(0, file.tensors[name].shape[0]).ravel())
        for name in ("rope_factors_short.weight", "rope_factors_long.weight")
        if name in file.tensors
    ]
    if len(factors) == 2:
        attention = f"{arch}.rope.scaling.attn_factor"
        attention = number("rope.scaling.attn_factor", 1.0) if attention in file.metadata else None
        return RopeConfig(
            base=base,
            kind="longrope",
            original_length=original,
            attention_factor=attention,
            short_factor=factors[0],
            long_factor=factors[1],
        )
    if "rope_freqs.weight" in file.tensors:
        # llama3's rule, stored by its result: one divisor per pair.
        tensor = file.tensors["rope_freqs.weight"]
        divisors = tuple(float(x) for x in tensor.rows(0, tensor.shape[0]).ravel())
        return RopeConfig(
            base=base,
            kind="longrope",
            attention_factor=1.0,
            short_factor=divisors,
            long_factor=divisors,
        )
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    factor = number("rope.scaling.factor", 1.0)
    if kind == "linear" and factor != 1.0:
        return RopeConfig(base=base, kind="linear", factor=factor)
    if kind == "yarn":
        return RopeConfig(base=base, kind="yarn", factor=factor, original_length=original)
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{file.path}: {arch}.rope.scaling.type is {kind!r}, expected none, linear or yarn"
        )
    return RopeConfig(base=base)


def _piece(file: GGUFFile, config: Config, name: str, layer: int) -> Piece:
    def tensor(stem: str):
        full = f"blk.{layer}.{stem}" if name.startswith("layers.") else stem
        if full not in file.tensors:
            raise CheckpointError(
                f"{file.path}: tensor {full!r} is missing; the file has {len(file.tensors)} "
                f"tensors and {config.layers} layers are expected"
            )
        return file.tensors[full]

    heads, kv_heads, d = config.heads, config.kv_heads, config.head_dim
    stem = name.removeprefix("layers.")
    if config.family == "phi3" and stem in ("q", "k", "v"):
        q, kv = heads * d, kv_heads * d
        start = {"q": 0, "k": q, "v": q + kv}[stem]
        return Piece(tensor("attn_qkv.weight"), start, start + (q if stem == "q" else kv))
    if config.family == "phi3" and stem in ("gate", "up"):
        start = 0 if stem == "gate" else config.mlp_width
        return Piece(tensor("ffn_up.weight"), start, start + config.mlp_width)
    found = tensor(_NAMES[name])
    places = None
    if config.family in ("llama", "smollm3") and stem in ("q", "k", "q_bias", "k_bias"):
        places = _half_split(heads if stem[0] == "q" else kv_heads, d)
    return Piece(
        found,
        places=places,
        # Gemma's norms are stored as the factor itself, ours as the factor less one.
        shift=-1.0 if config.norm_offset and stem.endswith("norm") else 0.0,
    )


def _half_split(heads: int, head_dim: int) -> np.ndarray:
    """Where each row of such a q or k goes: there pair j is rows 2j, 2j + 1 of a head, here rows j,
    j + head_dim / 2."""
    row = np.arange(heads * head_dim)
    head, inside = row // head_dim, row % head_dim
    return head * head_dim + inside % 2 * (head_dim // 2) + inside // 2
