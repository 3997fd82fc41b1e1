"""Aggregation: the common words of a numbered list, the frequent words of a coded text."""

from __future__ import annotations

import math
import string

import numpy as np

from kvjax.evaluate.tasks import vocabulary
from kvjax.evaluate.tasks.base import Draft, Task

COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}"
)
ASK_COMMON = "\nQuestion: What are the 10 most common words in the above list?"
PREFIX_COMMON = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}"
)
ASK_FREQUENT = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
PREFIX_FREQUENT = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
SHORT = 4096  # below so many tokens, words are repeated less often


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _list(
    random: np.random.Generator, words: list[str], often: int, seldom: int
) -> tuple[str, list[str]]:
    """The first ten words `often` times, the others `seldom` times, shuffled and numbered."""
    common = words[:10]
    all_words = common * often + words[10:] * seldom
    random.shuffle(all_words)
    return _numbered(all_words), common


def _common(random: np.random.Generator, n: int, text: str, tokens: int) -> Draft:
    """n distinct words, ten of them common, after a solved example with other words."""
    short = tokens < SHORT
    example = 20 if short else 40
    words = vocabulary.words(random, n + example)
    solved, right = _list(random, words[n:], *((3, 1) if short else (10, 3)))
    listed, common = _list(random, words[:n], *((6, 1) if short else (30, 3)))
    solved = COMMON.format(context=solved) + ASK_COMMON + PREFIX_COMMON + " " + _numbered(right)
    context = solved + "\n" + COMMON.format(context=listed)
    return Draft(context, ASK_COMMON, PREFIX_COMMON, tuple(common), 10 / n)


def _frequent(random: np.random.Generator, n: int, text: str, tokens: int) -> Draft:
    """A text of about n words whose k-th word occurs floor(n / (k^2 zeta(2))) times."""
    count = max((tokens - 50) // 50, 5)
    letters = list(string.ascii_lowercase)
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choice(letters, 6))] = None
    coded = list(words)
    coded[0] = "..."  # the most frequent word is no word
    times = [math.floor(n / (k * k * math.pi**2 / 6)) for k in range(1, count + 1)]
    said = [word for word, often in zip(coded, times) for _ in range(often)]
    random.shuffle(said)
    offered = sum(often > 0 for often in times) - 1
    return Draft(
        FREQUENT.format(context=" ".join(said)), ASK_FREQUENT, PREFIX_FREQUENT,
        tuple(coded[1:4]), 3 / offered,
    )  # fmt: skip


TASKS = (
    Task("cwe", _common, 120, 12, r"[a-z][a-z-]+"),
    # From 27 words on the second, third and fourth word differ in frequency.
    Task("fwe", _frequent, 50, 27, r"[a-z]{6}"),
)
