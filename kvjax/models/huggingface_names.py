"""Names of tensors in Hugging Face's Llama family, Mamba-2, Bamba and in LLaDA's folders."""

from __future__ import annotations

from kvjax.models.config import Config

_LAYER = {
    "layers.q": "self_attn.q_proj.weight",
    "layers.k": "self_attn.k_proj.weight",
    "layers.v": "self_attn.v_proj.weight",
    "layers.o": "self_attn.o_proj.weight",
    "layers.gate": "mlp.gate_proj.weight",
    "layers.up": "mlp.up_proj.weight",
    "layers.down": "mlp.down_proj.weight",
    "layers.q_bias": "self_attn.q_proj.bias",
    "layers.k_bias": "self_attn.k_proj.bias",
    "layers.v_bias": "self_attn.v_proj.bias",
    "layers.o_bias": "self_attn.o_proj.bias",
    "layers.gate_bias": "mlp.gate_proj.bias",
    "layers.up_bias": "mlp.up_proj.bias",
    "layers.down_bias": "mlp.down_proj.bias",
    "layers.attention_norm": "input_layernorm.weight",
    "layers.mlp_norm": "post_attention_layernorm.weight",
    "layers.q_norm": "self_attn.q_norm.weight",
    "layers.k_norm": "self_attn.k_norm.weight",
}
# Gemma 2 and 3: the name that is the MLP's norm elsewhere is the norm after attention here.
_SANDWICH = {
    "layers.mlp_norm": "pre_feedforward_layernorm.weight",
    "layers.post_attention_norm": "post_attention_layernorm.weight",
    "layers.post_mlp_norm": "post_feedforward_layernorm.weight",
}
# Phi-3: rows q, k, v of one tensor, and rows gate, up of another.
_FUSED = {
    "layers.q": "self_attn.qkv_proj.weight",
    "layers.k": "self_attn.qkv_proj.weight",
    "layers.v": "self_attn.qkv_proj.weight",
    "layers.gate": "mlp.gate_up_proj.weight",
    "layers.up": "mlp.gate_up_proj.weight",
}

# LLaDA: what gates is called ff_proj, what is gated up_proj.
_LLADA = {
    "layers.q": "q_proj.weight",
    "layers.k": "k_proj.weight",
    "layers.v": "v_proj.weight",
    "layers.o": "attn_out.weight",
    "layers.gate": "ff_proj.weight",
    "layers.up": "up_proj.weight",
    "layers.down": "ff_out.weight",
    "layers.q_bias": "q_proj.bias",
    "layers.k_bias": "k_proj.bias",
    "layers.v_bias": "v_proj.bias",
    "layers.attention_norm": "attn_norm.weight",
    "layers.mlp_norm": "ff_norm.weight",
}

_MIXER = {
    "recurrent.project": "in_proj.weight",
    "recurrent.project_bias": "in_proj.bias",
    "recurrent.conv": "conv1d.weight",
    "recurrent.conv_bias": "conv1d.bias",
    "recurrent.dt_bias": "dt_bias",
    "recurrent.A_log": "A_log",
    "recurrent.D": "D",
    "recurrent.gated_norm": "norm.weight",
    "recurrent.out": "out_proj.weight",
    "recurrent.out_bias": "out_proj.bias",
}


def _bamba() -> dict[str, str]:
    names = dict(_LAYER)
    for kind in ("layers", "recurrent"):
        names[f"{kind}.mlp_norm"] = "pre_ff_layernorm.weight"
        for part in ("gate", "up", "down"):
            names[f"{kind}.{part}"] = f"feed_forward.{part}_proj.weight"
            names[f"{kind}.{part}_bias"] = f"feed_forward.{part}_proj.bias"
    names["recurrent.mixer_norm"] = "input_layernorm.weight"
    return names | {name: f"mamba.{inner}" for name, inner in _MIXER.items()}


def layer_names(family: str) -> dict[str, str]:
    """Flat parameter name -> name within a layer; several may share one (Phi-3, in row order)."""
    if family == "llada":
        return _LLADA
    if family == "mamba2":
        mixer = {name: f"mixer.{inner}" for name, inner in _MIXER.items()}
        return {"recurrent.mixer_norm": "norm.weight"} | mixer
    if family == "bamba":
        return _bamba()
    if family == "phi3":
        return _LAYER | _FUSED
    return _LAYER | _SANDWICH if family in ("gemma2", "gemma3_text") else _LAYER


def layers_of(config: Config, name: str) -> tuple[int, ...]:
    """The numbers of the layers whose parameter has this flat name, in the order of its stack."""
    recurrent = name.startswith("recurrent.")
    return config.recurrent_layers if recurrent else config.attention_layers


def layer_home(family: str) -> str:
    """What stands before a layer's number, below the `stem` of all names."""
    return "blocks." if family == "llada" else "layers."


def stem(family: str) -> str:
    """What all names begin with, as Hugging Face writes them."""
    return {"llada": "model.transformer.", "mamba2": "backbone."}.get(family, "model.")


def single_names(family: str) -> dict[str, str]:
    """Flat parameter name -> full name, of the parameters outside layers."""
    if family == "llada":
        names = {"embed": "wte.weight", "norm": "ln_f.weight", "head": "ff_out.weight"}
        return {name: stem(family) + tensor for name, tensor in names.items()}
    inner = {"embed": "embed_tokens.weight", "norm": "norm.weight"}
    if family == "mamba2":
        inner = {"embed": "embeddings.weight", "norm": "norm_f.weight"}
    if family == "bamba":
        inner["norm"] = "final_layernorm.weight"
    full = {name: stem(family) + tensor for name, tensor in inner.items()}
    return full | {"head": "lm_head.weight"}
