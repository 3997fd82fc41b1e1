"""The low-rank program on the tiny model, in a process of its own."""

from __future__ import annotations

import json

import pytest

from tests.experiments.conftest import start as compress
from tests.experiments.test_distortion import run

PROGRAM = """
import sys
import numpy as np
from experiments import low_rank as p

rng = np.random.default_rng(0)
common = rng.standard_normal((40, 2))
x = np.stack([common @ rng.standard_normal((2, 6)) for _ in range(4)])
errors = {r["group"]: r["error"] for r in p.layers_apart(x, [1, 2], [1])}
left = np.mean([(np.linalg.svd(l)[1][1:] ** 2).sum() / (l**2).sum() for l in x])
assert abs(errors[1] - left) < 1e-9 and errors[2] < 1e-12, errors
angles = p.neighbours(x, 2)
assert angles["next"] > 1 - 1e-9 and angles["far"] > 1 - 1e-9, angles
noise = p.neighbours(rng.standard_normal((4, 400, 6)), 2)
assert noise["next"] < 0.3, noise
p.main(p.FLAGS(["low_rank", *sys.argv[1:]]))
"""


def test_low_rank(tiny, tmp_path):
    run(
        PROGRAM, f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={tmp_path}", "--tokens=96",
        "--offset=10", "--groups=1,2", "--ranks=4,16", "--keep=0.5,0.25", "--samples=1",
        "--calibration_offset=200",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    at = {r["name"]: r for r in rows}
    for source in ("keys before rope", "keys after rope", "values"):
        full = at[f"{source}, 1 layers, rank 16"]["error"]
        apart, pair = (at[f"{source}, {g} layers, rank 4"]["error"] for g in (1, 2))
        assert full == pytest.approx(0, abs=1e-9) and 0 < pair <= apart < 1
    free, bound = (at[f"keys after rope, keep 0.5, {rope}, activations"]["error"]
                   for rope in ("after", "commuting"))  # fmt: skip
    assert 0 < free < bound < 1
    # A quarter of two heads is half a head: no mean, nothing that commutes.
    assert {r["fit"] for r in rows if r.get("keep") == 0.25} == {"activations", "weights"}
    assert {r["rope"] for r in rows if r.get("keep") == 0.25} == {"before", "after"}


CALIBRATED = """
import sys
from experiments import calibrate

calibrate.main(calibrate.FLAGS(["calibrate", *sys.argv[1:]]))
"""


def test_equal_chains_have_each_their_own_constants(tiny, tmp_path):
    """How a projection was found is not seen in the chain that reads it."""
    methods = "compress_kv_heads(kv_heads=1); compress_kv_heads(kv_heads=1, fit='mean')"
    how = (f"--model={tiny}", f"--text={tiny}/text.txt", f"--methods={methods}")
    run(CALIBRATED, *how, f"--out={tmp_path}/c", "--offset=100", "--samples=2", "--tokens=32")
    compress(
        *how, f"--out={tmp_path}/r", "--context=64", "--continuation=16", "--offsets=10",
        "--needles=0", "--rounds=1", f"--calibration={tmp_path}/c",
    )  # fmt: skip
    rows = json.loads((tmp_path / "r" / "results.json").read_text())["rows"]
    assert [r["kl"] > 0 for r in rows] == [False, True, True] and rows[1]["kl"] != rows[2]["kl"]
