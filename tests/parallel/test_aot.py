"""The decode step of a 70B model at 131,072 tokens compiles for sixteen TPU chips and fits them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install libtpu",
    ),
]


@pytest.mark.parametrize("method", ["dense", "kivi(bits=4, residual=128)"])
def test_decode_step_of_70b_for_v5e_4x4(method):
    run = subprocess.run(
        [sys.executable, "-m", "tests.parallel.aot", method],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},  # libtpu knows not all
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    row = json.loads(run.stdout.splitlines()[-1])
    print(row)
    # Nothing large is replicated: keys' and values' weights alone are whole along context.
    assert row["weights"] < 1.02 * 70.55e9 * 2 / 16
    assert row["arguments"] < row["weights"] + row["state"] + 2**20
    assert row["arguments"] + row["temporaries"] < 12e9  # of 16 GB
    # Nothing of an exact cache is copied; of a packed one the codes of keys or values are, once in
    # a step (docs/kernels.md says which).
    copied = 0 if method == "dense" else row["largest"]
    assert row["temporaries"] < copied + 2**24
    assert row["alias"] >= row["state"] - 2**16
    # The largest collective is of one row of activations or logits, not of a cache.
    assert row["moved"] <= 128256
