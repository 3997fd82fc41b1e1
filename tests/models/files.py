"""Tiny files made by hand, well-formed or not, and a check that reading changed none of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import struct

import numpy as np

SCALARS = {int: (10, "<Q"), float: (6, "<f"), bool: (7, "<?")}


@contextlib.contextmanager
def unchanged(folder: pathlib.Path):
    """Fails if a file below `folder` appears, vanishes or changes inside the block."""
    before = _state(folder)
    yield
    assert _state(folder) == before, "reading changed something on disk"


def _state(folder: pathlib.Path) -> dict:
    return {
        str(path.relative_to(folder)): (
            path.is_symlink(),
            hashlib.sha256(path.read_bytes()).digest(),
        )
        if path.is_file()
        else path.is_symlink()
        for path in sorted(folder.rglob("*"))
    }


def safetensors_bytes(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: header as an object or raw, and the length it claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(start: int, stop: int, shape=None, dtype: str = "F32") -> dict:
    """A header entry; by default a vector of float32 that fills the range."""
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string, with the length it claims."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(item) -> bytes:
    """Type code and value of a GGUF metadata entry, from a Python value."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, list):
        if item and isinstance(item[0], str):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
        code, form = (5, "i") if not item or isinstance(item[0], int) else (6, "f")
        return struct.pack(f"<IIQ{len(item)}{form}", 9, code, len(item), *item)
    code, form = SCALARS[type(item)]
    return struct.pack("<I", code) + struct.pack(form, item)


def tensor_info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A GGUF tensor description; `shape` in NumPy order."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    metadata: dict | list,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"",
    magic: bytes = b"GGUF",
) -> bytes:
    """A GGUF file of float32 tensors; any count may be claimed, any description be given raw.

    metadata: key -> Python value, or a list of raw entries.
    """
    if infos is None:
        infos, data = [], b""
        for name, array in (tensors or {}).items():
            infos.append(tensor_info(name, array.shape, 0, len(data)))
            raw = np.ascontiguousarray(array, "<f4").tobytes()
            data += raw + b"\0" * (-len(raw) % 32)
    if isinstance(metadata, dict):
        metadata = [string(key) + value(item) for key, item in metadata.items()]
    n_tensors = len(infos) if n_tensors is None else n_tensors
    n_keys = len(metadata) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(metadata) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + data
