"""Text to evaluate on."""

from __future__ import annotations

import pathlib
import pydoc_data.topics

import numpy as np

from kvjax.models.tokenizer import Tokenizer


def language_reference() -> str:
    """The Python language reference that ships inside CPython: real English text, no download."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def load_text(path: str | None = None) -> str:
    """A UTF-8 text file, or the Python language reference where `path` is empty."""
    if not path:
        return language_reference()
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"text {path!r}: no such file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path!r} is not UTF-8: {error}") from None


def samples(text: str, tokenizer: Tokenizer, offsets: list[int], length: int) -> np.ndarray:
    """Windows of `length` tokens of the text, int32 [len(offsets), length].

    Args:
      offsets: first token of each window. Windows may not pass the end of the text.
    """
    ids = np.asarray(tokenizer.encode(text, special=False), np.int32)
    for offset in offsets:
        if not 0 <= offset <= len(ids) - length:
            raise ValueError(
                f"offset {offset}: a window of {length} tokens must lie within the text's "
                f"{len(ids)} tokens (largest possible offset: {len(ids) - length})"
            )
    return np.stack([ids[offset : offset + length] for offset in offsets])
