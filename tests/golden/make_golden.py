"""Writes the golden files. Needs torch and transformers:

python -m tests.golden.make_golden [name ...]

The reference is a full forward pass over one unpadded row without a cache: of transformers, or,
for LLaDA, of `llada` below. The script also runs transformers as it would be used (padded batch,
cached decoding) and stops if the two disagree.
"""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

from tests import golden

STEPS = 16
LENGTHS = (20, 13)
TOLERANCE = 2e-4

_BASE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}
_MAMBA2 = {
    "model_type": "mamba2",
    "num_heads": 4,
    "head_dim": 16,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
}
_ATTENTION = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "rope_theta")
_PAIRS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 2.5, 4.0]}
_THREE = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0]}

CASES = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama_bias": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "eos_token_id": [2, 3],
        "head_dim": 16,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama_yarn": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "llama_linear": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama_dynamic": {
        "model_type": "llama",
        "max_position_embeddings": 12,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 5, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "num_key_value_heads": 1, **_GEMMA},
    "gemma2": {
        "model_type": "gemma2",
        "num_hidden_layers": 4,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        **_GEMMA,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        **_GEMMA,
    },
    "phi3": {"model_type": "phi3", "sliding_window": 7},
    "phi3_longrope_short": {
        "model_type": "phi3",
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **_PAIRS},
    },
    "phi3_longrope_long": {
        "model_type": "phi3",
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", **_PAIRS},
    },
    "phi3_partial": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 8,
        "rope_scaling": {"type": "longrope", **_THREE},
    },
    "mamba2": _MAMBA2,
    "mamba2_bounds": _MAMBA2
    | {
        "n_groups": 1,
        "conv_kernel": 3,
        "use_bias": True,
        "use_conv_bias": False,
        "time_step_limit": [0.3, 0.9],
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
    },
    "bamba": {
        "model_type": "bamba",
        "num_hidden_layers": 5,
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "smollm3": {
        "model_type": "smollm3",
        "num_hidden_layers": 5,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
        "tie_word_embeddings": True,
    },
}

_LLADA = {
    "model_type": "llada",
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "vocab_size": 96,
    "embedding_size": 96,
    "d_model": 32,
    "mlp_hidden_size": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_sequence_length": 64,
    "weight_tying": False,
    "mask_token_id": 95,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLADA = {
    "llada": {},
    "llada_grouped": {"n_kv_heads": 2, "weight_tying": True, "include_qkv_bias": True},
}


def main(names: list[str]) -> None:
    torch.manual_seed(0)
    for number, (name, changes) in enumerate(LLADA.items()):
        if not names or name in names:
            make_llada(name, _LLADA | changes, seed=2000 + number)
    for number, (name, changes) in enumerate(CASES.items()):
        if not names or name in names:
            config = _BASE | changes
            if config["model_type"] == "mamba2":
                config = {key: value for key, value in config.items() if key not in _ATTENTION}
            make(name, config, seed=1000 + number)


def make(name: str, config: dict, seed: int) -> None:
    """Writes one golden file."""
    with tempfile.TemporaryDirectory() as temporary:
        home = pathlib.Path(temporary)
        golden.write_folder(home, config, {})
        shapes = _shapes(home)
        weights = golden.draw(shapes, seed, config["model_type"])
        golden.write_folder(home, config, weights)

        def model():
            found, info = transformers.AutoModelForCausalLM.from_pretrained(
                home, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
            )
            assert not any(info.values()), info
            return found.eval()

        rng = np.random.default_rng(seed)
        rows = [rng.integers(4, config["vocab_size"], n).tolist() for n in LENGTHS]
        dynamic = config.get("rope_scaling", {}).get("type") == "dynamic"
        with torch.no_grad():
            if dynamic:
                # The angles depend on the longest row of the batch, so the batch is the reference.
                # Decoding is left out: with each token the reference would rotate new queries by
                # other angles than the keys it has stored.
                prompts, decoded, steps = _batch(model(), rows, "right"), None, 0
                length = max(LENGTHS)
            else:
                prompts, decoded = zip(*(_alone(model(), row) for row in rows))
                steps, length = STEPS, max(LENGTHS) + STEPS
            # Left padding leaks the projection's bias into transformers' convolution.
            for side in ("right",) if config.get("use_bias") else ("left", "right"):
                _check(name, side, prompts, _batch(model(), rows, side))
            # With a cache transformers steps without the bounds of time_step_limit.
            if not dynamic and "time_step_limit" not in config:
                again = _cached(model(), rows, [tokens for tokens, _ in decoded])
                _check(name, "cached", [logits for _, logits in decoded], again)
        vocabulary = config["vocab_size"]
        tokens = np.zeros((2, max(LENGTHS)), np.int32)
        logits = np.zeros((2, max(LENGTHS), vocabulary), np.float32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)], logits[b, : len(row)] = row, prompts[b]
        empty = np.zeros((2, 0, vocabulary), np.float32)
        np.savez_compressed(
            golden.HERE / f"{name}.npz",
            config=json.dumps(config),
            config_v5=model().config.to_json_string(),
            shapes=json.dumps(shapes),
            seed=seed,
            digest=golden.digest(weights),
            lengths=np.array(LENGTHS, np.int32),
            length=length,
            tokens=tokens,
            logits=logits,
            decode_tokens=np.array([t for t, _ in decoded] if steps else empty[..., 0], np.int32),
            decode_logits=np.stack([x for _, x in decoded]) if steps else empty,
            versions=json.dumps([transformers.__version__, torch.__version__]),
        )
        spread = float(np.std(prompts[0]))
        print(
            f"{name}: {(golden.HERE / f'{name}.npz').stat().st_size} bytes, logits std {spread:.2f}"
        )


