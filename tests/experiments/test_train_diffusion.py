"""The training program: a run cut off and started again ends as the uninterrupted one."""

import json
import sys

import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver

from kvjax.data.list_operations import MASK
from kvjax.models import load

SMALL = (
    "--layers=1", "--width=16", "--heads=2", "--mlp_width=16", "--steps=5", "--warmup=2",
    "--batch=4", "--examples=3", "--report_every=2", "--evaluate_every=3", "--checkpoint_every=2",
    "--operations=copy,shuffle", "--min_items=3", "--max_items=4", "--items=4",
    "--tokens_per_step=1,4",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _flags():
    """Two programs define flags of the same name: those of the other are set aside."""
    held = [
        (flag, module)
        for name, found in list(flags.FLAGS.flags_by_module_dict().items())
        if name.startswith("experiments.") and (module := sys.modules.get(name))
        for flag in list(found)
    ]
    for flag, _ in held:
        delattr(flags.FLAGS, flag.name)
    from experiments import train_diffusion as program

    yield
    for flag in flags.FLAGS.get_flags_for_module(program):
        delattr(flags.FLAGS, flag.name)
    del sys.modules[program.__name__]
    for flag, module in held:
        flags.FLAGS[flag.name] = flag
        flags.FLAGS.register_flag_by_module(module.__name__, flag)
        flags.FLAGS.register_flag_by_module_id(id(module), flag)


def begin(*arguments):
    from experiments import train_diffusion as program

    argv = ["train_diffusion", *arguments]
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        for flag in program.FLAGS.get_flags_for_module(program):
            flag.unparse()
        program.main(program.FLAGS(argv))


def rows_of(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {r["row"]: {k: v for k, v in r.items() if k != "seconds"} for r in rows}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    begin(*SMALL, f"--out={out}")
    return out


def test_what_a_run_leaves(finished):
    rows = rows_of(finished)
    assert [n for n in rows if n.startswith("training step")] == [
        f"training step {n}" for n in (2, 4, 5)
    ]
    assert {n: rows[n]["step"] for n in rows if n.startswith("after")} == {
        "after 3": 3,
        "after 5": 5,
    }
    for way in ("greedy", "drawn", "perfect model, drawn"):
        for number in (1, 4):
            row = rows[f"{way}, {number} per step"]
            assert all(0 <= row[name] <= 1 for name in ("copy", "shuffle"))
    assert rows["perfect model, drawn, 4 per step"]["shuffle"] == pytest.approx(24 / 256)
    model, tokenizer = load(finished / "model")
    assert model.config.mask_token == MASK and model.config.bidirectional
    assert tokenizer.encode("copy _ a b =") == [4, 2, 9, 10, 3]
    assert (finished / "training.png").stat().st_size > 5000


def test_a_run_cut_off_goes_on_bit_for_bit(finished, tmp_path):
    from experiments import train_diffusion as program

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(program, "accuracy", _interrupt)  # at the evaluation after step 3
        begin(*SMALL, f"--out={tmp_path}")
    assert not (tmp_path / "model").exists()
    begin(*SMALL, f"--out={tmp_path}")
    whole, resumed = load(finished / "model")[0], load(tmp_path / "model")[0]
    np.testing.assert_array_equal(whole.embed[...], resumed.embed[...])
    np.testing.assert_array_equal(whole.layers.down[...], resumed.layers.down[...])
    assert rows_of(finished) == rows_of(tmp_path)


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_finished_run_is_left_as_it_is(finished):
    before = rows_of(finished)
    model = (finished / "model" / "model.safetensors").read_bytes()
    begin(*SMALL, f"--out={finished}")
    assert rows_of(finished) == before
    assert (finished / "model" / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--operations=copy,turn",), "turn"),
        (("--width=20", "--heads=3"), "width=20, heads=3"),
        (("--tokens_per_step=0",), "tokens_per_step"),
        (("--items=9",), "slots=4"),
        (("--seed=7",), "other settings.*seed"),
    ],
)
def test_refused_before_anything_is_compiled(finished, flags, message):
    with pytest.raises(app.UsageError, match=message):
        begin(*SMALL, f"--out={finished}", *flags)
