"""The package as a whole: imports, names, docstrings, the size of files, no traces of a machine."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import kvjax

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [m.name for m in pkgutil.walk_packages(kvjax.__path__, "kvjax.")]
PACKAGES = ["kvjax", *(m.name for m in pkgutil.iter_modules(kvjax.__path__, "kvjax.") if m.ispkg)]
# Homes, roots and work folders of whoever wrote a file; not /tmp, /usr, /proc.
MACHINE = re.compile(
    "|".join(f"(?<![\\w.])/{name}/[\\w.-]" for name in ("home", "root", "Users", "work"))
)


IMPORTS = """
import sys, time
start = time.process_time()
import kvjax
took = time.process_time() - start
loaded = [m for m in ("jax", "flax", "numpy", "tokenizers") if m in sys.modules]
assert not loaded, f"import kvjax loaded {loaded}"
assert took < 1, f"import kvjax took {took:.2f} s"
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "importing started a backend"
heavy = [m for m in ("torch", "transformers", "matplotlib", "huggingface_hub") if m in sys.modules]
assert not heavy, f"importing kvjax loaded {heavy}"
"""


def tracked() -> list[pathlib.Path]:
    """Files of the checkout, new ones included, ignored ones not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for line in run.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_importing_is_lazy_and_starts_no_backend():
    command = [sys.executable, "-c", IMPORTS, *MODULES]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_resolve(name):
    module = importlib.import_module(name)
    names = module.__all__
    assert len(set(names)) == len(names)
    for item in names:
        assert getattr(module, item) is not None
        assert item in dir(module)
    with pytest.raises(AttributeError, match="nonsense"):
        module.nonsense  # noqa: B018


def test_everything_public_is_documented():
    bare = []
    for name in MODULES:
        module = importlib.import_module(name)
        assert module.__doc__, f"{name} does not say what it is"
        for item, value in vars(module).items():
            own = getattr(value, "__module__", None) == name and not item.startswith("_")
            if own and inspect.isfunction(value) and not value.__doc__:
                bare.append(f"{name}.{item}")
    for name in PACKAGES[1:]:
        module = importlib.import_module(name)
        for item in module.__all__:
            value = getattr(module, item)
            text = getattr(value, "__doc__", None) or ""
            if inspect.isclass(value) and text.startswith(f"{item}("):  # made by dataclass
                bare.append(f"{name}.{item}")
    assert not bare, f"without a docstring: {sorted(set(bare))}"


def test_files_are_short():
    """At most 450 lines each; most of the package below 200."""
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked()
        if path.suffix == ".py"
    }
    long = {name: size for name, size in sizes.items() if size > 450}
    assert not long, f"too many lines: {long}"
    package = sorted(size for name, size in sizes.items() if name.startswith("kvjax/"))
    assert package[len(package) // 2] < 200


def test_no_traces_of_a_machine():
    traces = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE.search(line):
                traces.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not traces, traces
