"""The parts of the benchmark on the tiny model, in a process of its own (its flags are its own)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json, sys
from experiments import benchmark as b, common
b.FLAGS(["benchmark", "--rounds=1", "--tokens=4"])
from kvjax.models import load
from kvjax import cache as kv

kivi = b.kivi
b.kivi = lambda bits: kivi(bits, group=8, residual=16)  # the heads of the tiny model are narrow
model, _ = load(sys.argv[1], tokenizer=False)
rate = object.__new__(b.Bandwidth)
rates = iter([10.0, 20.0, 5.0, 40.0])
rate.measure = lambda: order.append("bandwidth") or next(rates)
order = []
def timed(name, seconds):
    seconds = iter(seconds)
    return lambda: order.append(name) or next(seconds)
runs = {"slow": timed("slow", [3.0, 8.0, 2.0]), "fast": timed("fast", [1.0, 2.0, 2.0])}
seconds = b.interleaved(runs, 3, rate)

case = b.Case("c", 24, 32, 2)
whole = b.weights_bytes(model)
decoded = b.decoder(model, case, 4)()
results = common.Results(sys.argv[2], {"model": "tiny"}, key="case")
b.compile_part(model, results)
rate.measure = lambda: 10.0
b.long_part(model, rate, results, 40, {label: (c, {}) for label, c in b.parse(sys.argv[3])})
print(json.dumps({
    "order": order, "seconds": seconds, "ratio": b.ratio(seconds, "slow", "fast"),
    "roofline": b.of_roofline(seconds, "fast", 10),
    "timing": b.timing("t", [0.2, 0.1, 0.5], 4),
    "weights": whole, "parameters": sum(x.nbytes for x in b.flatten(model).values()),
    "read": b.read_bytes(model, case, 4), "decoded": decoded,
    "held": kv.nbytes(b.filled(model, case)[1]),
    "full": b.read_bytes(model, b.Case("c", 32, 32, 2), 8),
}))
"""


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("benchmark")
    methods = "mustafar(window=8); rotatekv(reorder=False); kvzip(tokens=16)"
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM, str(tiny), str(out), methods],
        capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((out / "results.json").read_text())["rows"]
    return json.loads(run.stdout.splitlines()[-1]) | {"rows": {r["case"]: r for r in rows}}


def test_rounds_are_interleaved(found):
    assert found["order"] == ["bandwidth", *["slow", "fast", "bandwidth"] * 3]
    assert found["seconds"] == {
        "slow": [3, 8, 2], "fast": [1, 2, 2], "bandwidth": [20, 20, 40]
    }  # fmt: skip
    assert found["ratio"] == 3  # the median of 3, 4, 1, not 3 / 2 of the medians
    assert found["roofline"] == 0.25  # the median of 10 / 20, 10 / 40, 10 / 80


def test_timing(found):
    row = found["timing"]
    assert row["seconds"] == 0.2 and row["milliseconds"] == 200 and row["spread"] == [0.1, 0.5]
    assert row["tokens_per_second"] == pytest.approx(20)


def test_roofline_counts_weights_and_the_part_of_the_cache_in_use(found):
    """The tiny model is tied: its embedding is its head and is read."""
    assert found["weights"] == found["parameters"]
    assert found["read"] == found["weights"] + int((24 + 4 / 2) / 32 * found["held"])
    assert found["full"] == found["weights"] + found["held"]  # never more than all of it


def test_decodes(found):
    assert np.isfinite(found["decoded"]) and found["decoded"] > 0


def test_compile_part(found):
    rows = found["rows"]
    deep = rows["compile the decode loop, 2 layers"]
    assert deep["seconds"] > 0 and deep["ratio_to_6_layers"] > 0
    for name in ("dense", "kivi(bits=4)"):
        row = rows.get(f"decode step at capacity 8192, {name}")
        assert row and row["aliased"] > 0.99 and row["temporaries_mb"] > 0


def test_methods_beside_dense(found):
    rows = [found["rows"][f"{name}, 40 held"] for name in ("dense", "mustafar(window=8)")]
    assert all(row["tokens_per_second"] > 0 and row["of_roofline"] > 0 for row in rows)
    assert rows[1]["speed_of_dense"] > 0
    assert rows[1]["bytes_per_token"] < rows[0]["bytes_per_token"]
    assert rows[0]["bits_per_value"] == pytest.approx(32, rel=0.2)
    assert found["rows"]["rotatekv(reorder=False), 40 held"]["speed_of_dense"] > 0  # reads marks
    assert found["rows"]["kvzip(tokens=16), 40 held"]["speed_of_dense"] > 0  # reads twice


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--only=decode,lng", ("'lng'", "decode, capacity, long, kivi, compile, prefill, methods")),
        ("--methods=snapvk", ("unknown method 'snapvk'", "snapkv")),
        ("--held=2048,20", ("held=['2048', '20']", "more than tokens=32")),
    ],
)
def test_refuses(argument, words, tmp_path):
    command = [sys.executable, "-m", "experiments.benchmark", argument, f"--out={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 1 and "Traceback" not in said
    assert all(word in said for word in words), said
