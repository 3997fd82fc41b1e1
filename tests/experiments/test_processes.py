"""The main job over two real processes, and over eight devices, against one."""

import json

import pytest

from tests.launch.test_launch import local, python

SMALL = [
    "--context=64", "--continuation=16", "--offsets=10,400", "--needles=2",
    "--needle_lengths=160", "--needle_modes=aware", "--rounds=1",
    "--methods=dense; kivi(bits=4, group=8, residual=16)",
]  # fmt: skip


@pytest.mark.slow
def test_the_main_job_over_two_processes(tiny, tmp_path):
    """The rows are split over the processes, the figures are those of one, and one writes."""
    arguments = [f"--model={tiny}", f"--text={tiny / 'text.txt'}", *SMALL]
    one = python("-m", "experiments.compress", *arguments, f"--out={tmp_path / 'one'}")
    two = local("-m", "experiments.compress", *arguments, f"--out={tmp_path / 'two'}")
    mesh = python(
        "-m", "experiments.compress", *arguments, "--mesh=data=2,tensor=2,context=2",
        f"--out={tmp_path / 'mesh'}", JAX_NUM_CPU_DEVICES="8",
    )  # fmt: skip
    assert mesh.returncode == 0, mesh.stderr
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stdout + two.stderr
    found = [
        json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two", "mesh")
    ]
    assert [f["environment"]["processes"] for f in found] == [1, 2, 1]
    assert found[1]["settings"].pop("mesh") == "data=2"
    assert found[0]["settings"] == found[1]["settings"]
    for a, b, c in zip(*(f["rows"] for f in found), strict=True):
        assert a["method"] == b["method"] == c["method"]
        assert not b.get("error") and not c.get("error")
        for name in ("nll", "kl"):
            assert abs(a[name] - b[name]) < 1e-4 and abs(a[name] - c[name]) < 1e-3
        for name in ("cache_bytes", "needle_accuracy", "bits_per_value"):
            assert a[name] == b[name]
    written = [line for line in two.stdout.splitlines() if "wrote " in line or "ppl" in line]
    assert len(written) == 4 and all(line.startswith("[0]") for line in written)
    # Started again: nothing is left to do, and all processes know it.
    again = local("-m", "experiments.compress", *arguments, f"--out={tmp_path / 'two'}")
    assert again.returncode == 0, again.stdout + again.stderr
