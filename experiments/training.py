"""What training programs share: progress, rows of the curve, going on after a cut."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import common
from kvjax.data import TokenWindows
from kvjax.evaluate import load_text, samples
from kvjax.train import Checkpoints, TrainState

BY_STEP = "training step"


def texts(
    chosen: Mapping[str, Any], tokenizer: Any
) -> tuple[TokenWindows, list[dict[str, np.ndarray]], list[np.ndarray]]:
    """(sequences to train on, batches held out, a few of the former [1, T], evenly spread).

    Args:
      chosen: settings text, tokens, offset, samples, held_out and held_out_samples.

    Raises:
      ValueError: the text is too short. FileNotFoundError: there is none.
    """
    text, length = load_text(chosen["text"]), chosen["tokens"]
    starts = [chosen["held_out"] + i * length for i in range(chosen["held_out_samples"])]
    held_out = [{"tokens": row[None]} for row in samples(text, tokenizer, starts, length)]
    ids = np.asarray(tokenizer.encode(text, special=False), np.int32)[chosen["offset"] :]
    source = TokenWindows(ids, length)
    step = -(-len(source) // chosen["samples"])
    few = [source[i]["tokens"][None] for i in range(0, len(source), step)]
    return source, held_out, few


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
