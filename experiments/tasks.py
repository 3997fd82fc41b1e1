"""Long-context tasks: which of them a model can do, and what is left of it under each method.

    python -m experiments.tasks --methods='snapkv(keep=0.25); h2o(keep=0.25)' --length=1024

Dense decoding goes first. The tasks on which it is clearly above chance are those that the other
methods are run on. Each is asked twice: query-aware (the question is part of the prompt that is
compressed) and query-agnostic (the question comes afterwards).
"""

from __future__ import annotations

import traceback
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from experiments import common, tasks_report
from experiments.common import setting, settings
from experiments.tasks_job import Job, clear
from kvjax import parallel
from kvjax.compress import parse
from kvjax.evaluate import TASKS

METHODS = (
    "streaming_llm(keep=0.25); h2o(keep=0.25); tova(keep=0.25); snapkv(keep=0.25); "
    "pyramidkv(keep=0.25); adakv(keep=0.25); expected_attention(keep=0.25); keydiff(keep=0.25); "
    "kvzip(keep=0.25)"
)

config_flags.DEFINE_config_file("config", None, "An ml_collections file; flags given win over it.")
flags.DEFINE_string("model", "smollm2-135m", "Name or path for kvjax.load.")
flags.DEFINE_string("methods", METHODS, "Expressions separated by semicolons.")
flags.DEFINE_list("tasks", list(TASKS), f"Of {', '.join(TASKS)}.")
flags.DEFINE_string("text", "", "A UTF-8 text file; empty: the Python language reference.")
flags.DEFINE_integer("length", 1024, "Tokens per sample, question and answer too.", lower_bound=64)
flags.DEFINE_integer("samples", 8, "Samples per task.", lower_bound=2)
flags.DEFINE_integer(
    "answer", 6, "Tokens decoded beside each answer's own; 0: as each recipe says.", lower_bound=0
)
flags.DEFINE_bool("chat", False, "Prompts in the model's chat template.")
flags.DEFINE_bool("all_tasks", False, "Run methods on all tasks, whatever dense can do.")
flags.DEFINE_integer("seed", 0, "Of the samples.")
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of parameters, exact keys and values."
)
flags.DEFINE_string("calibration", "results/calibration", "Folder of `experiments.calibrate`.")
flags.DEFINE_string("out", "results/tasks", "Folder for results.json and tasks.png.")
flags.DEFINE_bool("compile_cache", False, "Keep compiled programs in the user's cache folder.")
FLAGS = flags.FLAGS

SETTINGS = ("model", "text", "length", "samples", "answer", "chat", "all_tasks", "seed", "dtype")
OTHERS = ("methods", "tasks", "out", "compile_cache", "calibration")


def settings_of(values: Any) -> tuple[dict[str, Any], list[str]]:
    """Flags (or a config file's values), and the names of the tasks.

    Raises:
      ValueError: a value that is not allowed, or a name in the config file that is no setting.
    """
    chosen = settings(values, SETTINGS, OTHERS)
    names = list(dict.fromkeys(setting(values, "tasks")))
    if not names or (unknown := [n for n in names if n not in TASKS]):
        said = unknown if names else []
        raise ValueError(f"tasks={said}: expected some of {', '.join(TASKS)}")
    return chosen, names


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        chosen, names = settings_of(FLAGS)
        methods = list(dict([*parse("dense"), *parse(setting(FLAGS, "methods"))]).items())
        out, calibration = setting(FLAGS, "out"), setting(FLAGS, "calibration")
        results = common.Results(out, chosen, key="row")
    except (ValueError, OSError) as error:
        raise app.UsageError(str(error)) from None
    if setting(FLAGS, "compile_cache"):
        common.compile_cache()
    name_of = lambda task, method: f"{task}: {method}"  # noqa: E731
    if any(results.get(name_of(task, "dense")) is None for task in names) or any(
        results.get(name_of(task, label)) is None
        for task in names
        if chosen["all_tasks"] or clear(results.get(name_of(task, "dense")))
        for label, _ in methods
    ):
        try:
            job = Job(chosen, names, methods, calibration)
        except (ValueError, FileNotFoundError) as error:
            raise app.UsageError(str(error)) from None
        for task in names:
            _run_task(job, task, methods, results, name_of)
    order = [name_of(task, label) for task in names for label, _ in methods]
    results.write(order)
    if parallel.is_main():
        rows = [r for r in results.rows if r["row"] in order]
        for path in (results.path, *tasks_report.write(out, rows, names, chosen)):
            common.console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def _run_task(job: Job, task: str, methods: Any, results: common.Results, name_of: Any) -> None:
    batch = None
    for number, (label, chain) in enumerate(methods, 1):
        dense = results.get(name_of(task, "dense"))
        if results.get(name_of(task, label)) is not None:
            continue
        if label != "dense" and not (job.settings["all_tasks"] or clear(dense)):
            continue
        row = {"row": name_of(task, label), "task": task, "method": label}
        try:
            batch = job.batch(task) if batch is None else batch
            row |= job.run(batch, label, chain)
            said = f"agnostic {row['agnostic']:.0%}, aware {row['aware']:.0%}"
        except Exception as error:  # one method's failure must not cost the others
            if label == "dense":
                raise
            row["error"] = said = f"{type(error).__name__}: {error}"
            common.console.print(traceback.format_exc(), markup=False, highlight=False)
        common.console.print(f"{task}, {label}: {said}", markup=False, highlight=False)
        results.put(row)
        common.forget_programs(number)


if __name__ == "__main__":
    app.run(main)
