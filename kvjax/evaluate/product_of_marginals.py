"""What committing several tokens at once costs even a perfect model: closed forms."""

from __future__ import annotations

import math

OPERATIONS = ("copy", "reverse", "sort", "replace", "shuffle")


def total_correlation(operation: str, items: int, tokens_per_step: int) -> float:
    """Bits that a perfect model loses by drawing tokens of one step independently.

    The expected conditional total correlation of the tokens committed together, summed over the
    steps: the least KL divergence from the data to what the decoder can produce, positions being
    chosen at random. "replace" puts a word in a random place, "shuffle" draws any order.

    Raises:
      ValueError: an unknown operation, or items < 1 or tokens_per_step < 1.

    Source: ParallelBench, arXiv 2510.04767, section 3.

    >>> round(total_correlation("shuffle", 6, 6), 3), total_correlation("shuffle", 6, 1)
    (6.018, 0.0)
    >>> round(total_correlation("replace", 10, 10), 3)
    1.368
    """
    _check(operation, items, tokens_per_step)
    if operation not in ("replace", "shuffle"):
        return 0.0
    total, left = 0.0, items
    while left:
        now = min(tokens_per_step, left)
        if operation == "shuffle":
            joint = math.lgamma(left + 1) - math.lgamma(left - now + 1)
            total += now * math.log2(left) - joint / math.log(2)
        else:
            # The word is among the slots left with probability left / items; each of them is its
            # place with 1 / left, so does the step hold it with now / left.
            inside = now / left
            joint = inside * math.log2(left) + _plogp(1 - inside)
            total += left / items * (now * _entropy(1 / left) - joint)
        left -= now
    return max(total, 0.0)


def ideal_accuracy(operation: str, items: int, tokens_per_step: int) -> float:
    """How often a perfect model is right that draws each token from its own distribution.

    Positions are chosen at random, `tokens_per_step` at a time; each token is drawn from the exact
    posterior given the tokens of earlier steps, independently of those of its own step.

    Raises:
      ValueError: as `total_correlation`.

    Source: derived from ParallelBench's model of the list operations, arXiv 2510.04767.

    >>> ideal_accuracy("copy", 8, 8), ideal_accuracy("shuffle", 8, 1)
    (1.0, 1.0)
    >>> round(ideal_accuracy("shuffle", 6, 2), 4), round(ideal_accuracy("replace", 6, 6), 4)
    (0.3125, 0.4019)
    """
    _check(operation, items, tokens_per_step)
    if operation not in ("replace", "shuffle"):
        return 1.0
    if items == 0:
        return 1.0
    now = min(tokens_per_step, items)
    if operation == "shuffle":
        step = math.perm(items, now) / items**now
        left = items - now
        return step * (ideal_accuracy(operation, left, tokens_per_step) if left else 1.0)
    placed = now / items * (1 - 1 / items) ** (now - 1)
    if now == items:
        return placed
    none = (1 - 1 / items) ** now
    return placed + none * ideal_accuracy(operation, items - now, tokens_per_step)


def _check(operation: str, items: int, tokens_per_step: int) -> None:
    if operation not in OPERATIONS:
        raise ValueError(f"operation={operation!r}: expected one of {', '.join(OPERATIONS)}")
    if items < 1 or tokens_per_step < 1:
        raise ValueError(
            f"items={items}, tokens_per_step={tokens_per_step}: expected at least 1 of each"
        )


def _plogp(p: float) -> float:
    return -p * math.log2(p) if p > 0 else 0.0


def _entropy(p: float) -> float:
    return _plogp(p) + _plogp(1 - p)
