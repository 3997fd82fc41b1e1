"""What training programs share: progress, rows of the curve, going on after a cut."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import common
from kvjax.train import Checkpoints, TrainState

BY_STEP = "training step"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run under way.

    Attributes:
      state: where it stands. checkpoints, report: for `kvjax.train.fit`.
      elapsed: () -> seconds of training, those before it was cut off included.
    """

    state: TrainState
    checkpoints: Checkpoints
    report: Callable[[int, dict[str, float]], None]
    elapsed: Callable[[], float]


@contextlib.contextmanager
def resumed(
    out: pathlib.Path, every: int, state: TrainState, data: Any, steps: int, results: common.Results
) -> Iterator[Run]:
    """A run of `steps` steps, from the last checkpoint in `<out>/checkpoints` if there is one.

    Rows of `results` beyond that checkpoint are dropped: they come again. Shows a progress bar.

    Args:
      every: steps from one checkpoint to the next. state, data: as `start` and `batches` give them.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        Checkpoints(out / "checkpoints", every) as checkpoints,
        Progress(*columns, TimeElapsedColumn(), console=common.console) as progress,
    ):
        state = checkpoints.restore(state, data)
        first = int(state.step)
        results.rows = [r for r in results.rows if r.get("step", 0) <= first]
        before = max((r["seconds"] for r in results.rows if "seconds" in r), default=0.0)
        task = progress.add_task("training", total=steps, completed=first)
        clock = time.monotonic()

        def elapsed() -> float:
            return before + time.monotonic() - clock

        def report(step: int, metrics: dict[str, float]) -> None:
            results.put({"row": f"{BY_STEP} {step}", "step": step, "seconds": elapsed(), **metrics})
            progress.update(task, completed=step, description=f"loss {metrics['loss']:.3f}")

        yield Run(state, checkpoints, report, elapsed)
