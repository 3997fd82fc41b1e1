"""`Fit`: constants of a codec that are found from the prompt itself."""

from __future__ import annotations

import dataclasses

from jax import Array

from kvjax.cache.stage import Commit, Statistic
from kvjax.cache.types import Spec


@dataclasses.dataclass(frozen=True)
class Fit:
    """Constants of a codec that are found from the prompt itself, and then stay.

    Attributes of subclasses: `statistics` that `finish` must have gathered.
    """

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        return ()

    @property
    def names(self) -> tuple[str, ...]:
        """Which constants it finds."""
        return tuple(self.init(Spec(1, 1, 1, 1, 1, 1)))

    def init(self, spec: Spec) -> dict[str, Array]:
        """Neutral constants, by the names that the codec reads; each [L, B, H, ...]."""
        raise NotImplementedError

    def __call__(self, context: Commit) -> dict[str, Array]:
        """The constants, from `context.stats`."""
        raise NotImplementedError