def make_llada(name: str, config: dict, seed: int) -> None:
    """The same for LLaDA, which transformers does not have: `llada` below is the reference."""
    width, inner, groups = config["d_model"], config["mlp_hidden_size"], config["n_kv_heads"]
    narrow = width // config["n_heads"] * groups
    block = {
        "attn_norm.weight": [width],
        "ff_norm.weight": [width],
        "q_proj.weight": [width, width],
        "k_proj.weight": [narrow, width],
        "v_proj.weight": [narrow, width],
        "attn_out.weight": [width, width],
        "ff_proj.weight": [inner, width],
        "up_proj.weight": [inner, width],
        "ff_out.weight": [width, inner],
    }
    if config["include_qkv_bias"]:
        block |= {"q_proj.bias": [width], "k_proj.bias": [narrow], "v_proj.bias": [narrow]}
    stem = "model.transformer."
    shapes = {f"{stem}wte.weight": [config["vocab_size"], width], f"{stem}ln_f.weight": [width]}
    if not config["weight_tying"]:
        shapes[f"{stem}ff_out.weight"] = [config["vocab_size"], width]
    for layer in range(config["n_layers"]):
        shapes |= {f"{stem}blocks.{layer}.{key}": shape for key, shape in block.items()}
    weights = golden.draw(shapes, seed, "llada")
    tensors = {key.removeprefix(stem): torch.tensor(value) for key, value in weights.items()}
    rng = np.random.default_rng(seed)
    rows = [rng.integers(4, config["vocab_size"], n) for n in LENGTHS]
    for row in rows:
        row[::3] = config["mask_token_id"]
    logits = [llada(config, tensors, torch.tensor(row)).numpy() for row in rows]
    tokens = np.zeros((2, max(LENGTHS)), np.int32)
    padded = np.zeros((2, max(LENGTHS), config["vocab_size"]), np.float32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)], padded[b, : len(row)] = row, logits[b]
    path = golden.HERE / f"{name}.npz"
    np.savez_compressed(
        path,
        config=json.dumps(config),
        config_v5=json.dumps(config),
        shapes=json.dumps(shapes),
        seed=seed,
        digest=golden.digest(weights),
        lengths=np.array(LENGTHS, np.int32),
        length=max(LENGTHS),
        tokens=tokens,
        logits=padded,
        decode_tokens=np.zeros((2, 0), np.int32),
        decode_logits=np.zeros((2, 0, config["vocab_size"]), np.float32),
        versions=json.dumps([torch.__version__]),
    )
    print(f"{name}: {path.stat().st_size} bytes, logits std {float(np.std(logits[0])):.2f}")


