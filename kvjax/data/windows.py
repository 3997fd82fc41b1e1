"""Windows of one long sequence of tokens, by index: the source for training on text."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class TokenWindows:
    """Example i is tokens [i * stride, i * stride + length): a grain `RandomAccessDataSource`.

    Attributes:
      tokens: int [N], a text's ids: `tokenizer.encode(text)`, or a memory map of a large one.
      length: tokens per window. stride: tokens from one window to the next; None: `length`.

    Raises:
      ValueError: fewer than `length` tokens, or a length or stride below 1.

    >>> windows = TokenWindows(np.arange(10), length=4, stride=3)
    >>> [w["tokens"].tolist() for w in windows]
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    """

    tokens: np.ndarray
    length: int
    stride: int | None = None

    def __post_init__(self) -> None:
        if self.length < 1 or (self.stride is not None and self.stride < 1):
            raise ValueError(f"length={self.length}, stride={self.stride}: expected at least 1")
        if len(self.tokens) < self.length:
            raise ValueError(f"length={self.length}: there are {len(self.tokens)} tokens only")

    def __len__(self) -> int:
        return (len(self.tokens) - self.length) // (self.stride or self.length) + 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens int32 [length]."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} windows")
        start = index * (self.stride or self.length)
        return {"tokens": np.asarray(self.tokens[start : start + self.length], np.int32)}
