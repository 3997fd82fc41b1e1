"""Decoders as data: configuration, parameters, tokenizers, and loading them from files."""

from __future__ import annotations

import importlib

# Where each public name lives. Imported at first use: a tokenizer need not wait for orbax.
_HOMES = {
    "forward": "decoder",
    "CheckpointError": "errors",
    "Config": "config",
    "Mamba2": "mamba2",
    "Model": "llama",
    "RecurrentLayer": "recurrent",
    "RopeConfig": "config",
    "TextStream": "tokenizer",
    "Tokenizer": "tokenizer",
    "cached_smollm2": "embedded",
    "fetch_smollm2": "embedded",
    "init": "llama",
    "load": "loading",
    "load_tokenizer": "tokenizer",
    "merge_kv_heads": "fewer_heads",
    "save": "checkpoint",
    "save_pretrained": "huggingface_write",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
