"""The distortion program and the calibration program on a tiny model."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver

from kvjax.codecs import quantize
from kvjax.compress import parse

SMALL = ("--tokens=128", "--offset=10")


def start(module, *arguments):
    """The program as from a command line, in this process."""
    argv = [module.__name__.rsplit(".", 1)[1], *map(str, arguments)]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        for flag in module.FLAGS.get_flags_for_module(module):
            flag.unparse()
        module.main(module.FLAGS(argv))


@pytest.fixture(scope="module")
def calibrated(tiny, tmp_path_factory):
    from experiments import calibrate

    out = tmp_path_factory.mktemp("calibration")
    how = (f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={out}", "--offset=100",
           "--samples=4", "--tokens=32")  # fmt: skip
    start(calibrate, *how, "--methods=kvquant(bits=2); rotatekv")
    return out, how


def test_calibration_leaves_complete_folders(calibrated, tiny, capsys):
    from experiments import calibrate

    out, how = calibrated
    found = sorted(path.name for path in out.iterdir())
    assert len(found) == 2 and found[0].startswith("kvquant-bits=2-tiny")
    about = json.loads((out / found[0] / "calibration.json").read_text())
    assert about["method"] == "kvquant(bits=2)" and about["samples"] == 4
    before = (out / found[0] / "calibration.json").stat().st_mtime_ns
    start(calibrate, *how, "--methods=kvquant(bits=2)")  # is there already
    assert (out / found[0] / "calibration.json").stat().st_mtime_ns == before
    with pytest.raises(app.UsageError, match="unknown method 'rtn'"):
        start(calibrate, *how, "--methods=rtn")


def test_an_interrupted_calibration_starts_again(calibrated, tiny, tmp_path, monkeypatch):
    from experiments import calibrate
    from kvjax.calibrate import rotatekv

    _, how = calibrated
    how = (*how, f"--out={tmp_path}")

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[rotatekv.__module__], "_sum", cut)
        with pytest.raises(KeyboardInterrupt):
            start(calibrate, *how, "--methods=rotatekv")
    assert not list(tmp_path.glob("*/calibration.json"))
    start(calibrate, *how, "--methods=rotatekv")
    assert len(list(tmp_path.glob("*/calibration.json"))) == 1


def test_compress_finds_constants_or_says_how_to_make_them(calibrated, tiny, tmp_path):
    from experiments import compress

    out, _ = calibrated
    how = (f"--model={tiny}", f"--text={tiny}/text.txt", "--context=64", "--continuation=16",
           "--offsets=10", "--needles=0", "--rounds=1")  # fmt: skip
    start(
        compress, *how, f"--out={tmp_path}", f"--calibration={out}",
        "--methods=kvquant(bits=2); rotatekv",
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["dense", "kvquant(bits=2)", "rotatekv"]
    assert not any(r.get("error") for r in rows)
    assert rows[1]["bits_per_value"] < 16 and rows[1]["kl"] > 0
    with pytest.raises(app.UsageError, match=r"experiments.calibrate --methods='kvquant"):
        start(compress, *how, f"--out={tmp_path}/b", f"--calibration={out}", "--methods=kvquant")


def test_distortion(calibrated, tiny, tmp_path):
    from experiments import distortion

    out, _ = calibrated
    start(
        distortion, f"--model={tiny}", f"--text={tiny}/text.txt", f"--out={tmp_path}",
        f"--calibration={out}", *SMALL,
    )  # fmt: skip
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (tmp_path / "distortion.png").stat().st_size > 10_000
    assert {r["source"] for r in rows} == set(distortion.SOURCES)
    at = {(r["quantiser"], r["source"]): r for r in rows}
    for row in rows:
        assert row["bound"] == pytest.approx(4.0 ** -row["bits"])
        far = row["gap"] > row["best_gap"] + distortion.FAR
        assert bool(row["reason"]) == far  # whatever is far above has a reason beside it
        if row["source"] == "gaussian":  # nothing beats the limit, up to the draw
            assert row["error"] > 0.9 * row["bound"]
    assert at["affine, per token, 4 bits", "gaussian"]["bits"] == quantize(4).bits(8)
    assert at["kvquant(bits=2)", "values"]["error"] < 1


def test_errors_are_in_units_of_each_heads_mean_square():
    from experiments import distortion

    x = np.random.default_rng(0).standard_normal((2, 1, 2, 128, 8)).astype(np.float32)
    scaled = x * np.float32([1, 100])[:, None, None, None, None]
    codec, names = distortion.codec_of(quantize(4), "values")
    assert names == ()
    a, b = (float(distortion.measure(codec, jnp.asarray(y), None)[0]) for y in (x, scaled))
    assert a == pytest.approx(b, rel=1e-3)
    kivi = parse("kivi(bits=2)")[0][1].stages[0].codec
    assert distortion.codec_of("kivi(bits=2)", "values")[0] == kivi.v
    assert distortion.codec_of("kivi(bits=2)", "keys after rope")[0] == kivi.k
