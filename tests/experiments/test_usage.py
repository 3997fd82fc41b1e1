"""What the main job refuses: at once, naming argument, value and what is allowed."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from absl import app, flags

from experiments import compress, exact
from tests.experiments.conftest import SMALL, given, results, start

# ml_collections reads config files in a way that Python means to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def no_forward(monkeypatch):
    """Any forward pass is a failure that nothing catches."""

    def compiled(*args, **kwargs):
        raise SystemError("a forward pass was reached")

    monkeypatch.setattr(exact, "_forward", compiled)
    monkeypatch.setattr(exact, "forward", compiled)
    monkeypatch.setattr(exact, "_commit", compiled)


CASES = {
    "keep too large": (["--methods=snapkv(keep=2)"], ["keep=2", "(0, 1]"]),
    "bits too many": (["--methods=kivi(bits=9)"], ["bits=9", "1 to 8"]),
    "group and head": (["--methods=rtn(bits=4, group=6)"], ["rtn", "group is 6", "head size, 8"]),
    "group and residual": (["--methods=kivi(group=24)"], ["group=24", "residual=128"]),
    "below the window": (["--methods=snapkv(tokens=8)"], ["tokens=8", "at least 32"]),
    "part below the window": (["--methods=snapkv(keep=0.25)"], ["keep=0.25", "64", "always keeps"]),
    "unknown method": (["--methods=dense; snapvk"], ["'snapvk'", "snapkv", "character 8"]),
    "unknown argument": (["--methods=snapkv(kep=0.5)"], ["'kep'", "keep", "window"]),
    "syntax": (["--methods=snapkv(keep=0.5"], ["snapkv(keep=0.5", "character"]),
    "no method": (["--methods= ; "], ["methods", "dense"]),
    "wrong type": (["--methods=snapkv(keep='a')"], ["keep='a'", "(0, 1]"]),
    "needle mode": (["--needle_modes=aware,blind"], ["blind", "needle_modes", "agnostic"]),
    "no needle mode": (["--needle_modes="], ["needle_modes", "aware"]),
    "offset beyond the text": (["--offsets=10,99999"], ["offset 99999", "largest possible"]),
    "offset is no number": (["--offsets=10,ten"], ["offsets", "'ten'", "integer"]),
    "negative offset": (["--offsets=-1"], ["offset -1", "largest possible"]),
    "no offset": (["--offsets="], ["offsets", "at least one"]),
    "needle length is no number": (["--needle_lengths=1k"], ["needle_lengths", "'1k'", "integer"]),
    "needle longer than its prompt": (["--needle_lengths=20"], ["needle length 20", "alone has"]),
    "text too short for needles": (["--needle_lengths=9000"], ["9000", "twice as many"]),
    "method and needle length": (
        ["--context=512", "--methods=snapkv(keep=0.125)"], ["keep=0.125", "prompt of 211"],
    ),
    "no such text": (["--text=nowhere.txt"], ["nowhere.txt", "no such file"]),
    "no such config": (["--config=nowhere.py"], ["nowhere.py"]),
    "out is a file": (["--out=pyproject.toml"], ["out='pyproject.toml'", "File exists"]),
    "no such model": (["--model=nowhere"], ["nowhere", "smollm2-135m"]),
    "dtype": (["--dtype=float33"], ["dtype", "float33", "float32"]),
    "dtype of integers": (["--dtype=int8"], ["dtype", "int8", "float32"]),
    "context": (["--context=3"], ["context", "3", "64"]),
    "unexpected argument": (["dense"], ["dense"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_refused_before_anything_is_compiled(name, tiny, tmp_path, no_forward):
    arguments, said = CASES[name]
    with pytest.raises((app.UsageError, flags.Error)) as error:
        start(*given(tiny, tmp_path / "out", *arguments))
    for part in said:
        assert part in str(error.value), f"{part!r} is missing from: {error.value}"
    assert not (tmp_path / "out" / "results.json").exists()


def test_refuses_other_settings(tiny, finished, tmp_path, no_forward):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    before = results(out)
    with pytest.raises(app.UsageError, match=r"other settings.*continuation.*choose another --out"):
        start(*given(tiny, out, "--continuation=17"))
    assert results(out) == before


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"settings": 1, "rows": 2}'])
def test_refuses_what_is_no_results_file(tiny, tmp_path, no_forward, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(app.UsageError, match="not a results file"):
        start(*given(tiny, tmp_path))
    assert (tmp_path / "results.json").read_text() == text


def test_refuses_a_file_as_folder(tiny, tmp_path, no_forward):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(app.UsageError, match="out"):
        start(*given(tiny, file))


class Stop(Exception):
    """Carries the settings out of the program."""


@pytest.fixture
def asked(monkeypatch):
    """Runs the program up to the settings and returns (settings, labels)."""

    def stop(settings, methods, todo, results, *more):
        raise Stop(settings, [label for label, _ in methods])

    monkeypatch.setattr(compress, "run", stop)

    def run(*arguments: str):
        with pytest.raises(Stop) as found:
            start(*arguments)
        return found.value.args

    return run


def config_file(folder, **values):
    path = folder / "config.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({values!r})\n"
    )
    return f"--config={path}"


def test_config_is_used_and_flags_win(tmp_path, asked):
    config = config_file(
        tmp_path, context=96, offsets=["1", "2"], methods="kivi", out=str(tmp_path / "o"), rounds=2
    )
    settings, labels = asked(config, "--rounds=7")
    assert settings["context"] == 96 and settings["offsets"] == [1, 2] and settings["rounds"] == 7
    assert settings["continuation"] == 256  # the default
    assert labels == ["dense", "kivi"]
    assert (tmp_path / "o").is_dir()
    settings, labels = asked(config, "--methods=rtn", "--context=64", f"--out={tmp_path / 'p'}")
    assert settings["context"] == 64 and labels == ["dense", "rtn"]


def test_config_value_can_be_set_from_the_command_line(tmp_path, asked):
    settings, _ = asked(config_file(tmp_path, context=96, out=str(tmp_path)), "--config.context=80")
    assert settings["context"] == 80


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"contxt": 96}, "contxt.*context"),
        ({"context": 3}, "context.*3.*64"),
        ({"offsets": "7, x"}, "offsets.*'x'.*integer"),
        ({"dtype": "int4"}, "dtype.*int4.*bfloat16"),
        ({"needles": -1}, "needles.*-1"),
        ({"rounds": "many"}, "rounds.*many"),
    ],
)
def test_config_is_checked(tmp_path, no_forward, values, said):
    with pytest.raises((app.UsageError, flags.Error), match=said):
        start(config_file(tmp_path, **values), f"--out={tmp_path}")


def test_demo_config_is_valid(asked, tmp_path):
    settings, labels = asked("--config=configs/demo.py", f"--out={tmp_path}")
    assert settings["context"] == 768 and len(labels) >= 12


def test_methods_given_twice_run_once(asked, tmp_path):
    _, labels = asked(f"--out={tmp_path}", "--methods=kivi; dense; kivi; rtn(bits=4); rtn( bits=4)")
    assert labels == ["dense", "kivi", "rtn(bits=4)"]


def test_from_a_command_line(tiny, tmp_path):
    """The whole program in a process of its own: status 1, the message, no traceback."""
    command = [sys.executable, "-m", "experiments.compress", *SMALL, f"--out={tmp_path}"]
    command += ["--methods=kivi(bits=9)"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    said = run.stdout + run.stderr
    assert run.returncode == 1 and "bits=9" in said and "Traceback" not in said
