"""A model from a Hugging Face folder: config.json and safetensors."""

from __future__ import annotations

import os
import pathlib

import jax.numpy as jnp

from kvjax.models.config import Config
from kvjax.models.errors import CheckpointError
from kvjax.models.huggingface_config import parse_config
from kvjax.models.huggingface_names import layer_home, layer_names, single_names, stem
from kvjax.models.json_file import read_json
from kvjax.models.llama import Model, parameters
from kvjax.models.safetensors_file import SafeTensor, open_folder
from kvjax.models.weights import Piece, Sharding, assemble

MAX_CONFIG = 2**22
# What may stand in place of `stem(family)`.
_PREFIXES = {
    "llada": ("model.transformer.", "transformer.", ""),
    None: ("model.", "language_model.model.", "model.language_model.", ""),
}
_BESIDE = ("vision_tower.", "multi_modal_projector.", "vision_model.")  # of multimodal models


def load_config(folder: str | os.PathLike) -> Config:
    """The configuration of a Hugging Face folder, with the eos ids of generation_config.json.

    Raises:
      CheckpointError: as `kvjax.models.huggingface_config.parse_config`.
      FileNotFoundError: there is no config.json.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json")
    values = read_json(path, MAX_CONFIG)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation, MAX_CONFIG).get("eos_token_id")
        if eos is not None:
            values["eos_token_id"] = eos
    return parse_config(values, str(path))


def load_pretrained(
    folder: str | os.PathLike,
    *,
    dtype: jnp.dtype = jnp.float32,
    sharding: Sharding = None,
    check_finite: bool = False,
) -> Model:
    """Loads the weights of a Hugging Face folder (arguments as `kvjax.models.weights.assemble`).

    Raises:
      CheckpointError: files are malformed, or the tensors are not those the configuration calls
        for: missing, of another shape, or more of them (a bias or a norm that would be ignored).
      FileNotFoundError: there is no config.json or no safetensors. Pickled weights are never read.
    """
    folder = pathlib.Path(folder)
    config = load_config(folder)
    try:
        tensors = open_folder(folder)
    except FileNotFoundError:
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickled:
            raise FileNotFoundError(
                f"{folder}: weights are pickled ({pickled[0].name}), which could run code when "
                "read; convert them to safetensors"
            ) from None
        raise
    names = _Names(folder, config, tensors)
    names.refuse_extra()
    return assemble(
        config,
        names.piece,
        dtype=dtype,
        sharding=sharding,
        check_finite=check_finite,
        source=str(folder),
    )


class _Names:
    """Finds a model's parameters among the tensors of a folder."""

    def __init__(self, folder: pathlib.Path, config: Config, tensors: dict[str, SafeTensor]):
        self.folder, self.config, self.tensors = folder, config, tensors
        self.layer = layer_names(config.family)
        self.single = single_names(config.family)
        self.stem, self.home = stem(config.family), layer_home(config.family)
        embed = self.single["embed"].removeprefix(self.stem)
        for self.prefix in _PREFIXES.get(config.family, _PREFIXES[None]):
            if self.prefix + embed in tensors:
                break
        else:
            raise CheckpointError(f"{folder}: none of the {len(tensors)} tensors is an {embed}")

    def full(self, name: str, layer: int) -> str:
        if name in self.layer:
            return f"{self.prefix}{self.home}{layer}.{self.layer[name]}"
        tensor = self.single[name]
        if not tensor.startswith(self.stem):  # lm_head
            nested = f"language_model.{tensor}"
            return nested if nested in self.tensors else tensor
        return self.prefix + tensor.removeprefix(self.stem)

    def piece(self, name: str, layer: int) -> Piece:
        full = self.full(name, layer)
        if full not in self.tensors:
            tying = "weight_tying" if self.config.family == "llada" else "tie_word_embeddings"
            hint = f"; {tying} is false" if name == "head" else ""
            raise CheckpointError(
                f"{self.folder}: tensor {full!r} is missing, but config.json calls for it{hint}"
            )
        tensor, config = self.tensors[full], self.config
        short = name.removeprefix("layers.")
        start, stop = 0, None
        if config.family == "phi3" and short in ("q", "k", "v", "gate", "up"):
            q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
            width = config.mlp_width
            bounds = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
            bounds |= {"gate": (0, width), "up": (width, 2 * width)}
            start, stop = bounds[short]
            rows = q + 2 * kv if short in "qkv" else 2 * width
            if tensor.shape != (rows, config.width):
                raise CheckpointError(
                    f"{self.folder}: tensor {full!r} has shape {tensor.shape}, but the "
                    f"configuration says {(rows, config.width)}"
                )
        return Piece(tensor, start, stop)

    def refuse_extra(self) -> None:
        """Tensors that nothing would read mean that the configuration is not theirs."""
        used = {self.full(name, 0) for name in self.single}
        wanted = {self.layer[name] for name in parameters(self.config) if name in self.layer}
        extra = []
        for name in self.tensors:
            inner = name.removeprefix(self.prefix + self.home)
            number, _, rest = inner.partition(".")
            if inner != name and number.isdecimal() and int(number) < self.config.layers:
                known = rest in wanted or rest == "self_attn.rotary_emb.inv_freq"
            else:
                parts = name.removeprefix("model.")
                known = name in used or parts.startswith(_BESIDE)
            if not known:
                extra.append(name)
        if extra:
            raise CheckpointError(
                f"{self.folder}: config.json does not call for {len(extra)} of the tensors, "
                f"first {min(extra)!r}"
            )
