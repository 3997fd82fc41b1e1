"""List operations: tasks that are trivial token by token and tell parallel decoders apart."""

from __future__ import annotations

import dataclasses
import functools
import string

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from kvjax.models.tokenizer import Tokenizer

OPERATIONS = ("copy", "reverse", "sort", "replace", "shuffle")
VOCABULARY = ("<mask>", "<eos>", "_", "=", *OPERATIONS, *string.ascii_lowercase)
MASK, EOS, BLANK, EQUALS = range(4)
_ITEM = VOCABULARY.index("a")
ITEMS = len(string.ascii_lowercase)


@dataclasses.dataclass(frozen=True)
class ListOperations:
    """Examples by index, each drawn from (seed, index) alone: a grain `RandomAccessDataSource`.

    An example is an operation on a list of different letters and its result, in a fixed layout of
    `3 + 2 * slots` tokens, so that an item's place in the prompt says its place in the answer:

        operation  word  item ... item  _ ... _  =   item ... item  <eos> ... <eos>
                         |------- slots -------|     |--------- slots -----------|

    `word` is the letter that takes the place of an item chosen at random under "replace" (it is
    none of the items), else "_". The answers: "copy", "reverse" and "sort" have one; "replace" has
    n, by which position is replaced; "shuffle" all orders but the given one.

    Attributes:
      size: number of examples. seed: of the set; sets of different seeds are drawn independently.
      operations: which; one named twice is drawn twice as often. min_items, max_items: list lengths, equally likely.
      slots: of the layout; None: `max_items`.

    Raises:
      ValueError: an operation is unknown, the lengths are not 2 <= min <= max <= 25, or there are
        fewer slots.

    Source: the list operations of ParallelBench (arXiv 2510.04767) on letters, in a layout of one
    token per item as its check of the theory has it.

    >>> source = ListOperations(size=100, operations=("reverse",), min_items=3, max_items=4)
    >>> text(source[1]["tokens"])
    'reverse _ l r w q = q w r l'
    >>> source[1]["answer"].tolist() == [False] * 7 + [True] * 4
    True
    """

    size: int
    seed: int = 0
    operations: tuple[str, ...] = OPERATIONS
    min_items: int = 4
    max_items: int = 16
    slots: int | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.operations if name not in OPERATIONS]:
            raise ValueError(f"operations={unknown}: expected some of {', '.join(OPERATIONS)}")
        if not self.operations or self.size < 1:
            raise ValueError(
                f"operations={self.operations}, size={self.size}: expected at least one of each"
            )
        if not 2 <= self.min_items <= self.max_items < ITEMS:
            raise ValueError(
                f"min_items={self.min_items}, max_items={self.max_items}: expected "
                f"2 <= min_items <= max_items < {ITEMS}"
            )
        if self.slots is None:
            object.__setattr__(self, "slots", self.max_items)
        if self.slots < self.max_items:
            raise ValueError(f"slots={self.slots}: expected at least max_items={self.max_items}")

    @property
    def prompt_length(self) -> int:
        """Tokens before the answer; the answer has `slots`."""
        return 3 + self.slots

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example.

        Returns:
          tokens int32 [N]; answer bool [N], what is to be generated, its <eos> included; items
          bool [N], the answer without <eos>: what to mask where the answer's form is given.
        """
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} examples")
        random = np.random.default_rng((self.seed, index))
        name = self.operations[random.integers(len(self.operations))]
        count = int(random.integers(self.min_items, self.max_items + 1))
        letters = random.permutation(ITEMS)[: count + 1] + _ITEM
        given, word = letters[:count], letters[count]
        tokens = np.full(self.prompt_length + self.slots, BLANK, np.int32)
        tokens[0] = VOCABULARY.index(name)
        tokens[1] = word if name == "replace" else BLANK
        tokens[2 : 2 + count] = given
        start = self.prompt_length
        tokens[start - 1], tokens[start:] = EQUALS, EOS
        tokens[start : start + count] = _answer(name, given, word, random)
        place = np.arange(len(tokens))
        return {
            "tokens": tokens,
            "answer": place >= start,
            "items": (place >= start) & (place < start + count),
        }


def _answer(name: str, given: np.ndarray, word: int, random: np.random.Generator) -> np.ndarray:
    if name == "copy":
        return given
    if name == "reverse":
        return given[::-1]
    if name == "sort":
        return np.sort(given)
    if name == "replace":
        found = given.copy()
        found[random.integers(len(given))] = word
        return found
    found = random.permutation(given)
    while (found == given).all():
        found = random.permutation(given)
    return found


def correct(tokens: np.ndarray) -> np.ndarray:
    """Whether answers are right: any that the operation allows, with <eos> in every later place.

    Args:
      tokens: int [B, 3 + 2 * slots], in the layout of `ListOperations`, answers filled in.

    Returns:
      bool [B].

    Source: the metrics of ParallelBench (arXiv 2510.04767).
    """
    return np.array([_right(row) for row in np.atleast_2d(tokens)])


def _right(row: np.ndarray) -> bool:
    half = (len(row) - 3) // 2
    given, answer = row[2 : 2 + half], row[3 + half :]
    given = given[given != BLANK]
    answer, rest = answer[: len(given)], answer[len(given) :]
    if not (rest == EOS).all():
        return False
    name = VOCABULARY[row[0]]
    if name == "copy":
        return bool((answer == given).all())
    if name == "reverse":
        return bool((answer == given[::-1]).all())
    if name == "sort":
        return bool((answer == np.sort(given)).all())
    other = answer != given
    if name == "replace":
        return bool(other.sum() == 1 and (answer[other] == row[1]).all())
    return bool(other.any() and (np.sort(answer) == np.sort(given)).all())


@functools.cache
def tokenizer() -> Tokenizer:
    """One token per word of the layout; <mask> and <eos> are special.

    >>> tokenizer().encode("copy _ a b =")
    [4, 2, 9, 10, 3]
    """
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([VOCABULARY[MASK], VOCABULARY[EOS]])
    return Tokenizer(backend, eos=(EOS,), pad=EOS)


def text(tokens: np.ndarray) -> str:
    """The words of one example, special ones included."""
    return " ".join(VOCABULARY[int(i)] for i in tokens)
