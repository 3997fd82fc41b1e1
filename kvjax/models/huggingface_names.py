"""Names of tensors in Hugging Face's Llama family."""

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


def layer_names(family: str) -> dict[str, str]:
    """Flat parameter name -> name within a layer; several may share one (Phi-3, in row order)."""
    if family == "phi3":
        return _LAYER | _FUSED
    return _LAYER | _SANDWICH if family in ("gemma2", "gemma3_text") else _LAYER


def single_names() -> dict[str, str]:
    """Flat parameter name -> full name, of the parameters outside layers."""
    return {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
    }
