"""Needles: facts hidden in a long text, to be said at its end. RULER's eight, and the pass key."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np

from kvjax.evaluate.tasks import vocabulary
from kvjax.evaluate.tasks.base import Draft, Sample, Task, tokens_at
from kvjax.models.tokenizer import Tokenizer

HAY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {kind} afterwards.\n{context}"
)
ASK = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
FORMS = {"numbers": r"\d+", "uuids": r"[0-9a-f]{8}-[0-9a-f-]+"}


def _one(sentence: str) -> str:
    """A sentence about several things as one about a single thing."""
    return sentence.replace("Some", "A").replace("are all", "is").replace("are", "is")


def _niah(
    random: np.random.Generator,
    n: int,
    text: str,
    tokens: int,
    *,
    hay: Literal["noise", "text", "needles"],
    kind: Literal["numbers", "uuids"] = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Draft:
    """A haystack of n units with `keys` keys of `values` values, of which `queries` are asked for.

    Keys are pairs adjective-noun, and uuids where both the hay is needles and values are uuids.
    """
    keys = max(keys, queries)
    name_all = vocabulary.uuids if hay == "needles" and kind == "uuids" else vocabulary.phrases
    value_all = vocabulary.uuids if kind == "uuids" else vocabulary.numbers
    more = n if hay == "needles" else 0  # of the haystack itself
    key = name_all(random, keys + more)
    value = value_all(random, keys * values + more)
    say = functools.partial(NEEDLE.format, kind=kind)
    needles = [
        say(key=k, value=v) for i, k in enumerate(key[:keys])
        for v in value[i * values : (i + 1) * values]
    ]  # fmt: skip
    random.shuffle(needles)
    if hay == "text":
        sentences = vocabulary.passage(random, text, n)
        depths = np.round(np.linspace(0, 100, 40))
        depths = np.sort(random.choice(depths, len(needles), replace=False))
        for depth, needle in reversed(list(zip(depths, needles))):
            sentences.insert(int(len(sentences) * depth / 100), needle)
        context = " ".join(sentences)
    else:
        lines = [vocabulary.NOISE] * n
        if hay == "needles":
            lines = [say(key=k, value=v) for k, v in zip(key[keys:], value[keys * values :])]
        where = np.sort(random.choice(n, len(needles), replace=False))
        for at, needle in reversed(list(zip(where, needles))):
            lines.insert(int(at), needle)
        context = "\n".join(lines)
    asked = key[:queries]
    query = asked[0] if queries == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    several = queries * values > 1
    said = {"kind": kind if several else kind[:-1], "query": query, "context": context}
    parts = [(x if several else _one(x)).format(**said) for x in (HAY, ASK, PREFIX)]
    right = queries * values
    offered = len(value)
    return Draft(*parts, tuple(value[:right]), right / offered if offered > right else 0.0)


def _passkey(random: np.random.Generator, n: int, text: str, tokens: int) -> Draft:
    """n characters of noise around a line that says the key."""
    before, key = int(random.integers(0, n + 1)), str(random.integers(1, 50_001))
    noise = (vocabulary.NOISE + " ") * (n // len(vocabulary.NOISE) + 1)
    context = "\n".join(
        [
            "There is an important info hidden inside a lot of irrelevant text. Find it and "
            "memorize them. I will quiz you about the important information there.",
            noise[:before],
            f"The pass key is {key}. Remember it. {key} is the pass key.",
            noise[: n - before],
        ]
    )
    return Draft(context, "\nWhat is the pass key?", " The pass key is", (key,))


def _task(name: str, least: int, **how: object) -> Task:
    form = FORMS[how.get("kind", "numbers")]
    return Task(name, functools.partial(_niah, **how), 128, least, form)


TASKS = (
    _task("niah_single_1", 1, hay="noise"),
    _task("niah_single_2", 8, hay="text"),
    _task("niah_single_3", 8, hay="text", kind="uuids"),
    _task("niah_multikey_1", 8, hay="text", keys=4),
    _task("niah_multikey_2", 1, hay="needles"),
    _task("niah_multikey_3", 1, hay="needles", kind="uuids"),
    _task("niah_multivalue", 8, hay="text", values=4),
    _task("niah_multiquery", 8, hay="text", queries=4),
    Task("passkey", _passkey, 10, 1, r"\d+"),
)

# Wording matters to a small model: of 12 in 4,096 tokens dense SmolLM2-135M finds 10 when asked in
# this way, 8 when the text goes on with "\nThe magic number is".
FACT = "\nThe magic number is {number}. Remember it: the magic number is {number}.\n"
QUESTION = "\n\nQuestion: What is the magic number?\nAnswer: The magic number is"


def needles(
    text: str, tokenizer: Tokenizer, length: int, count: int, seed: int = 0, new_tokens: int = 8,
    question: str = QUESTION,
) -> list[Sample]:  # fmt: skip
    """Contexts of exactly `length` tokens, each with a five-digit number at its own depth.

    Depths are spread evenly over (0, 1); every prompt uses another part of the text. The question
    is not counted in `length`.
    """
    random = np.random.default_rng(seed)
    ids = tokenizer.encode(text, special=False)
    asked = tuple(tokenizer.encode(question, special=False))
    if len(ids) < 2 * length:
        raise ValueError(f"the text has {len(ids)} tokens: needles of {length} need twice as many")
    found = []
    for index in range(count):
        number = str(random.integers(10000, 100000))
        line = FACT.format(number=number)
        code = tokenizer.backend.encode(line, add_special_tokens=False)
        fact, digits = code.ids, line.index(number)
        hay = length - len(fact)
        if hay < 1:
            raise ValueError(f"needle length {length}: the needle alone has {len(fact)} tokens")
        start = int(random.integers(0, len(ids) - hay))
        depth = (index + 0.5) / count
        at = int(depth * hay)
        body = ids[start : start + at] + fact + ids[start + at : start + hay]
        first, last = tokens_at(code.offsets, digits, digits + len(number))
        span = (at + first, at + last)
        found.append(
            Sample("needles", tuple(body), asked, (number,), new_tokens, (span,), 0.0, r"\d+")
        )
    return found
