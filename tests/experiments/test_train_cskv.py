"""The training program on the tiny model, in a process of its own: cut off, resumed, and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from absl import app

from kvjax.calibrate import find
from kvjax.compress import parse
from kvjax.models import load
from tests.experiments.conftest import start as compress

HALF = "cskv(window=8, factors='trained')"
CODED = "cskv(key_density=0.25, window=8, bits=4, factors='trained')"
PROGRAM = """
import sys
from absl import app
from experiments import train_cskv as t

def run(out, *more):
    where = f"--out={out}/run", f"--calibration={out}"
    t.main(t.FLAGS(["train_cskv", *sys.argv[2:], *where, *more]))

root = sys.argv[1]
run(f"{root}/whole")

# Cut off at the evaluation after step 4, when the last checkpoint is that of step 2.
measure = t.measure
def cut(loss, model, data, key, calls=[]):
    calls.append(key)
    if len(calls) == 2:
        raise KeyboardInterrupt
    return measure(loss, model, data, key)
t.measure = cut
try:
    run(f"{root}/cut")
except KeyboardInterrupt:
    pass
else:
    raise AssertionError("it went on")
t.measure = measure
import pathlib
assert not list(pathlib.Path(f"{root}/cut").glob("cskv*")), "constants of a run that was cut off"
run(f"{root}/cut")

for folder, flag, said in (
    ("fresh", "--methods=cskv", "expected cskv(factors='trained', ...)"),
    ("fresh", "--methods=kivi", "unknown method 'kivi'"),
    ("fresh", "--tokens=36", "codes 8 tokens together"),
    ("fresh", "--offset=99999", "tokens only"),
    ("cut", "--steps=7", "other settings (steps differ)"),
):
    try:
        run(f"{root}/{folder}{flag if folder == 'fresh' else ''}", flag)
    except app.UsageError as error:
        assert said in str(error), error
    else:
        raise AssertionError(flag)
"""


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    arguments = (
        f"--model={tiny}", f"--text={tiny}/text.txt", "--tokens=32", "--offset=500", "--steps=6",
        "--held_out=10", "--held_out_samples=2", "--samples=4", "--batch=2", "--report_every=2",
        "--evaluate_every=4", "--checkpoint_every=2", f"--methods={HALF}; {CODED}",
        "--learning_rate=0.03",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(out), *arguments], capture_output=True, text=True,
        check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def rows(folder):
    found = json.loads((folder / "run" / "results.json").read_text())["rows"]
    return {r["row"]: {k: v for k, v in r.items() if k != "seconds"} for r in found}


def test_what_a_run_leaves(trained):
    found = rows(trained / "whole")
    assert list(found) == [
        "after 0", "training step 2", "training step 4", "after 4", "training step 6", "after 6",
    ]  # fmt: skip
    for label in (HALF, CODED):
        for side in ("k", "v"):
            before, after = (found[f"after {n}"]["held_out"][f"{label} {side}"] for n in (0, 6))
            assert 0 < after < before < 1
    assert (trained / "whole" / "run" / "training.png").stat().st_size > 5000


def test_a_run_cut_off_goes_on_bit_for_bit(trained, tiny):
    assert rows(trained / "whole") == rows(trained / "cut")
    model, _ = load(tiny)
    for label in (HALF, CODED):
        names = parse(label)[0][1].constants(8)
        whole, resumed = (find(trained / n, label, names, model) for n in ("whole", "cut"))
        assert len(whole) == 6
        for name, x in whole.items():
            np.testing.assert_array_equal(x, resumed[name])


def test_the_main_job_finds_what_was_trained(trained, tiny, tmp_path):
    how = (
        f"--model={tiny}", f"--text={tiny}/text.txt", "--context=64", "--continuation=16",
        "--offsets=10", "--needles=0", "--rounds=1", f"--calibration={trained}/whole",
    )  # fmt: skip
    methods = ["cskv(window=8)", HALF]
    compress(*how, f"--out={tmp_path}", f"--methods={'; '.join(methods)}")
    found = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [r["method"] for r in found] == ["dense", *methods]
    assert not any(r.get("error") for r in found)
    assert 0 < found[2]["kl"] != found[1]["kl"] > 0
    with pytest.raises(app.UsageError, match=r"experiments.train_cskv --methods=\"cskv\(factors"):
        compress(*how, f"--out={tmp_path}/b", "--methods=cskv(factors='trained')")
