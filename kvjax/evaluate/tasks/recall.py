"""Associative recall: as arrays of ids, to train small models on, and as text, for large ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvjax.evaluate.tasks import vocabulary
from kvjax.evaluate.tasks.base import Draft, Task

IGNORE = -100
BOS, PAD, SEPARATOR, VALUES, KEYS, CONTEXTS = 1, 3, 4, 10, 26, 42  # ids of `joint_recall`


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Sequences for models trained on ids: what to predict, where.

    Attributes:
      tokens: int32 [N, T].
      labels: int32 [N, T], the token that follows, -100 where it is not asked for.
    """

    tokens: np.ndarray
    labels: np.ndarray

    def accuracy(self, logits: np.ndarray) -> float:
        """The part of the labels that logits [N, T, V] (or predicted ids [N, T]) get right."""
        said = np.asarray(logits)
        said = said.argmax(-1) if said.ndim == 3 else said
        asked = self.labels != IGNORE
        return float((said == self.labels)[asked].mean())


def associative_recall(
    count: int, length: int, pairs: int, vocab: int = 8192, seed: int = 0, power: float = 0.01,
    fill: bool = True,
) -> Labelled:  # fmt: skip
    """Multi-query associative recall: pairs key, value; later each key again, its value asked for.

    Keys are among 1 .. vocab/2 - 1, values among vocab/2 .. vocab - 1. Query i stands at
    2 pairs + 2 g_i, the gaps g distinct and drawn with probability proportional to
    (g + 1)^(power - 1), its label the value. What is left is filled with random ids.

    Args:
      count: sequences. length: tokens of each, even. pairs: at most length / 4.
      fill: False leaves zeros where nothing was put.

    Raises:
      ValueError: sizes that do not fit.

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models, arXiv 2312.04927.
    """
    if length % 2 or vocab % 2:
        raise ValueError(f"length={length}, vocab={vocab}: expected even numbers")
    if not 1 <= pairs <= length // 4 or pairs > vocab // 2 - 1:
        most = min(length // 4, vocab // 2 - 1)
        raise ValueError(f"pairs={pairs}: expected 1 to {most} for these sizes")
    random = np.random.default_rng(seed)
    tokens = np.zeros((count, length), np.int32)
    labels = np.full((count, length), IGNORE, np.int32)
    space = (length - 2 * pairs) // 2
    law = (np.arange(space) + 1.0) ** (power - 1)
    law /= law.sum()
    for own, wanted in zip(tokens, labels):
        keys = 1 + random.choice(vocab // 2 - 1, pairs, replace=False)
        values = vocab // 2 + random.choice(vocab // 2, pairs, replace=False)
        own[: 2 * pairs : 2], own[1 : 2 * pairs : 2] = keys, values
        at = 2 * pairs + 2 * random.choice(space, pairs, replace=False, p=law)
        own[at], wanted[at] = keys, values
        if fill:
            empty = own == 0
            own[empty] = random.integers(0, vocab, empty.sum())
    return Labelled(tokens, labels)


def joint_recall(
    count: int, contexts: tuple[int, int] = (5, 16), keys: tuple[int, int] = (5, 16),
    values: int = 16, seed: int = 0,
) -> Labelled:  # fmt: skip
    """Joint recall: every key has a value in every context; all are asked for again, reordered.

    BOS; each context id, followed by its keys and their values; SEP; the same again in new orders;
    padding. A value of the second half is asked for at its key.

    Args:
      count: sequences. contexts, keys: least and most of each, up to 16. values: at most 16.

    Raises:
      ValueError: numbers out of range.

    Source: joint recall, arXiv 2507.00449.
    """
    for name, (low, high) in (("contexts", contexts), ("keys", keys)):
        if not 1 <= low <= high <= 16:
            raise ValueError(f"{name}={low, high}: expected 1 <= least <= most <= 16")
    if not 1 <= values <= 16:
        raise ValueError(f"values={values}: expected 1 to 16")
    random = np.random.default_rng(seed)
    length = 2 + 2 * contexts[1] * (1 + 2 * keys[1])
    tokens = np.full((count, length), PAD, np.int32)
    labels = np.full((count, length), IGNORE, np.int32)
    for own, wanted in zip(tokens, labels):
        n, m = (int(random.integers(low, high + 1)) for low, high in (contexts, keys))
        table = random.integers(0, values, (n, m))
        said: list[int] = [BOS]
        for half in range(2):
            for c in random.permutation(n):
                said.append(CONTEXTS + int(c))
                for k in random.permutation(m):
                    if half:
                        wanted[len(said)] = VALUES + table[c, k]
                    said += [KEYS + int(k), VALUES + int(table[c, k])]
            if not half:
                said.append(SEPARATOR)
        own[: len(said)] = said
    return Labelled(tokens, labels)


# --- as text -------------------------------------------------------------------------------------


def _pairs(random: np.random.Generator, n: int, text: str, tokens: int, shown: int = 3) -> Draft:
    """n lines "key: number"; some keys again with their numbers, and at last one without."""
    keys = vocabulary.words(random, n)
    values = vocabulary.numbers(random, n, 5)
    lines = [f"{k}: {v}" for k, v in zip(keys, values)]
    *before, asked = random.choice(n, shown + 1, replace=False)
    again = "".join(f"\n{lines[i]}" for i in before)
    context = "A list of words and their numbers:\n" + "\n".join(lines)
    ask = "\n\nSome of these words again, with their numbers:" + again
    return Draft(context, ask, f"\n{keys[asked]}:", (values[asked],), 1 / n)


def _joint(
    random: np.random.Generator, n: int, text: str, tokens: int, keys: int = 4, shown: int = 2
) -> Draft:
    """n places with the same things in each, all of some color; one place and thing is asked."""
    colors = ["red", "blue", "green", "white", "black", "brown", "gray", "yellow"]
    places = [name.title() for name in vocabulary.phrases(random, n)]
    things = [vocabulary.NOUNS[i] for i in random.choice(len(vocabulary.NOUNS), keys, False)]
    table = random.integers(0, len(colors), (n, keys))

    def line(place: int, thing: int) -> str:
        return f"In {places[place]} the {things[thing]} is {colors[table[place, thing]]}."

    order = [(p, t) for p in random.permutation(n) for t in random.permutation(keys)]
    context = "Places and the colors of things there:\n" + "\n".join(line(*i) for i in order)
    pick = random.choice(n * keys, shown + 1, replace=False)
    *before, (p, t) = [(int(i) // keys, int(i) % keys) for i in pick]
    ask = "\n\nSome of these again:" + "".join("\n" + line(*i) for i in before)
    prefix = f"\nIn {places[p]} the {things[t]} is"
    return Draft(context, ask, prefix, (colors[table[p, t]],), 1 / len(colors))


TASKS = (
    Task("mqar", _pairs, 8, 4, r"\d+"),
    Task("joint_recall", _joint, 4, 3, r"[a-z]+"),
)
