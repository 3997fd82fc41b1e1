"""Reads safetensors files: the header is checked whole before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from kvjax.models.errors import CheckpointError
from kvjax.models.json_file import parse_json, read_json

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_FILES = 256
MAX_TENSORS = 250_000
MAX_INDEX = 2**26

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """A tensor in a safetensors file, read when asked for.

    Attributes:
      path, name: the file and the tensor's name in it.
      shape, dtype: as in the header; dtype is NumPy's (or ml_dtypes').
      offset: first byte in the file.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis, memory-mapped and read-only.

        Raises:
          CheckpointError: the tensor is not of a floating dtype of 16 bits or more.
        """
        if self.dtype.kind not in "fV" or self.dtype.itemsize < 2:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has dtype {self.dtype}, expected F64, F32, F16 "
                "or BF16: quantised checkpoints are not read"
            )
        return self.array(start, stop)

    def array(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `rows`, of any dtype; by default the whole tensor."""
        if not self.shape:
            return self._map(self.offset, ())
        stop = self.shape[0] if stop is None else stop
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._map(self.offset + start * row, (stop - start, *self.shape[1:]))

    def _map(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        count = math.prod(shape) * self.dtype.itemsize
        raw = np.memmap(self.path, np.uint8, "r", offset=offset, shape=(count,))
        return np.asarray(raw).view(self.dtype).reshape(shape)


def open_safetensors(path: str | os.PathLike) -> dict[str, SafeTensor]:
    """The tensors of a safetensors file by name; only the header is read.

    Raises:
      CheckpointError: the file is truncated, or its header is too long, not a JSON object, has
        keys twice, unknown dtypes, or byte ranges that overlap, leave holes, differ from shape
        times dtype, or do not end where the file does.
      OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    size = pathlib.Path(path).stat().st_size
    with open(path, "rb") as file:
        first = file.read(8)
        if len(first) < 8:
            raise CheckpointError(f"{path}: file is {size} bytes, the header length wants 8")
        length = int.from_bytes(first, "little")
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{path}: header length is {length}, expected at most {MAX_HEADER}"
            )
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: file is {size} bytes, header wants {8 + length}: truncated or corrupt"
            )
        header = parse_json(file.read(length), f"{path}: header", depth=4)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors, expected at most {MAX_TENSORS}")
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensors[name], stop = _tensor(path, name, entry, 8 + length)
        ranges.append((tensors[name].offset, stop, name))
    at = 8 + length
    for start, stop, name in sorted(ranges):
        if start != at:
            kind = "overlaps the tensor before it" if start < at else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {name!r} starts at byte {start}, expected {at}: it {kind}"
            )
        at = stop
    if at != size:
        raise CheckpointError(
            f"{path}: file is {size} bytes, header wants {at}: truncated or corrupt"
        )
    return tensors


def _tensor(path: str, name: str, entry: object, base: int) -> tuple[SafeTensor, int]:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, got {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: dtype {dtype!r:.40} is not one of {', '.join(DTYPES)} "
            "(types below one byte are not read)"
        )
    if not _counts(shape) or len(shape) > 8:
        raise CheckpointError(f"{where}: shape {shape!r:.80}, expected at most 8 sizes >= 0")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r:.80}, expected [start, stop]")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise CheckpointError(
            f"{where}: data_offsets hold {offsets[1] - offsets[0]} bytes, but {dtype} {shape} is "
            f"{wanted} bytes"
        )
    found = SafeTensor(path, name, tuple(shape), DTYPES[dtype], base + offsets[0])
    return found, base + offsets[1]


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def open_folder(folder: str | os.PathLike) -> dict[str, SafeTensor]:
    """The tensors of a folder: model.safetensors, or the shards that its index names.

    Raises:
      CheckpointError: as `open_safetensors`; or the index names a file outside the folder or
        anything but a regular file, lists a tensor that no shard has, or misses or places
        elsewhere one that a shard has; or limits are exceeded.
      FileNotFoundError: the folder has no safetensors.
    """
    folder = pathlib.Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        single = folder / "model.safetensors"
        if not single.exists():
            raise FileNotFoundError(f"{folder}: no model.safetensors or {index.name}")
        return open_safetensors(_inside(folder, single.name, str(single)))
    weight_map = read_json(index, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or len(weight_map) > MAX_TENSORS:
        raise CheckpointError(f"{index}: expected a weight_map of at most {MAX_TENSORS} tensors")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: tensor {tensor!r} is in {name!r:.80}, expected a name")
        names.add(name)
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{index}: {len(names)} files, expected at most {MAX_FILES}")
    tensors: dict[str, SafeTensor] = {}
    for name in sorted(names):
        for tensor, found in open_safetensors(_inside(folder, name, str(index))).items():
            if tensor in tensors:
                raise CheckpointError(
                    f"{index}: tensor {tensor!r} is in two files, {tensors[tensor].path} and {name}"
                )
            if weight_map.get(tensor) != name:
                raise CheckpointError(
                    f"{index}: tensor {tensor!r} is in {name}, but the index says "
                    f"{weight_map.get(tensor, 'nothing of it')}"
                )
            tensors[tensor] = found
    missing = sorted(weight_map.keys() - tensors)
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} tensors are in no file, first {missing[0]!r} "
            f"(expected in {weight_map[missing[0]]})"
        )
    return tensors


def _inside(folder: pathlib.Path, name: str, source: str) -> pathlib.Path:
    """folder/name, a regular file inside the folder (links may not lead out of it).

    Hugging Face's own cache keeps files as links into a sibling folder `blobs`: allowed.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise CheckpointError(f"{source}: file name {name!r}, expected a name without folders")
    path, home = folder / name, folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    resolved = path.resolve()
    if resolved.parent not in homes:
        raise CheckpointError(f"{source}: {name!r} leads to {resolved}, outside {home}")
    if not resolved.exists():
        raise CheckpointError(f"{source}: file {name!r} is missing")
    if not resolved.is_file():
        raise CheckpointError(f"{source}: {name!r} is not a regular file")
    return path
