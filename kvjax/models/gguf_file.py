"""Reads GGUF files. Every count, length and range is checked before memory is spent on it.

The layout is parsed here rather than by `gguf.GGUFReader`, whose releases differ in what they
check; only the arithmetic of dequantisation comes from the `gguf` package.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import mmap
import os
import pathlib
import reprlib
import struct
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from kvjax.models.errors import CheckpointError

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_STRING = 2**26  # bytes; whole tokenizers are stored as one string
MAX_ELEMENTS = 2**23  # elements of all arrays together
MAX_NAME = 1024

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODED = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
]


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file, its shape in NumPy order (slowest axis first).

    Attributes:
      path, name: the file and the tensor's name in it.
      shape: logical shape.
      kind: storage type, such as "Q4_1".
      offset: first byte in the file.
      row_bytes: bytes of one row of the first axis.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    row_bytes: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis; dequantised ones are float32."""
        shape = (stop - start, *self.shape[1:])
        raw = np.memmap(
            self.path,
            np.uint8,
            "r",
            offset=self.offset + start * self.row_bytes,
            shape=((stop - start) * self.row_bytes,),
        )
        if self.kind in _PLAIN:
            return raw.view(_PLAIN[self.kind]).reshape(shape)
        if self.kind not in _CODED:
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} has type {self.kind}, which kvjax does not "
                f"read; expected one of {', '.join([*_PLAIN, *_CODED])}"
            )
        kind = gguf.GGMLQuantizationType[self.kind]
        return gguf.quants.dequantize(np.asarray(raw), kind).reshape(shape)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A checked GGUF file: `metadata` (key -> int, float, bool, str or list) and `tensors`."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key` as int, float, str, bool or list; `default` when it is absent.

        Raises:
          CheckpointError: the key is absent and `default` is None, or the value has another type.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata key {key!r} is missing")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind and value is not default:
            raise CheckpointError(
                f"{self.path}: metadata key {key!r} is {_short(value)}, expected {kind.__name__}"
            )
        return value


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Reads the header of a GGUF file (version 2 or 3, little-endian); no tensor is read.

    Raises:
      CheckpointError: the file is not GGUF, is truncated, or any count, length, type, name,
        alignment or tensor range in it is wrong or beyond the limits of this module.
      OSError: the file cannot be opened.
    """
    path = os.fspath(path)
    size = pathlib.Path(path).stat().st_size
    if size < 24:
        raise CheckpointError(f"{path}: file is {size} bytes, a GGUF header wants at least 24")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Parser(path, data, size).file()


def _short(value: Any) -> str:
    return reprlib.repr(value)


class _Parser:
    def __init__(self, path: str, data: mmap.mmap, size: int):
        self.path, self.data, self.size = path, data, size
        self.at = 0
        self.elements = MAX_ELEMENTS

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(
                f"file is {self.size} bytes, {what} wants {self.at + count}: truncated or corrupt"
            )

    def scalar(self, code: str, what: str) -> Any:
        length = struct.calcsize("<" + code)
        self.need(length, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += length
        return value

    def limited(self, code: str, what: str, limit: int) -> int:
        value = self.scalar(code, what)
        if value > limit:
            raise self.fail(f"{what} is {value}, expected at most {limit}")
        return value

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.limited("Q", f"the length of {what}", limit)
        self.need(length, what)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from None

    def value(self, kind: int, key: str) -> Any:
        what = f"metadata key {key!r}"
        if kind == _STRING:
            return self.string(what)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has type {kind}, expected 0 to 12")
        inner = self.scalar("I", what)
        count = self.limited("Q", f"the length of {what}", self.elements)
        self.elements -= count
        if inner == _STRING:
            self.need(8 * count, what)
            return [self.string(f"element {i} of {what}") for i in range(count)]
        if inner not in _SCALARS:
            raise self.fail(f"{what} is an array of type {inner}, expected scalars or strings")
        code = f"<{count}{_SCALARS[inner]}"
        self.need(struct.calcsize(code), what)
        values = list(struct.unpack_from(code, self.data, self.at))
        self.at += struct.calcsize(code)
        return values

    def file(self) -> GGUFFile:
        if self.data[:4] != b"GGUF":
            raise self.fail(f"the file starts with {bytes(self.data[:4])!r}, expected b'GGUF'")
        self.at = 4
        version = self.scalar("I", "version")
        if version not in (2, 3):
            raise self.fail(f"GGUF version is {version}, expected 2 or 3, little-endian")
        tensors = self.limited("Q", "the number of tensors", MAX_TENSORS)
        keys = self.limited("Q", "the number of metadata keys", MAX_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string("a metadata key", MAX_NAME)
            if key in metadata:
                raise self.fail(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.scalar("I", f"the type of {key!r}"), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.fail(
                f"general.alignment is {_short(alignment)}, expected a positive power of two"
            )
        found = [self.tensor_info() for _ in range(tensors)]
        base = -(-self.at // alignment) * alignment
        return GGUFFile(self.path, metadata, self.checked(found, base, alignment))

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name", MAX_NAME)
        what = f"the description of tensor {name!r}"
        axes = self.scalar("I", what)
        if not 1 <= axes <= 4:
            raise self.fail(f"tensor {name!r} has {axes} axes, expected 1 to 4")
        shape = tuple(self.scalar("Q", what) for _ in range(axes))[::-1]
        return name, shape, self.scalar("I", what), self.scalar("Q", what)

    def checked(self, found: list, base: int, alignment: int) -> dict[str, GGUFTensor]:
        tensors, ranges = {}, []
        for name, shape, code, offset in found:
            if name in tensors:
                raise self.fail(f"tensor {name!r} appears twice")
            try:
                kind = gguf.GGMLQuantizationType(code)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise self.fail(f"tensor {name!r} has unknown type {code}") from None
            if 0 in shape or shape[-1] % block or (block > 1 and len(shape) == 1):
                raise self.fail(
                    f"tensor {name!r} has shape {shape}; expected sizes above zero and, for "
                    f"{kind.name}, two axes or more with rows that are a multiple of {block}"
                )
            if offset % alignment:
                raise self.fail(f"tensor {name!r} starts at {offset}, not aligned to {alignment}")
            count = math.prod(shape) // block * block_bytes
            start = base + offset
            if start + count > self.size:
                raise self.fail(
                    f"file is {self.size} bytes, tensor {name!r} wants bytes {start} to "
                    f"{start + count}: truncated or corrupt"
                )
            ranges.append((start, start + count, name))
            row = count // shape[0] if len(shape) > 1 else block_bytes
            tensors[name] = GGUFTensor(self.path, name, shape, kind.name, start, row)
        ranges.sort()
        for (_, stop, first), (start, _, second) in itertools.pairwise(ranges):
            if start < stop:
                raise self.fail(f"tensors {first!r} and {second!r} overlap at byte {start}")
        return tensors
