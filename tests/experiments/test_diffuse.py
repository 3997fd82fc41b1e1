"""Diffusion decoding side by side, on a tiny random model: what is written, and going on.

In a process of its own: two programs of experiments cannot define their flags in one.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from kvjax.data.list_operations import EOS, MASK, VOCABULARY, tokenizer
from kvjax.models import Config, save_pretrained
from kvjax.models.llama import init

ROOT = pathlib.Path(__file__).parents[2]
START = """
import sys
from absl import app
from experiments import diffuse
runs = []
job = diffuse.Job.run
diffuse.Job.run = lambda self, *what: runs.append(what) or job(self, *what)
try:
    app.run(diffuse.main)
finally:
    print("runs:", len(runs))
"""
KEYS = {
    "method", "task", "unmasker", "cache", "accuracy", "evaluations", "tokens_per_evaluation",
    "positions_active", "positions_computed", "cache_bytes", "tokens_per_second",
    "ratio_to_uncached",
}  # fmt: skip


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffuse")
    config = Config(
        len(VOCABULARY), 16, 24, 1, 2, 2, 8, family="llada", bidirectional=True, mask_token=MASK,
        eos=(EOS,), tied=False,
    )  # fmt: skip
    save_pretrained(init(config, jax.random.key(0)), folder / "model", tokenizer())
    arguments = (
        f"--model={folder / 'model'}", f"--out={folder / 'out'}", "--tasks=copy,speed",
        "--prompt=4", "--new_tokens=4",
        "--tokens_per_step=2", "--items=6", "--slots=6", "--examples=5", "--batch=4",
        "--rounds=1", "--caches=dkv_decode(refresh=2, codec=quantize(bits=4, axis='token'))",
    )  # fmt: skip
    run = program(*arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, arguments, run.stdout


def test_rows_and_picture(finished):
    folder, _, text = finished
    whole = json.loads((folder / "out" / "results.json").read_text())
    rows = {row["method"]: row for row in whole["rows"]}
    coded = "dkv_decode(refresh=2, codec=quantize(bits=4, axis='token'))"
    assert list(rows) == [
        f"{task}, {unmasker}, {cache}"
        for task in ("copy", "speed")
        for unmasker in ("2 per step", "threshold(value=0.9)")
        for cache in ("no_cache", coded)
    ]
    for name, row in rows.items():
        known = row["task"] == "copy"
        assert row.keys() == KEYS | ({"ideal"} if known and "per step" in name else set())
        assert row["task"] in text and row["tokens_per_second"] > 0 < row["ratio_to_uncached"]
        assert 0 <= row["accuracy"] <= 1 if known else row["accuracy"] is None
    plain, cached = rows["copy, 2 per step, no_cache"], rows[f"copy, 2 per step, {coded}"]
    assert plain["evaluations"] == cached["evaluations"] == 3 and plain["ideal"] == 1
    assert plain["positions_active"] == plain["positions_computed"] == 3 * 15
    assert plain["positions_active"] >= cached["positions_computed"] >= cached["positions_active"]
    assert rows["speed, 2 per step, no_cache"]["positions_computed"] == 2 * 8
    assert plain["cache_bytes"] == 0 < cached["cache_bytes"]
    assert (folder / "out" / "diffuse.png").stat().st_size > 10_000
    assert "runs: 8" in text


def test_goes_on_where_it_stopped_and_refuses_what_is_wrong(finished):
    _, arguments, _ = finished
    again = program(*arguments)
    assert again.returncode == 0 and "runs: 0" in again.stdout
    for argument, expected in (
        ("--examples=6", "made with other settings (examples differ)"),
        ("--caches=dkv(refresh=2)", "unknown method 'dkv'"),
        ("--caches=quantize(bits=4)", "is no cache policy"),
    ):
        run = program(*arguments, argument)
        assert run.returncode == 1 and expected in run.stdout + run.stderr
        assert "runs: 0" in run.stdout
