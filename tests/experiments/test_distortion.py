"""The calibration and distortion programs on the tiny model, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from absl import app

from kvjax.codecs import quantize
from tests.experiments.conftest import start as compress

CALIBRATE = """
import pathlib, sys
from absl import app
from experiments import calibrate as c
from kvjax.calibrate import rotatekv

def run(*more):
    c.main(c.FLAGS(["calibrate", *sys.argv[1:], *more]))

run("--methods=kvquant(bits=2); rotatekv")
out = pathlib.Path(c.FLAGS.out)
stamp = lambda: [f.stat().st_mtime_ns for f in sorted(out.glob("*/calibration.json"))]
before = stamp()
run("--methods=kvquant(bits=2)")
assert len(before) == 2 and stamp() == before, "what is there already was made again"
try:
    run("--methods=rtn")
except app.UsageError as error:
    assert "unknown method 'rtn'" in str(error), error
else:
    raise AssertionError("rtn has no calibration")

# Cut off in the midst, then started again.
part = sys.modules[rotatekv.__module__]
whole = part._sum
def cut(*args, **how):
    raise KeyboardInterrupt
part._sum = cut
try:
    run("--methods=rotatekv(heads=1)")
except KeyboardInterrupt:
    pass
assert stamp() == before, "a calibration that was cut off looks complete"
part._sum = whole
run("--methods=rotatekv(heads=1)")
assert len(stamp()) == 3
"""
DISTORTION = """
import json, sys
import jax.numpy as jnp, numpy as np
from experiments import distortion as d
from kvjax.codecs import quantize
from kvjax.compress import parse

d.main(d.FLAGS(["distortion", *sys.argv[1:]]))

# Errors are in units of each head's mean square.
x = np.random.default_rng(0).standard_normal((2, 1, 2, 128, 8)).astype(np.float32)
scaled = x * np.float32([1, 100])[:, None, None, None, None]
a, b = (float(d.measure(quantize(4), jnp.asarray(y), None)[0]) for y in (x, scaled))
assert abs(a / b - 1) < 1e-3, (a, b)
kivi = parse("kivi(bits=2)")[0][1].stages[0].codec
assert d.codec_of("kivi(bits=2)", "values")[0] == kivi.v
assert d.codec_of("kivi(bits=2)", "keys after rope")[0] == kivi.k
assert d.codec_of("kvquant(bits=2)", "keys after rope")[0] is None
print(json.dumps({"sources": d.SOURCES, "far": d.FAR}))
"""


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
        check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration")
    run(
        CALIBRATE, f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={out}", "--offset=100",
        "--samples=4", "--tokens=32",
    )  # fmt: skip
    return out


def test_calibration_leaves_complete_folders(calibrated):
    found = sorted(path.name for path in calibrated.iterdir())
    assert len(found) == 3 and found[0].startswith("kvquant-bits=2-tiny")
    about = json.loads((calibrated / found[0] / "calibration.json").read_text())
    assert about["method"] == "kvquant(bits=2)" and about["samples"] == 4


@pytest.mark.slow
def test_compress_finds_constants_or_says_how_to_make_them(calibrated, tiny, tmp_path):
    how = (f"--model={tiny}", f"--text={tiny}/text.txt", "--context=64", "--continuation=16",
           "--offsets=10", "--needles=0", "--rounds=1", f"--calibration={calibrated}")  # fmt: skip
    compress(*how, f"--out={tmp_path}", "--methods=kvquant(bits=2); rotatekv")
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["dense", "kvquant(bits=2)", "rotatekv"]
    assert not any(r.get("error") for r in rows)
    assert rows[1]["bits_per_value"] < 16 and rows[1]["kl"] > 0
    with pytest.raises(app.UsageError, match=r"experiments.calibrate --methods='kvquant'"):
        compress(*how, f"--out={tmp_path}/b", "--methods=kvquant")


def test_distortion(calibrated, tiny, tmp_path):
    said = run(
        DISTORTION, f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={tmp_path}",
        f"--calibration={calibrated}", "--tokens=128", "--offset=10",
    )  # fmt: skip
    said = json.loads(said.splitlines()[-1])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (tmp_path / "distortion.png").stat().st_size > 10_000
    assert {r["source"] for r in rows} == set(said["sources"])
    at = {(r["quantiser"], r["source"]): r for r in rows}
    for row in rows:
        assert row["bound"] == pytest.approx(4.0 ** -row["bits"])
        far = row["gap"] > row["best_gap"] + said["far"]
        assert bool(row["reason"]) == far  # whatever is far above has a reason beside it
        if row["source"] == "gaussian":  # nothing beats the limit, up to the draw
            assert row["error"] > 0.9 * row["bound"]
    assert at["affine, per token, 4 bits", "gaussian"]["bits"] == quantize(4).bits(8)
    assert at["kvquant(bits=2)", "values"]["error"] < 1
