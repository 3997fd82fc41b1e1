"""`share`: a size given as a part of the prompt, known once the cache's sizes are."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

from kvjax.cache.types import Spec


@dataclasses.dataclass(frozen=True)
class Share:
    """See `share`."""

    part: Fraction
    less: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.part <= 1:
            raise ValueError(f"share({float(self.part)}): a part of the prompt lies in (0, 1]")

    def __str__(self) -> str:
        return f"share({float(self.part):g}{f', less={self.less}' if self.less else ''})"


def share(part: float | Fraction, less: int = 0) -> Share:
    """A number of tokens: floor(part * prompt) - less, at least 1.

    The prompt is that of the whole chain (`Spec.whole_prompt`), wherever the stage stands: in
    `chain(recent(share(0.1)), heavy(share(0.1), ...))` both hold a tenth of it.

    >>> share(0.1) == share(0.1), str(share(0.25, less=4))
    (True, 'share(0.25, less=4)')
    """
    return Share(as_fraction(part), less)


def as_fraction(part: float | Fraction) -> Fraction:
    """The fraction that a decimal such as 0.1 means, to three digits in its denominator.

    >>> as_fraction(0.1)
    Fraction(1, 10)
    """
    return part if isinstance(part, Fraction) else Fraction(part).limit_denominator(1000)


def tokens_of(n: int | Share, spec: Spec) -> int:
    """The number of tokens that `n` means in a chain of this spec.

    >>> tokens_of(share(0.1), Spec(1, 1, 1, 1, 8, 64, whole_prompt=48)), tokens_of(7, None)
    (4, 7)
    """
    if not isinstance(n, Share):
        return n
    if spec.whole_prompt < 1:
        raise ValueError(
            f"n={n} is a part of the prompt, but this cache is made for none (prompt=0): give "
            "init_cache the prompt's length, or the stage a number of tokens"
        )
    return max(int(n.part * spec.whole_prompt) - n.less, 1)
