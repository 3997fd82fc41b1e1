"""The experiment of long-context tasks on a tiny random model: rows, tables, picture, refusals.

The program runs in a process of its own: two programs cannot define their flags in one.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import tasks_job
from experiments.tasks_report import pivot
from kvjax.compress import parse

ROOT = pathlib.Path(__file__).parents[2]
FULL = ("kvzip(keep=1.0, chunk=150)",)
HALF = "streaming_llm(keep=0.5)"
NAMES = ("passkey", "mqar")
START = """
import sys
from absl import app
from experiments import tasks, tasks_job
if "stop" in sys.argv:
    sys.argv.remove("stop")
    tasks.Job = tasks_job.exact_prefill = None
app.run(tasks.main)
"""


def program(tiny, out, *more) -> subprocess.CompletedProcess:
    """Runs it; with "stop" among the arguments no forward pass is possible."""
    arguments = (
        f"--model={tiny}", f"--text={tiny / 'text.txt'}", f"--out={out}", "--samples=2",
        "--length=340", "--answer=4", f"--tasks={','.join(NAMES)}", *more,
    )  # fmt: skip
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    run = program(tiny, out, "--all_tasks", f"--methods={'; '.join([*FULL, HALF])}")
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def rows_of(out):
    return {r["row"]: r for r in json.loads((out / "results.json").read_text())["rows"]}


def test_a_row_for_every_task_and_method(finished):
    rows = rows_of(finished)
    assert list(rows) == [f"{t}: {m}" for t in NAMES for m in ("dense", *FULL, HALF)]
    for row in rows.values():
        assert "error" not in row
        assert 0 <= row["agnostic"] <= 1 and 0 <= row["aware"] <= 1
        assert len(row["scores_agnostic"]) == len(row["answers_aware"]) == 2
        assert (row["held"] == 1) == (row["method"] != HALF)


def test_full_budget_answers_as_dense(finished):
    rows = rows_of(finished)
    for task in NAMES:
        dense = rows[f"{task}: dense"]
        # The question's tokens are computed after the same tokens in both ways of asking.
        assert dense["answers_aware"] == dense["answers_agnostic"]
        for method in FULL:
            assert rows[f"{task}: {method}"]["answers_aware"] == dense["answers_aware"]
            assert rows[f"{task}: {method}"]["answers_agnostic"] == dense["answers_agnostic"]
        assert rows[f"{task}: {HALF}"]["held"] < 0.6


def test_picture_is_one(finished):
    image = matplotlib.image.imread(finished / "tasks.png")
    assert image.shape[0] > 200 and image[..., :3].std() > 0.05


def test_all_done_computes_nothing(tiny, finished):
    run = program(tiny, finished, "stop", "--all_tasks", f"--methods={HALF}")
    assert run.returncode == 0, run.stderr[-3000:]
    assert HALF in run.stdout and FULL[0] not in run.stdout
    assert "Clearly above chance: none." in run.stdout


def job(tiny, names=NAMES, methods="dense", **changed):
    settings = {
        "model": str(tiny), "text": str(tiny / "text.txt"), "length": 340, "samples": 2,
        "answer": 4, "chat": False, "all_tasks": False, "seed": 0, "dtype": "float32", **changed,
    }  # fmt: skip
    return tasks_job.Job(settings, list(names), parse(methods), "nowhere")


def test_right_answers_are_scored_and_other_contexts_are_not(tiny, monkeypatch):
    """A model that says the pass keys, in the order of the contexts, whatever it is asked."""
    run = job(tiny, ["passkey"], answer=8)
    ids = np.full((2, 8), -1, np.int32)
    for own, sample in zip(ids, run.samples["passkey"]):
        code = run.tokenizer.encode(f" {sample.answer}.")
        own[: len(code)] = code
    said = types.SimpleNamespace(tokens=ids)
    monkeypatch.setattr(tasks_job, "generate", lambda *args, **how: said)
    row = run.run(run.batch("passkey"), *parse("dense")[0])
    assert row["agnostic"] == row["aware"] == row["first_agnostic"] == row["first_aware"] == 1
    assert row["swapped"] == row["chance"] == 0 and tasks_job.clear(row)
    assert row["held"] == 1


@pytest.mark.parametrize(
    ("scores", "chance", "yes"),
    [
        ([1, 1, 1, 1, 0, 1, 1, 1], 0.0, True),
        ([1, 0, 0, 0, 0, 0, 0, 0], 0.0, False),  # an eighth, within two standard errors
        ([1, 1, 0, 0, 1, 0, 1, 0], 0.25, False),  # a quarter above chance, and within two errors
        ([0.3, 0.3, 0.3, 0.3], 0.0, True),
        ([0.3, 0.3, 0.3, 0.3], 0.1, False),
    ],
)
def test_what_is_clear(scores, chance, yes):
    assert tasks_job.clear({"scores_agnostic": scores, "chance": chance}) is yes


def test_questions_of_others_stand_at_the_end_of_a_context():
    batch = object.__new__(tasks_job.Batch)
    pos = jnp.asarray([[0, 1, 2, -1], [0, 1, 2, 3]])
    new = types.SimpleNamespace(kv=types.SimpleNamespace(pos=pos[None, :, None]))
    batch.exact = types.SimpleNamespace(new=new)
    batch.question = jnp.asarray([[7, 8], [9, 0]])
    batch.positions = jnp.asarray([[3, 4], [4, -1]])
    tokens, positions = batch.rolled()
    assert tokens.tolist() == [[9, 0], [7, 8]]
    assert positions.tolist() == [[3, -1], [4, 5]]


def test_pivot():
    def row(task, method, agnostic):
        more = {"aware": 1.0, "held": 0.5, "bytes_per_token": 8.0}
        return {"task": task, "method": method, "agnostic": agnostic, **more}

    rows = [row("x", "dense", 0.5), row("y", "dense", 1.0), row("x", "m", 0.25)]
    rows.append({"task": "y", "method": "m", "error": "no"})
    dense, other = pivot(rows, ["x", "y"])
    assert dense["x agnostic"] == 0.5 and dense["mean agnostic"] == 0.75
    assert other["x agnostic"] == 0.25 and "mean agnostic" not in other


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"length": 100}, "passkey: length=100.*smallest haystack"),
        ({"methods": "snapkv(keep=0.05)"}, r"snapkv\(keep=0.05\), prompt of.*always keeps"),
        ({"model": "nowhere"}, "nowhere"),
        ({"chat": True}, "chat template"),
        ({"text": "nowhere.txt"}, "no such file"),
    ],
)
def test_refused_before_anything_is_compiled(tiny, changed, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        job(tiny, **changed)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks=passkey,haystack"], ["haystack", "niah_single_1"]),
        (["--methods=kvzip(keep=2)"], ["keep=2", "(0, 1]"]),
    ],
)
def test_refused_at_the_command_line(tiny, tmp_path, more, said):
    run = program(tiny, tmp_path / "out", "stop", *more)
    text = run.stdout + run.stderr
    assert run.returncode == 1 and all(part in text for part in said) and "Traceback" not in text
