"""The needle test: a number hidden at some depth of a long text, to be said at its end."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from kvjax.models.tokenizer import Tokenizer

# Wording matters to a small model: this form lets dense SmolLM2-135M find at least 5 of 6.
FACT = "\nThe magic number is {number}. Remember it: the magic number is {number}.\n"
QUESTION = "\nThe magic number is"


@dataclasses.dataclass(frozen=True)
class Needle:
    """One prompt.

    Attributes:
      context: token ids, without the question; `length` of them.
      question: token ids that follow.
      answer: the digits.
      depth: where the needle stands, 0 (first) to 1 (last).
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: str
    depth: float


def needles(
    text: str, tokenizer: Tokenizer, length: int, count: int, seed: int = 0
) -> list[Needle]:
    """Prompts of `length` tokens, each with a five-digit number at its own depth.

    Depths are spread evenly over (0, 1); every prompt uses another part of the text.
    """
    random = np.random.default_rng(seed)
    ids = tokenizer.encode(text, special=False)
    question = tuple(tokenizer.encode(QUESTION, special=False))
    if len(ids) < 2 * length:
        raise ValueError(f"the text has {len(ids)} tokens: needles of {length} need twice as many")
    found = []
    for index in range(count):
        number = str(random.integers(10000, 100000))
        fact = tokenizer.encode(FACT.format(number=number), special=False)
        hay = length - len(fact)
        if hay < 1:
            raise ValueError(f"needle length {length}: the needle alone has {len(fact)} tokens")
        start = int(random.integers(0, len(ids) - hay))
        depth = (index + 0.5) / count
        at = int(depth * hay)
        body = ids[start : start + at] + fact + ids[start + at : start + hay]
        found.append(Needle(tuple(body), question, number, depth))
    return found


def found(answer: str, text: str) -> bool:
    """Whether the first number of a completion is the answer."""
    first = re.search(r"\d+", text)
    return first is not None and first.group() == answer
