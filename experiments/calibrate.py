"""Finds the constants that calibrated methods read, and keeps them in a folder.

    python -m experiments.calibrate --methods='kvquant(bits=3); rotatekv(bits=2)'

Each method gets a folder named by it, the model and the model's shape, complete or absent: a run
that was cut off leaves nothing that would be used, and starts again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from absl import app, flags, logging
from jax import Array
from ml_collections import config_flags
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from experiments import common
from kvjax.calibrate import CALIBRATIONS, PROGRAM, complete, folder_of, load, save
from kvjax.compress import parse
from kvjax.evaluate import load_text, samples
from kvjax.models import load as load_model

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string(
    "methods",
    "kvquant; rotatekv; compress_kv_heads; double_sparsity",
    "Calibrated methods separated by semicolons.",
)
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("samples", 16, "Sequences to calibrate on.", lower_bound=1)
flags.DEFINE_integer("tokens", 512, "Tokens of each.", lower_bound=16)
flags.DEFINE_integer("batch", 2, "Sequences at a time.", lower_bound=1)
flags.DEFINE_integer(
    "offset", 80000, "First token of the first sequence; others follow.", lower_bound=0
)
flags.DEFINE_bool("again", False, "Replace what is there already.")
flags.DEFINE_string("out", "results/calibration", "Folder of the methods' folders.")
FLAGS = flags.FLAGS
NAMES = ("model", "methods", "text", "samples", "tokens", "batch", "offset", "again", "out")


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells every step of its own
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen = common.settings(FLAGS, NAMES, ())
        methods = dict(parse(chosen["methods"], CALIBRATIONS))
        for label, calibration in methods.items():
            if calibration.program not in (None, PROGRAM):
                raise ValueError(
                    f"methods: {label} is trained, not calibrated: run "
                    f"{calibration.command(label, chosen['out'])}"
                )
        model, tokenizer = load_model(chosen["model"])
        starts = [chosen["offset"] + i * chosen["tokens"] for i in range(chosen["samples"])]
        text = load_text(chosen["text"])
        windows = samples(text, tokenizer, starts, chosen["tokens"])
    except (ValueError, FileNotFoundError) as error:
        raise app.UsageError(str(error)) from None
    size = chosen["batch"]
    batches = [jnp.asarray(windows[i : i + size]) for i in range(0, len(windows), size)]
    about = {n: chosen[n] for n in ("text", "samples", "tokens", "offset")}
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    for label, calibration in methods.items():
        folder = folder_of(chosen["out"], label, chosen["model"], model.config)
        if complete(folder) and not chosen["again"]:
            try:
                load(folder, model)
            except ValueError as error:
                raise app.UsageError(f"{error} (--again replaces it)") from None
            common.console.print(f"{folder} is there already (--again replaces it)")
            continue
        begin = time.perf_counter()
        with Progress(*columns, console=common.console) as progress:
            task = progress.add_task(label, total=len(batches))

            def shown(
                progress: Any = progress, task: Any = task, label: str = label
            ) -> Iterator[Array]:
                for batch in batches:
                    yield batch
                    progress.advance(task)
                progress.update(task, description=f"{label}: fitting")

            constants = calibration(model, shown())
        seconds = round(time.perf_counter() - begin, 1)
        save(folder, label, constants, model, chosen["model"], about | {"seconds": seconds})
        common.console.print(f"wrote {folder} ({seconds} s)", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app.run(main)
