"""The program that compares probes of a window, on the tiny model, in a process of its own."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_distortion import run

PROGRAM = """
import sys
from experiments import probe as p

p.main(p.FLAGS(["probe", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_probe(tiny, tmp_path):
    run(
        PROGRAM, f"--model={tiny}", f"--out={tmp_path}", "--context=600", "--windows=20",
        "--samples=2", "--blocks=3", "--block=4", "--local=8", "--sinks=2",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    names = ["activation", "largest", "mean", "random"]
    names += ["activation, where keys stand", "everything, where keys stand"]
    assert [row["case"] for row in rows] == [f"{name}, window of 20" for name in names]
    assert rows[-1]["recall"] == 1
    for row in rows:
        assert len(row["recall_of_layers"]) == 2 and 0 <= row["recall"] <= row["best_layer"] <= 1
        assert (
            (0 < row["chance"] < 0.2 or row is rows[-1])
            and row["logprob"] < 0
            and 0.5 < row["flatness"] <= 1
        )
    assert len({tuple(row["logprobs"]) for row in rows}) > 1  # what is read matters
