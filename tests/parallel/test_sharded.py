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
KIVI = "kivi(bits=4, group=16, residual=32)"
SNAPKV = "snapkv(tokens=40, window=8)"
ALL = "data=2,tensor=2,context=2"
QUICK = [
    ("dense", ALL, 4),
    (SNAPKV, ALL, 4),
    (KIVI, ALL, 4),
    ("dense", "tensor=2,context=4", 1),
    (KIVI, "context=8", 1),
]
SLOW = [
    *((method, mesh, 4) for method in ("dense", SNAPKV, KIVI)
      for mesh in ("context=8", "data=2,context=4", "data=4,tensor=2", "tensor=4,context=2")),
    ("snapkv(tokens=40, window=8, storage=kivi(bits=4, group=8, residual=16))", ALL, 2),
    ("streaming_llm(tokens=48)", ALL, 2),
    ("h2o(tokens=48)", ALL, 2),
]  # fmt: skip


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
    return simulated(SLOW)


def check(method, mesh, row):
    # Logits of the prompt are of exact keys: float32 sums in another order.
    assert row["prefill"] < 1e-5
    assert row["tokens"] and row["same_tokens"]
    # From one and the same cache.
    assert row["same_logprobs"] < 1e-5
    # From caches filled apart: keys that differ in the last bit may round to another float16 scale
    # (2 ** -11 of it), or to another code.
    assert row["logprobs"] < (1e-4 if "kivi" in method else 1e-5)
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
    method, mesh, _ = SLOW[place]
    row = slow[SLOW[place]]
    if method.startswith(("streaming_llm", "h2o")):
        # Their windows have capacities of their own and may move between devices.
        assert row["tokens"] and row["logprobs"] < 1e-5
    else:
        check(method, mesh, row)
