"""The python blocks of the documents run, in order, each document in one namespace.

Where a block asks for a model by name it gets a tiny random one. A block right after the comment
`<!-- no-run -->` is not run.
"""

from __future__ import annotations

import pathlib
import re
import sys
import types

import jax
import pytest

from kvjax.evaluate import language_reference
from kvjax.models import Config, loading
from kvjax.models.llama import init
from tests.experiments.conftest import tiny_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
FOUND = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [str(path.relative_to(ROOT)) for path in FOUND if path.exists()]
BLOCK = re.compile(r"^(<!-- no-run -->\n+)?```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def blocks(text: str) -> list[tuple[int, str]]:
    """(lines before it, source) of every python block to be run."""
    return [
        (text[: found.start(3)].count("\n"), found[3])
        for found in BLOCK.finditer(text)
        if found[2] == "python" and not found[1]
    ]


def test_blocks_are_found():
    piece = "```{}\n{}\n```\n"
    run, other = piece.format("python", "x"), piece.format("sh", "y")
    text = "a\n" + run + "<!-- no-run -->\n" + run + other + "\n" + run
    assert blocks(text) == [(2, "x\n"), (13, "x\n")]


@pytest.fixture(scope="module")
def tiny():
    text = language_reference()[:12000]
    tokenizer = tiny_tokenizer(text)
    tokenizer.template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config = Config(len(tokenizer), 32, 64, 2, 4, 2, 32, eos=(0,))
    return init(config, jax.random.key(0)), tokenizer


@pytest.mark.parametrize("name", DOCUMENTS)
def test_python_blocks_run(name, tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: tiny)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    for before, source in blocks((ROOT / name).read_text(encoding="utf-8")):
        # Empty lines in front: a traceback names the line of the document.
        code = compile("\n" * before + source, str(ROOT / name), "exec", dont_inherit=True)
        exec(code, vars(module))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{name} links to {target}"


def test_the_example_of_the_package_runs(tiny, monkeypatch):
    """The indented example in the docstring of kvjax itself."""
    import kvjax

    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: tiny)
    lines = [line[4:] for line in kvjax.__doc__.splitlines() if line.startswith("    ")]
    space: dict = {}
    exec("\n".join(lines), space)
    assert isinstance(space["texts"][0], str)
