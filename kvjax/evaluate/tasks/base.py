"""What a long-context task is: drafts of text, fitted to a length in tokens, and right answers."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from kvjax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt of a task, as token ids.

    A method may see the context alone before it compresses (query-agnostic), or the question too
    (query-aware); the tokens are the same.

    Attributes:
      task: its name.
      context: token ids of instruction and haystack.
      question: token ids of the question and the beginning of the answer, which follow.
      answers: all that a right completion says.
      new_tokens: tokens to decode, by the task's recipe.
      spans: per answer, [start, stop) of the context's tokens where it stands first.
      chance: the score expected of naming, out of what the context offers, as many as there are
        answers at random; 0 where the context offers nothing wrong.
      form: regular expression of one answer, for `first_right`.
    """

    task: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int
    spans: tuple[tuple[int, int], ...] = ()
    chance: float = 0.0
    form: str = r"\w+"

    @property
    def length(self) -> int:
        """Tokens in all, those to be decoded included."""
        return len(self.context) + len(self.question) + self.new_tokens

    @property
    def answer(self) -> str:
        """The first right answer."""
        return self.answers[0]

    @property
    def depth(self) -> float:
        """Where in the context the (first) answer stands, 0 (first) to 1 (last)."""
        return self.spans[0][0] / max(len(self.context) - 1, 1)


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample as text: what `Sample` says, before a tokenizer has seen it.

    `prefix` is how the answer begins: in a conversation it opens the assistant's turn.
    """

    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    chance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Task:
    """A family of samples of any length.

    Attributes:
      name: as on command lines.
      draw: (generator, n, text, tokens) -> Draft whose haystack has n units (lines, words, ...);
        `text` is natural text for tasks that hide things in it, `tokens` the length asked for.
      new_tokens: tokens to decode.
      least: the smallest n.
      form: regular expression of one answer.
    """

    name: str
    draw: Callable[[np.random.Generator, int, str, int], Draft]
    new_tokens: int
    least: int = 1
    form: str = r"\w+"

    def samples(
        self,
        tokenizer: Tokenizer,
        length: int,
        count: int,
        *,
        text: str = "",
        seed: int = 0,
        chat: bool = False,
        spare: int | None = None,
    ) -> list[Sample]:
        """`count` samples, each the longest that fits into `length` tokens with its answer.

        Sample i depends on (task, seed, i, length) alone.

        Args:
          text: natural text, for tasks that hide things in it.
          chat: put the prompt into the model's chat template, the prefix into its answer.
          spare: decode no more than the answers' own tokens and so many beside each; None: as many
            as the recipe says.

        Raises:
          ValueError: not even the smallest haystack fits; a tokenizer without chat template.
        """
        before, after = _template(tokenizer) if chat else ("", "")
        found = []
        for index in range(count):
            key = [zlib.crc32(self.name.encode()), seed, index, length]

            def draft(n: int, key: list[int] = key) -> Draft:
                return self.draw(np.random.default_rng(key), n, text, length)

            def tokens(n: int, draft: Callable = draft) -> int:
                d = draft(n)
                context = tokenizer.encode(before + d.context, special=not chat)
                question = tokenizer.encode(d.question + after + d.prefix, special=False)
                return len(context) + len(question) + self._decoded(tokenizer, d, spare)

            d = draft(_largest(tokens, self.least, length, f"{self.name}: length={length}"))
            found.append(self._sample(tokenizer, d, before, after, chat, spare))
        return found

    def _decoded(self, tokenizer: Tokenizer, d: Draft, spare: int | None) -> int:
        """Tokens to decode."""
        if spare is None:
            return self.new_tokens
        own = sum(len(tokenizer.encode(" " + a, special=False)) + spare for a in d.answers)
        return min(own, self.new_tokens)

    def _sample(
        self, tokenizer: Tokenizer, d: Draft, before: str, after: str, chat: bool,
        spare: int | None,
    ) -> Sample:  # fmt: skip
        code = tokenizer.backend.encode(before + d.context, add_special_tokens=not chat)
        places = [_place(d.context, answer) for answer in d.answers]
        spans = tuple(
            tokens_at(code.offsets, len(before) + at, len(before) + at + len(answer))
            for at, answer in zip(places, d.answers)
        )
        question = tokenizer.encode(d.question + after + d.prefix, special=False)
        return Sample(
            self.name, tuple(code.ids), tuple(question), d.answers,
            self._decoded(tokenizer, d, spare), spans, d.chance, self.form,
        )  # fmt: skip


def _largest(tokens: Callable[[int], int], least: int, budget: int, what: str) -> int:
    """The largest n at which tokens(n) <= budget (growing with n, but for a few tokens)."""
    if (needs := tokens(least)) > budget:
        raise ValueError(f"{what}: with the smallest haystack {needs} tokens are needed")
    low, high = least, 2 * least
    while tokens(high) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens(middle) <= budget else (low, middle)
    return low


def _template(tokenizer: Tokenizer) -> tuple[str, str]:
    """What the chat template puts before a prompt and after it."""
    mark = "<<prompt>>"
    before, after = tokenizer.chat_text([{"role": "user", "content": mark}]).split(mark)
    return before, after


def _place(context: str, answer: str) -> int:
    """Where an answer stands first in the context, as a word of its own."""
    match = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", context)
    if match is None:
        raise ValueError(f"the answer {answer!r} is not in the context")
    return match.start()


def tokens_at(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """[first, last + 1) of the tokens that hold the characters [start, stop)."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    return inside[0], inside[-1] + 1


def contained(sample: Sample, text: str) -> float:
    """The part of the answers that occur in a completion, whatever their case: RULER's metric.

    Source: RULER, arXiv 2404.06654 (`string_match_all`, as a fraction).

    >>> sample = Sample("vt", (), (), ("AB", "CD"), 8)
    >>> contained(sample, " cd, ef"), contained(sample, "")
    (0.5, 0.0)
    """
    text = _clean(text).lower()
    return float(np.mean([answer.lower() in text for answer in sample.answers]))


def first_right(sample: Sample, text: str) -> bool:
    """Whether the first thing that a completion names is right: rambling does not help here.

    >>> sample = Sample("passkey", (), (), ("123",), 8, form=r"\\d+")
    >>> [first_right(sample, text) for text in (" 123. Or 45", "45, no, 123", "")]
    [True, False, False]
    """
    first = re.search(sample.form, _clean(text))
    return first is not None and first.group().lower() in {a.lower() for a in sample.answers}


def _clean(text: str) -> str:
    """As RULER's scorer sees a prediction: stripped, control characters as new lines."""
    return re.sub(r"[\x00-\x1f]", "\n", text).strip()
