"""The closed forms against enumeration of a perfect model's joint distribution, and the paper."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest

from kvjax.evaluate import ideal_accuracy, total_correlation


def outcomes(operation, n):
    """Every right answer of a list 0..n-1, all equally likely (with "w" the new word)."""
    given = tuple(range(n))
    if operation == "shuffle":
        return list(itertools.permutations(given))
    if operation == "replace":
        return [(*given[:i], "w", *given[i + 1 :]) for i in range(n)]
    return [given]


def decoded(operation, n, k):
    """(exact accuracy, bits lost) of drawing k positions per step from a perfect model's marginals,
    positions left to right (by symmetry as good as any order)."""
    answers = outcomes(operation, n)
    right, bits = Fraction(0), 0.0
    states = {(): Fraction(1)}  # what was committed -> probability, while it is still possible
    truth = {(): Fraction(1)}  # the same under the data
    for start in range(0, n, k):
        stop = min(start + k, n)
        after, data = {}, {}
        for prefix, p in states.items():
            rows = [a for a in answers if a[:start] == prefix]
            marginals = [Counter(a[i] for a in rows) for i in range(start, stop)]
            joint = Counter(a[start:stop] for a in rows)
            for part, count in joint.items():
                q = math.prod(
                    (Fraction(m[x], len(rows)) for m, x in zip(marginals, part)), start=Fraction(1)
                )
                after[prefix + part] = p * q
                data[prefix + part] = truth[prefix] * Fraction(count, len(rows))
                if q:
                    bits += float(data[prefix + part]) * math.log2(count / len(rows) / q)
        states, truth = after, data
    right = sum(states.values())
    return float(right), bits


@pytest.mark.parametrize("operation", ["copy", "replace", "shuffle"])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_closed_forms_are_those_of_enumeration(operation, n):
    for k in range(1, n + 1):
        accuracy, bits = decoded(operation, n, k)
        assert ideal_accuracy(operation, n, k) == pytest.approx(accuracy, abs=1e-12)
        assert total_correlation(operation, n, k) == pytest.approx(bits, abs=1e-9)


def test_figures_of_the_paper():
    """C(Y|X) of one step in bits; accuracies of random order, T = 1."""
    assert total_correlation("shuffle", 10, 10) == pytest.approx(11.428, abs=1e-3)
    assert total_correlation("replace", 6, 6) == pytest.approx(1.315, abs=1e-3)
    for n, expected in ((6, 0.3125), (10, 0.2461), (16, 0.1964)):
        assert ideal_accuracy("shuffle", n, 2) == pytest.approx(expected, abs=5e-5)
    for n, expected in ((6, 0.7335), (8, 0.7803), (10, 0.8121), (16, 0.8667)):
        assert ideal_accuracy("replace", n, 2) == pytest.approx(expected, abs=5e-5)
    assert ideal_accuracy("reverse", 16, 16) == ideal_accuracy("sort", 16, 16) == 1.0


def test_fewer_tokens_per_step_never_lose_more():
    for operation in ("replace", "shuffle"):
        lost = [total_correlation(operation, 12, k) for k in (1, 2, 3, 4, 6, 12)]
        assert lost == sorted(lost) and lost[0] == pytest.approx(0, abs=1e-12)


def test_refused():
    with pytest.raises(ValueError, match=r"'turn'"):
        ideal_accuracy("turn", 4, 1)
    with pytest.raises(ValueError, match="tokens_per_step=0"):
        total_correlation("copy", 4, 0)
