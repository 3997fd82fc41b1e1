"""The programs about rules among the rows of a prompt, on the tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.experiments.test_distortion import run

PREFILL = """
import sys
from experiments import prefill

prefill.main(prefill.FLAGS(["prefill", *sys.argv[1:]]))
"""
KINDS = """
import sys
from experiments import two_kinds

assert abs(two_kinds.search(lambda t: 1 - t, 0.9, 12) - 0.1) < 1e-3
two_kinds.main(two_kinds.FLAGS(["two_kinds", *sys.argv[1:]]))
"""


def rows_of(folder):
    return {r["name"]: r for r in json.loads((folder / "results.json").read_text())["rows"]}


def test_rows_by_layer(tiny, tmp_path):
    how = "probes=8, drawn=8, group=4"
    out = run(
        PREFILL, f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={tmp_path}", "--context=64",
        "--continuation=8", "--offsets=10,400", "--prompts=text,noise", "--rounds=1",
        f"--methods=zipvl(tau=0.5, {how}); zipvl(tau=1.0, bits=16, {how})",
    )  # fmt: skip
    rows = rows_of(tmp_path)
    some, every = f"zipvl(tau=0.5, {how}), text", f"zipvl(tau=1.0, bits=16, {how}), text"
    assert rows[some]["rows"] < 0.7 and rows["dense, text"]["rows"] == rows[every]["rows"] == 1
    assert rows[some]["pairs"] < rows[some]["rows"]
    assert rows[some]["rows"] == pytest.approx(np.mean(rows[some]["layers"]), abs=1e-4)
    assert rows[every]["perplexity"] == pytest.approx(rows["dense, text"]["perplexity"], rel=1e-4)
    # All is held exactly, or at 4 and 2 bits (scales of 4 numbers each double that).
    # Positions of 4 bytes: of all layers together, or of both, whose rows differ; and counters.
    held = 128 * 2 * 2 * 2 * 8 * 4
    assert 128 * rows["dense, text"]["used_bytes"] == held + 128 * 4 + 7
    assert 128 * rows[every]["used_bytes"] == held + 128 * 2 * 4 + 24
    assert rows[some]["used_bytes"] < 0.5 * rows["dense, text"]["used_bytes"]
    assert rows[some]["prefill_seconds"] > 0 and rows["dense, text"]["prefill_ratio"] == 1
    assert (tmp_path / "rows.png").stat().st_size > 1000 and "rows.png" in out


@pytest.mark.slow
def test_documents_in_place_of_images(tiny, tmp_path):
    run(
        KINDS, f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={tmp_path}", "--document=64",
        "--samples=2", "--steps=3", "--targets=0.7", "--layers=0,1",
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert rows["dense"]["mean"] == rows["dense"]["last"] == 1
    several, one = rows["0.7, several layers"], rows["0.7, best share behind layer 0"]
    chance = rows["0.7, random, several layers"]
    assert several["tau"] > 0 and 0 < several["last"] <= several["mean"] <= 1
    assert chance["layers"] == pytest.approx(several["layers"], abs=0.02)
    assert one["mean"] == pytest.approx(several["mean"], abs=0.02)
    assert all(np.isfinite(r["answer"]) for r in rows.values())
    assert several["used_bytes"] <= rows["dense"]["used_bytes"]
