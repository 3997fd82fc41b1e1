"""Logits of transformers (of plain torch where it has no such family: LLaDA) for a tiny random
model of every family, and how to use them.

    for path in golden.cases():
        case = golden.load_case(path, tmp_path)      # writes a Hugging Face folder
        model, _ = kvjax.models.load(case.folder, tokenizer=False)
        tokens, positions, valid = case.padded("left")
        # prefill `tokens`; where `valid`, logits equal case.prefill_logits(...)
        # then for step t: feed case.decode_tokens[:, t] at position case.lengths + t;
        # logits equal case.decode_logits[:, t]. Rotary tables for length case.length.

Weights are not stored: they are drawn from a seed by `draw`, from raw PCG64 output, which NumPy
promises never to change. `make_golden.py` writes the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import safetensors.numpy

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and what transformers says of it, in float32.

    Attributes:
      name: the file's name without its ending.
      folder: a Hugging Face folder with config.json and model.safetensors.
      rows: per row the prompt's token ids, of unequal lengths.
      logits: per row [length, V], of every prompt position.
      decode_tokens: [B, S] int32, fed after the prompt: the greedy choices of the reference, so
        decode_tokens[:, 0] is the argmax of the last prompt logits. S is 0 where decoding is left
        out (dynamic RoPE: there the reference rotates old keys by other angles than new queries).
      decode_logits: [B, S, V]; step t is after feeding decode_tokens[:, t].
      length: longest sequence to be served, for RoPE rules that depend on it.
      config_v5: the same configuration as transformers 5 writes it.
    """

    name: str
    folder: pathlib.Path
    rows: tuple[np.ndarray, ...]
    logits: tuple[np.ndarray, ...]
    decode_tokens: np.ndarray
    decode_logits: np.ndarray
    length: int
    config_v5: dict

    @property
    def lengths(self) -> np.ndarray:
        """Prompt lengths [B] int32."""
        return np.array([len(row) for row in self.rows], np.int32)

    def padded(self, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens [B, T] int32, positions [B, T] int32, -1 in padding, valid [B, T] bool)."""
        longest = max(self.lengths)
        tokens = np.zeros((len(self.rows), longest), np.int32)
        positions = np.full_like(tokens, -1)
        for b, row in enumerate(self.rows):
            at = slice(longest - len(row), None) if side == "left" else slice(len(row))
            tokens[b, at], positions[b, at] = row, np.arange(len(row))
        return tokens, positions, positions >= 0

    def prefill_logits(self, side: str) -> np.ndarray:
        """Expected logits [B, T, V] in the layout of `padded(side)`; zero in padding."""
        _, positions, valid = self.padded(side)
        out = np.zeros((*positions.shape, self.logits[0].shape[-1]), np.float32)
        for b, logits in enumerate(self.logits):
            out[b, valid[b]] = logits
        return out


def cases() -> list[pathlib.Path]:
    """Every golden file, by name."""
    return sorted(HERE.glob("*.npz"))


def load_case(path: pathlib.Path, folder: pathlib.Path) -> Case:
    """Reads a golden file and writes its model, as a Hugging Face folder, below `folder`."""
    with np.load(path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    config = json.loads(str(stored["config"]))
    weights = draw(json.loads(str(stored["shapes"])), int(stored["seed"]), config["model_type"])
    if digest(weights) != str(stored["digest"]):
        raise AssertionError(f"{path}: the weights drawn are not those of the golden logits")
    home = folder / path.stem
    write_folder(home, config, weights)
    lengths = stored["lengths"]
    return Case(
        name=path.stem,
        folder=home,
        rows=tuple(stored["tokens"][b, :n] for b, n in enumerate(lengths)),
        logits=tuple(stored["logits"][b, :n] for b, n in enumerate(lengths)),
        decode_tokens=stored["decode_tokens"],
        decode_logits=stored["decode_logits"],
        length=int(stored["length"]),
        config_v5=json.loads(str(stored["config_v5"])),
    )


def write_folder(home: pathlib.Path, config: dict, weights: dict[str, np.ndarray]) -> None:
    """A Hugging Face folder: config.json and model.safetensors."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, home / "model.safetensors", metadata={"format": "pt"})


def draw(shapes: dict[str, list[int]], seed: int, model_type: str) -> dict[str, np.ndarray]:
    """Float32 weights for tensor names in sorted order, uniform with a deviation by their kind:
    maps fan_in ** -0.5, embeddings 1, biases 0.2, norms 0.2 around one (Gemma: around zero)."""
    bits = np.random.PCG64(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        unit = (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        noise = ((unit - 0.5) * np.sqrt(12.0)).reshape(shape)
        if "norm" in name or "ln_f" in name:
            value = 0.2 * noise + (0.0 if model_type.startswith("gemma") else 1.0)
        elif name.endswith("bias"):
            value = 0.2 * noise
        elif "embed_tokens" in name or "wte" in name:
            value = noise
        else:
            value = noise * shape[-1] ** -0.5
        weights[name] = value.astype(np.float32)
    return weights


def digest(weights: dict[str, np.ndarray]) -> str:
    """SHA-256 of names and bytes in sorted order."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].tobytes())
    return total.hexdigest()
