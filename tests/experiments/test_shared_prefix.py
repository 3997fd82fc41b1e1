"""The program that times shared prefixes, on the tiny model, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.experiments.test_distortion import run

PROGRAM = """
import sys
from experiments import shared_prefix as p

class Still:
    measure = lambda self: 1.0

p.Bandwidth = Still
p.main(p.FLAGS(["shared_prefix", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_shared_prefix(tiny, tmp_path):
    run(
        PROGRAM, f"--model={tiny}", f"--out={tmp_path}", "--batch=4", "--shared=64,192",
        "--tokens=2", "--rounds=1",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    at = {row["case"]: row for row in rows}
    each = 2 * 2 * 2 * 8 * 4 + 4  # of a token: two layers, heads of 8; and its position
    for how, sequences in (("shared", 1), ("in every row", 4)):
        short, long = (at[f"batch 4, {n} tokens {how}"] for n in (64, 192))
        # Positions are held once for all heads.
        assert long["cache_bytes"] - short["cache_bytes"] == 128 * sequences * each
        assert short["speed_of_shortest"] == 1 and long["speed_of_shortest"] > 0
        assert min(short["tokens_per_second"], long["tokens_per_second"]) > 0
    assert at["batch 4, 64 tokens in every row"]["shared_speed"] > 0


def test_refuses(tmp_path):
    command = [sys.executable, "-m", "experiments.shared_prefix", "--shared=100"]
    run = subprocess.run(
        [*command, f"--out={tmp_path}"], capture_output=True, text=True, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 1 and "Traceback" not in said
    assert "shared=['100']: expected multiples of 64" in said
    with pytest.raises(FileNotFoundError):
        (tmp_path / "results.json").read_text()
