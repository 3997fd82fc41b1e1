"""GGUF files of every family, made from the golden models in the layout of llama.cpp."""

import dataclasses

import numpy as np
import pytest

from kvjax.models import CheckpointError
from kvjax.models.gguf_file import open_gguf
from kvjax.models.gguf_model import gguf_config, load_gguf
from kvjax.models.huggingface import load_pretrained
from kvjax.models.llama import flatten
from tests import golden
from tests.models.files import gguf_bytes, unchanged

ARCH = {"mistral": "llama", "gemma3_text": "gemma3"}
STEMS = {
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "post_attention_norm": "post_attention_norm.weight",
    "post_mlp_norm": "post_ffw_norm.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from (first halves, second halves) to pairs side by side."""
    d = len(rows) // heads
    return rows.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def convert(model) -> tuple[dict, dict]:
    """(metadata, tensors) of a model, as a GGUF file has them."""
    c, flat = model.config, {k: np.asarray(v) for k, v in flatten(model).items()}
    arch = ARCH.get(c.family, c.family)
    norm = 1.0 if c.norm_offset else 0.0
    tensors = {"token_embd.weight": flat["embed"], "output_norm.weight": flat["norm"] + norm}
    if not c.tied:
        tensors["output.weight"] = flat["head"]
    for layer in range(c.layers):
        w = {k.removeprefix("layers."): v[layer] for k, v in flat.items() if "layers." in k}
        if arch == "phi3":
            fused = [w.pop(n) for n in "qkv"]
            tensors[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(fused)
            fused = [w.pop(n) for n in ("gate", "up")]
            tensors[f"blk.{layer}.ffn_up.weight"] = np.concatenate(fused)
        for name, array in w.items():
            stem = STEMS.get(name) or STEMS[name.removesuffix("_bias")].replace("weight", "bias")
            if arch == "llama" and name[:2] in ("q", "q_", "k", "k_"):
                array = interleave(array, c.heads if name[0] == "q" else c.kv_heads)
            tensors[f"blk.{layer}.{stem}"] = array + (norm if "norm" in name else 0.0)
    keys = {
        "block_count": c.layers,
        "context_length": c.max_length,
        "embedding_length": c.width,
        "feed_forward_length": c.mlp_width,
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.key_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope.base,
        "rope.dimension_count": c.rotated,
    }
    if any(c.windows):
        keys["attention.sliding_window"] = next(filter(None, c.windows))
    if c.attention_softcap:
        keys["attn_logit_softcapping"] = c.attention_softcap
        keys["final_logit_softcapping"] = c.final_softcap
    if c.rope.kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": c.rope.kind, "rope.scaling.factor": c.rope.factor}
    if c.rope.original_length:
        keys["rope.scaling.original_context_length"] = c.rope.original_length
    if c.rope.kind == "longrope":
        tensors["rope_factors_short.weight"] = np.array(c.rope.short_factor)
        tensors["rope_factors_long.weight"] = np.array(c.rope.long_factor)
    metadata = {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in keys.items()}
    metadata |= {"tokenizer.ggml.bos_token_id": c.bos, "tokenizer.ggml.eos_token_id": c.eos[0]}
    return metadata, tensors


NAMES = ["llama2", "llama_bias", "llama_yarn", "llama_linear", "qwen2", "qwen3", "gemma", "gemma2"]
NAMES += ["gemma3", "phi3", "phi3_longrope_long", "phi3_partial"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_from_both_formats(name, tmp_path):
    model = load_pretrained(golden.load_case(golden.HERE / f"{name}.npz", tmp_path).folder)
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(*convert(model)))
    with unchanged(tmp_path):
        found = load_gguf(path)
    expected = flatten(model)
    for key, value in flatten(found).items():
        # Gemma's norms go through 1 + w and back: half an ulp of one.
        atol = 6e-8 if model.config.norm_offset and "norm" in key else 0
        np.testing.assert_allclose(value, expected[key], atol=atol, rtol=0, err_msg=key)
    config = model.config
    # llama.cpp takes head_dim ** -0.5 here, and file formats say so for no model.
    if config.query_scale is not None:
        config = dataclasses.replace(config, query_scale=config.head_dim**-0.5)
    if name == "phi3_partial" or "longrope" in name:
        config = dataclasses.replace(config, rope=found.config.rope)
        for a, b in zip(found.config.rope.long_factor, model.config.rope.long_factor):
            assert a == np.float32(b)
    assert found.config == config


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama2")
    return convert(load_pretrained(golden.load_case(golden.HERE / "llama2.npz", folder).folder))


def refuse(tmp_path, metadata, tensors, match):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors))
    with unchanged(tmp_path), pytest.raises(CheckpointError, match=match):
        load_gguf(path)


def test_llama3_frequencies_are_taken_from_their_tensor(parts, tmp_path):
    metadata, tensors = parts
    divisors = np.array([1.0, 1.0, 2.0, 8.0])
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors | {"rope_freqs.weight": divisors}))
    config = gguf_config(open_gguf(path))
    frequencies, factor = config.rope.frequencies(config.rotated, config.max_length, 10)
    plain, _ = dataclasses.replace(config.rope, kind="default").frequencies(8, 64, 10)
    np.testing.assert_allclose(frequencies, plain / divisors)
    assert factor == 1.0


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("general.architecture", "mamba", "'mamba', expected one of llama, qwen2"),
        ("general.architecture", 3, "expected str"),
        ("llama.block_count", 0, "block_count is 0"),
        ("llama.block_count", 2**40, "expected 1 to 4096"),
        ("llama.block_count", "2", "expected int"),
        ("llama.block_count", 3, "'blk.2.attn_q.weight' is missing"),
        ("llama.embedding_length", 64, "configuration says"),
        ("llama.embedding_length", 2**62, "expected 1 to"),
        ("llama.attention.head_count", 0, "expected 1 to"),
        ("llama.attention.head_count_kv", 3, "multiple of kv_heads"),
        ("llama.feed_forward_length", 100, "gives .* for 'layers.gate'"),
        ("llama.rope.freq_base", float("nan"), "freq_base is nan"),
        ("llama.rope.freq_base", -1.0, "expected above zero"),
        ("llama.rope.dimension_count", 7, "must be even"),
        ("llama.attention.layer_norm_rms_epsilon", float("inf"), "expected above zero"),
        ("llama.rope.scaling.type", "spiral", "expected none, linear or yarn"),
        ("llama.expert_count", 8, "mixture"),
    ],
)
def test_metadata_that_does_not_fit(parts, tmp_path, key, value, match):
    metadata, tensors = parts
    refuse(tmp_path, metadata | {key: value}, tensors, match)


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight"])
def test_missing_tensor_is_named(parts, tmp_path, name):
    metadata, tensors = parts
    rest = {k: v for k, v in tensors.items() if k != name}
    match = "vocab_size" if name.startswith("token") else f"{name}' is missing"
    refuse(tmp_path, metadata, rest, match)


def test_missing_key_is_named(parts, tmp_path):
    metadata, tensors = parts
    rest = {k: v for k, v in metadata.items() if k != "llama.embedding_length"}
    refuse(tmp_path, rest, tensors, "'llama.embedding_length' is missing")


def test_check_finite(parts, tmp_path):
    metadata, tensors = parts
    bad = tensors["blk.1.ffn_down.weight"].copy()
    bad[3, 3] = np.nan
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors | {"blk.1.ffn_down.weight": bad}))
    load_gguf(path)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight' has NaN"):
        load_gguf(path, check_finite=True)