def llada(config: dict, w: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of one row: a Llama block stack in which every token sees every other."""
    functional = torch.nn.functional
    heads, width = config["n_heads"], config["d_model"] // config["n_heads"]
    power = torch.arange(0, width, 2) / width
    angle = torch.arange(len(row))[:, None] * config["rope_theta"] ** -power
    turn = torch.polar(torch.ones_like(angle), angle)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], config["rms_norm_eps"])

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, width)).transpose(0, 1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x.chunk(2, -1)) * turn  # channel i turns with channel i + width / 2
        return torch.cat([pairs.real, pairs.imag], -1)

    x = w["wte.weight"][row]
    for layer in range(config["n_layers"]):
        name = f"blocks.{layer}."
        h = norm(x, name + "attn_norm")
        q, k, v = (split(linear(h, f"{name}{n}_proj")) for n in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(heads // config["n_kv_heads"], 0) for y in (k, v))
        h = functional.scaled_dot_product_attention(q, k, v)
        x = x + linear(h.transpose(0, 1).flatten(1), name + "attn_out")
        h = norm(x, name + "ff_norm")
        h = functional.silu(linear(h, name + "ff_proj")) * linear(h, name + "up_proj")
        x = x + linear(h, name + "ff_out")
    return linear(norm(x, "ln_f"), "wte" if config["weight_tying"] else "ff_out")


def _shapes(home: pathlib.Path) -> dict[str, list[int]]:
    config = transformers.AutoConfig.from_pretrained(home)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {k: list(v.shape) for k, v in model.state_dict().items() if k not in tied}


def _alone(model, row: list[int]) -> tuple[np.ndarray, tuple[list[int], np.ndarray]]:
    """(prompt logits [n, V], (greedy tokens, logits after each [S, V])) of one row, no cache."""
    tokens = list(row)
    for _ in range(STEPS):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
        tokens.append(int(logits[-1].argmax()))
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits[: len(row)], (tokens[len(row) :], logits[len(row) :])


def _pad(rows: list[list[int]], side: str):
    longest = max(map(len, rows))
    left = side == "left"
    ids = [[0] * (longest - len(r)) + r if left else r + [0] * (longest - len(r)) for r in rows]
    real = [[1] * len(r) + [0] * (longest - len(r)) for r in rows]
    mask = torch.tensor([r[::-1] if left else r for r in real])
    return torch.tensor(ids), mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _batch(model, rows: list[list[int]], side: str) -> list[np.ndarray]:
    ids, mask, positions = _pad(rows, side)
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return [logits[b][mask[b].bool()].numpy() for b in range(len(rows))]


def _cached(model, rows: list[list[int]], forced: list[list[int]]) -> list[np.ndarray]:
    ids, mask, positions = _pad(rows, "left")
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    steps = []
    for step in range(STEPS):
        mask = torch.cat([mask, torch.ones((len(rows), 1), dtype=mask.dtype)], -1)
        feed = torch.tensor([[tokens[step]] for tokens in forced])
        where = mask.sum(-1, keepdim=True) - 1
        cache = out.cache
        out = model(feed, attention_mask=mask, position_ids=where, cache=cache)
        steps.append(out.logits[:, -1].numpy())
    return list(np.stack(steps, 1))


def _check(name: str, what: str, expected, found) -> None:
    worst = max(float(np.abs(a - b).max()) for a, b in zip(expected, found))
    if not worst < TOLERANCE:
        raise SystemExit(f"{name}: transformers disagrees with itself ({what}) by {worst}")


if __name__ == "__main__":
    main(sys.argv[1:])
