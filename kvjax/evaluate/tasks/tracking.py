"""Variable tracking: a value passed on from name to name, the lines hidden in noise."""

from __future__ import annotations

import numpy as np

from kvjax.evaluate.tasks import vocabulary
from kvjax.evaluate.tasks.base import Draft, Task

HAY = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}"
)
ASK = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)
EXAMPLE_LINES = 5  # of noise in the solved example


def _chain(
    random: np.random.Generator, n: int, hops: int, letters: int
) -> tuple[str, str, list[str]]:
    """(n lines of noise with the assignments among them, in order; the value; the names)."""
    names = vocabulary.names(random, hops + 1, letters)
    value = str(random.integers(10_000, 99_999))
    lines = [vocabulary.NOISE] * n
    said = [value] + [f"VAR {name} " for name in names]
    where = np.sort(random.integers(0, n + 1, hops + 1))
    for hop in reversed(range(hops + 1)):
        lines.insert(int(where[hop]), f"VAR {names[hop]} = {said[hop]}")
    return "\n".join(lines), value, names


def _track(random: np.random.Generator, n: int, text: str, tokens: int, hops: int = 4) -> Draft:
    """One chain of `hops` hops, after a solved example with shorter names and other values."""
    noise, value, names = _chain(random, EXAMPLE_LINES, hops, 3)
    fill = {"context": noise, "value": value, "count": hops + 1}
    solved = (HAY + ASK + PREFIX).format(**fill) + " ".join(names) + "\n\n"
    noise, value, names = _chain(random, n, hops, 5)
    fill = {"context": noise, "value": value, "count": hops + 1}
    context, ask, prefix = (x.format(**fill) for x in (HAY, ASK, PREFIX))
    return Draft(solved + context, ask, prefix.rstrip(), tuple(names))


TASKS = (Task("vt", _track, 30, 1, r"\b(?!VAR\b)[A-Z]+"),)
