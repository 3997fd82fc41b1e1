"""Decoding on eight devices gives what one device gives, and moves no cache between them.

The devices are simulated, in a process of its own, so that all other tests keep one.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KIVI = "kivi(bits=4, group=16, residual=16)"
WIDE = "kivi, float32 scales"
SNAPKV = "snapkv(tokens=40, window=8)"
ALL = "data=2,tensor=2,context=2"
QUICK = [
    ("dense", ALL, 4, True),
    (SNAPKV, ALL, 4, False),
    (WIDE, ALL, 4, True),
    ("dense", "tensor=2,context=4", 1, False),
]
MESHES = ("context=8", "data=2,context=4", "data=4,tensor=2", "tensor=4,context=2")
SLOW = [
    *((method, mesh, 4, True) for method in ("dense", SNAPKV, KIVI, WIDE) for mesh in MESHES),
    (SNAPKV, ALL, 4, True),
    (KIVI, ALL, 4, True),
    (KIVI, "context=8", 1, False),
    ("snapkv(tokens=40, window=8, storage=kivi(bits=4, group=8, residual=16))", ALL, 2, True),
    ("streaming_llm(tokens=48)", ALL, 2, True),
    ("h2o(tokens=48)", ALL, 2, True),
]
OTHERS = [("hybrid", ALL), ("hybrid", "data=4,context=2"), ("diffusion", ALL)]


def simulated(cases):
    """One row of figures per case; see `simulated.py`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONWARNINGS": "error",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.parallel.simulated", json.dumps(cases)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return dict(zip(cases, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def quick():
    return simulated(QUICK)


@pytest.fixture(scope="module")
def slow():
    return simulated(SLOW + OTHERS)


def check(method, mesh, row):
    # Compressed on the mesh from the same prompt rows, then decoded there.
    assert row["tokens"] and row["logprobs"] < 1e-5
    if "prefill" in row:
        # The prefill on the mesh as well: its float32 sums go in another order.
        assert row["prefill"] < 1e-5 and row["whole_tokens"]
        # On one device from the very cache that the mesh made: decoding agrees, for every method.
        assert row["copied_logprobs"] < 1e-5
        # Rounding is no continuous function: of keys that differ in their last bits a few scales
        # are rounded to the other of two float16 numbers, 2 ** -11 apart. Measured: 0.02 % of the
        # scales, no code, 4.3e-5 in log-probability; with scales in float32 (WIDE) it is 1e-5.
        assert row["other_codes"] == 0 and row["other_scales"] < 1e-3
        assert row["whole_logprobs"] < (1e-5 if row["other_scales"] == 0 else 1e-4)
        assert row["other_scales"] == 0 or "kivi(" in method
    # No collective is as large as what one device holds of any array of a cache of 4,096 tokens.
    assert row["moved"] < row["smallest"]
    assert row["alias"] >= row["state"] - 1024
    assert ("context" not in mesh) or row["context"] > 0


@pytest.mark.parametrize("place", range(len(QUICK)), ids=lambda i: "-".join(map(str, QUICK[i])))
def test_decoding_is_that_of_one_device(quick, place):
    check(*QUICK[place][:2], quick[QUICK[place]])


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(SLOW)), ids=lambda i: "-".join(map(str, SLOW[i])))
def test_more_meshes_and_methods(slow, place):
    method, mesh, *_ = SLOW[place]
    row = slow[SLOW[place]]
    if method.startswith(("streaming_llm", "h2o")):
        # Their windows have capacities of their own and may move between devices.
        assert row["tokens"] and row["logprobs"] < 1e-5 and row["whole_logprobs"] < 1e-5
    else:
        check(method, mesh, row)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids="-".join)
def test_other_models_and_loops(slow, case):
    """Recurrent state and speculation; masked diffusion with slots by position."""
    row = slow[case]
    assert row["tokens"]
    if case[0] == "hybrid":
        assert row["prefill"] < 1e-5 and row["logprobs"] < 1e-5
        assert row["drafted"] and row["passes"][0] == row["passes"][1]
        assert any("data" in spec for spec in row["split"])
        if "tensor" in case[1]:
            assert all("tensor" in spec for spec in row["split"])
    else:
        assert row["computed"][0] == row["computed"][1]
        assert row["keys"] < 1e-5 and row["context"] > 0
