"""The program of paragraphs in chunks, on the tiny model, in a process of its own."""

from __future__ import annotations

import json

import pytest

from tests.experiments.test_distortion import run

PROGRAM = (
    "import sys; from experiments import chunks as p; p.main(p.FLAGS(['chunks', *sys.argv[1:]]))"
)
FAR = "video_xl_2(chunk=1, previous=0, stride=1, block=1, relevant=1)"
MIXED = "video_xl_2(chunk=1, previous=10000, stride=4, block=1, relevant=1)"


@pytest.mark.slow
def test_chunks(tiny, tmp_path):
    run(
        PROGRAM, f"--model={tiny}", f"--out={tmp_path}", "--paragraphs=5", "--length=80",
        "--samples=2", "--batch=2", "--relevance=gold,asked", f"--methods={FAR}; {MIXED}",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    causal, far, _, gold, asked = rows
    assert causal["held"] == causal["pairs"] == far["held"] == 1 and far["pairs"] < 0.6
    assert causal["difference"] == 0 and abs(far["difference"]) > 1e-4
    assert gold["pairs"] == 1 and 0.6 < gold["held"] < 0.8 and gold["difference"] != 0
    assert gold["found"] is None and 0 <= asked["found"] <= 1
    assert gold["logprob"] == pytest.approx(sum(gold["logprobs"]) / 2, abs=1e-3)
    assert max(gold["logprobs"]) < 0
