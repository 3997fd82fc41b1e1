"""kvjax: efficient language-model inference as one algebra of pure functions.

    import kvjax
    model, tokenizer = kvjax.load("smollm2-135m")
    method = kvjax.compress.snapkv(tokens=512, storage=kvjax.compress.kivi(bits=4))
    texts = kvjax.complete(model, tokenizer, ["The Python language"], method, new_tokens=32)

`kvjax.cache` holds the ideas; `kvjax.compress` the published methods.
"""

from __future__ import annotations

import importlib

_MODULES = (
    "cache", "calibrate", "codecs", "compress", "data", "decode", "diffusion", "evaluate", "models",
    "parallel", "speculate", "train",
)  # fmt: skip
_HOMES = {
    "Cache": "cache",
    "chain": "cache",
    "commit": "cache",
    "finish": "cache",
    "horizon": "cache",
    "init_cache": "cache",
    "nbytes": "cache",
    "Sampler": "decode",
    "complete": "decode",
    "extend": "decode",
    "generate": "decode",
    "prefill": "decode",
    "score": "decode",
    "stream": "decode",
    "Config": "models",
    "Model": "models",
    "forward": "models",
    "load": "models",
    "save": "models",
    "save_pretrained": "models",
}

__all__ = list(_MODULES)
__all__ += list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported at first use, so that `import kvjax` is quick and starts no backend.
    if name in _MODULES:
        return importlib.import_module(f"kvjax.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"kvjax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'kvjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
