"""The tables and the picture of `experiments.tasks`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments import common
from experiments.tasks_job import clear

DENSE = {
    "task": "dense on",
    "agnostic": "score|.0%",
    "first_agnostic": "first named|.0%",
    "swapped": "other context|.0%",
    "guess": "by guess|.0%",
    "clear": "clearly above chance",
}


def write(
    out: str,
    rows: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    settings: Mapping[str, Any],
) -> list[pathlib.Path]:
    """Prints what dense can do and what is left of it; writes tasks.png. Returns its path."""
    dense = [r for r in rows if r["method"] == "dense"]
    said = [{**r, "clear": "yes" if clear(r) else "no"} for r in dense]
    common.table("What dense can do", DENSE, said)
    used = [r["task"] for r in dense if settings["all_tasks"] or clear(r)]
    common.console.print(
        f"Clearly above chance: {', '.join(r['task'] for r in dense if clear(r)) or 'none'}."
    )
    lines = pivot(rows, used)
    for mode, words in (("agnostic", "asked after compression"), ("aware", "asked before")):
        columns = {"method": "method", "held": "held|.0%", "bytes_per_token": "bytes/tok|,.0f"}
        columns |= {f"{t} {mode}": f"{t}|.0%" for t in used}
        if len(used) > 1:
            columns[f"mean {mode}"] = "mean|.0%"
        if used:
            common.table(f"Right answers, {words}", columns, lines)
    for row in rows:
        if row.get("error"):
            common.console.print(f"{row['row']} failed: {row['error']}", markup=False)
    if not used:
        return []
    picture = heat(lines, used, settings)
    path = pathlib.Path(out) / "tasks.png"
    picture.savefig(path, dpi=150)
    plt.close(picture)
    return [path]


def pivot(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """One line per method: "<task> <mode>" for all tasks, the mean over those it was run on."""
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        own = {r["task"]: r for r in rows if r["method"] == method and not r.get("error")}
        own = {t: own[t] for t in tasks if t in own}
        line: dict[str, Any] = {"method": method}
        for mode in ("agnostic", "aware"):
            line |= {f"{t} {mode}": r[mode] for t, r in own.items()}
            if len(own) == len(tasks):
                line[f"mean {mode}"] = float(np.mean([r[mode] for r in own.values()]))
        if own:
            line["held"] = float(np.mean([r["held"] for r in own.values()]))
            line["bytes_per_token"] = float(np.mean([r["bytes_per_token"] for r in own.values()]))
            lines.append(line)
    return lines


def heat(
    lines: Sequence[Mapping[str, Any]], tasks: Sequence[str], settings: Mapping[str, Any]
) -> Any:
    """Methods by tasks, one panel per way of asking, shares of right answers written in."""
    high = 1.6 + 0.34 * len(lines)
    wide = 4.5 + 1.5 * (len(tasks) + 1)
    figure, axes = plt.subplots(
        1, 2, figsize=(wide, high), layout="constrained", sharey=True, squeeze=False
    )
    columns = [*tasks, *(["mean"] if len(tasks) > 1 else [])]
    for axis, mode, words in zip(
        axes[0], ("agnostic", "aware"), ("asked after compression", "asked before compression")
    ):
        value = np.array([[line.get(f"{c} {mode}", np.nan) for c in columns] for line in lines])
        axis.imshow(value, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (i, j), x in np.ndenumerate(value):
            if np.isfinite(x):
                axis.text(j, i, f"{100 * x:.0f}", ha="center", va="center", fontsize=9,
                          color="white" if x > 0.6 else "black")  # fmt: skip
        axis.axvline(len(tasks) - 0.5, color="white", lw=3)
        axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
        axis.set_yticks(range(len(lines)), [line["method"] for line in lines])
        axis.tick_params(length=0)
        axis.set_title(words, fontsize=11)
        for side in axis.spines.values():
            side.set_visible(False)
    figure.suptitle(
        f"Right answers (%) of {settings['model']}, {settings['length']:,} tokens, "
        f"{settings['samples']} samples per task",
        fontsize=11,
    )
    return figure
