"""Reading JSON that somebody else wrote."""

from __future__ import annotations

import json
import os
import pathlib

from kvjax.models.errors import CheckpointError

MAX_VALUES = 5_000_000


def read_json(path: str | os.PathLike, limit: int) -> dict:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
      CheckpointError: the file is larger, not JSON, not an object, nested too deep, or an object
        in it has a key twice.
    """
    size = pathlib.Path(path).stat().st_size
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes, expected at most {limit}")
    return parse_json(pathlib.Path(path).read_bytes(), str(path))


def parse_json(raw: bytes, source: str, depth: int = 64) -> dict:
    """The JSON object in `raw`; raises as `read_json`, with `source` naming it.

    Values are counted before parsing, since each costs far more memory than its text.
    """

    def refuse_twice(pairs: list) -> dict:
        found = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"{source}: key {key!r:.80} appears twice in one object")
            found[key] = value
        return found

    values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if values > MAX_VALUES:
        raise CheckpointError(
            f"{source}: about {values} JSON values, expected at most {MAX_VALUES}"
        )
    if _depth(raw) > depth:
        raise CheckpointError(f"{source}: JSON is nested deeper than {depth}")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=refuse_twice)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: JSON {type(value).__name__}, expected an object")
    return value


def _depth(raw: bytes) -> int:
    """An upper bound on nesting: brackets open at once, those inside strings left out."""
    deepest = level = 0
    for index, part in enumerate(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')):
        if index % 2 == 0:
            for byte in part.translate(None, b"\t\n\r ,:.+-0123456789abcdefghijklmnopqrstuvwxyzE"):
                level += (byte in b"[{") - (byte in b"]}")
                deepest = max(deepest, level)
    return deepest
