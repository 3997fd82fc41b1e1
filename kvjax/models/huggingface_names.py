"""Names of tensors in Hugging Face's Llama family and in LLaDA's folders."""

from __future__ import annotations

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


def layer_names(family: str) -> dict[str, str]:
    """Flat parameter name -> name within a layer; several may share one (Phi-3, in row order)."""
    if family == "llada":
        return _LLADA
    if family == "phi3":
        return _LAYER | _FUSED
    return _LAYER | _SANDWICH if family in ("gemma2", "gemma3_text") else _LAYER


def layer_home(family: str) -> str:
    """What stands before a layer's number, below the `stem` of all names."""
    return "blocks." if family == "llada" else "layers."


def stem(family: str) -> str:
    """What all names begin with, as Hugging Face writes them."""
    return "model.transformer." if family == "llada" else "model."


def single_names(family: str) -> dict[str, str]:
    """Flat parameter name -> full name, of the parameters outside layers."""
    if family == "llada":
        names = {"embed": "wte.weight", "norm": "ln_f.weight", "head": "ff_out.weight"}
        return {name: stem(family) + tensor for name, tensor in names.items()}
    return {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
