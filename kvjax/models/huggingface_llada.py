"""config.json of LLaDA's folders <-> Config: other keys than those of transformers' families."""

from __future__ import annotations

from typing import Any

from kvjax.models.config import Config, RopeConfig

# The code that these files belong to offers more; with these values it is LLaDA. Without a
# default here the key must be there.
_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "rope": (True,),
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "bias_for_layer_norm": (False, None),
    "include_bias": (False,),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "multi_query_attention": (False, None),
}


def llada_config(read: Any) -> Config:
    """A Config from the keys of LLaDA's config.json.

    Args:
      read: typed look-ups in it, as `kvjax.models.huggingface_config` makes them.

    Raises:
      CheckpointError: a key is missing, of the wrong type or out of range, or asks for something
        that LLaDA does not do.
    """
    for key, allowed in _FIXED.items():
        value = read.get(key)
        if not any(value is x or (type(x) is str and value == x) for x in allowed):
            raise read.fail(key, value, f"{allowed[0]!r}")
    width, heads = read.size("d_model"), read.size("n_heads", limit=2**16)
    if width % heads:
        raise read.fail("n_heads", heads, f"a divisor of d_model, {width}")
    vocabulary = read.size("vocab_size")
    for key in ("mask_token_id", "eos_token_id", "bos_token_id"):
        value = read.get(key)
        if value is None and key != "mask_token_id":
            continue
        for one in value if isinstance(value, list) and key == "eos_token_id" else [value]:
            if type(one) is not int or one < 0:
                raise read.fail(key, value, "a token id")
    eos = read.get("eos_token_id")
    return Config(
        # Rows of the embedding, which may be padded beyond the tokens that exist.
        vocab_size=read.size("embedding_size", vocabulary),
        width=width,
        mlp_width=read.size("mlp_hidden_size"),
        layers=read.size("n_layers", limit=4096),
        heads=heads,
        kv_heads=read.size("n_kv_heads", heads),
        head_dim=width // heads,
        family="llada",
        norm_eps=read.number("rms_norm_eps"),
        qkv_bias=read.flag("include_qkv_bias"),
        rope=RopeConfig(base=read.number("rope_theta")),
        tied=_stated(read, "weight_tying"),
        max_length=read.size("max_sequence_length", limit=2**31),
        bos=read.get("bos_token_id"),
        eos=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        mask_token=read.get("mask_token_id"),
        bidirectional=True,
    )


def _stated(read: Any, key: str) -> bool:
    if read.get(key) is None:
        raise read.fail(key, None, "true or false")
    return read.flag(key)


def llada_json(config: Config, dtype: str, eos: int | list[int] | None) -> dict[str, Any]:
    """The object of config.json for a model of this family.

    Raises:
      ValueError: the model does something that LLaDA's files cannot say.
    """
    plain = Config(
        config.vocab_size, config.width, config.mlp_width, config.layers, config.heads,
        config.kv_heads, config.width // config.heads, "llada", config.norm_eps,
        qkv_bias=config.qkv_bias, rope=RopeConfig(base=config.rope.base), tied=config.tied,
        max_length=config.max_length, bos=config.bos, eos=config.eos,
        mask_token=config.mask_token, bidirectional=True,
    )  # fmt: skip
    if config != plain or config.mask_token is None:
        names = [n for n in vars(plain) if getattr(plain, n) != getattr(config, n)]
        raise ValueError(
            f"a LLaDA folder cannot hold this model: {', '.join(names) or 'no mask_token'}"
        )
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "torch_dtype": dtype,
        **{key: allowed[0] for key, allowed in _FIXED.items()},
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "d_model": config.width,
        "mlp_hidden_size": config.mlp_width,
        "n_layers": config.layers,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.base,
        "rope_full_precision": True,
        "max_sequence_length": config.max_length,
        "include_qkv_bias": config.qkv_bias,
        "weight_tying": config.tied,
        "mask_token_id": config.mask_token,
        "bos_token_id": config.bos,
        "eos_token_id": eos,
        "pad_token_id": None,
    }
