"""Every method has an example (pytest runs them all) and names its source."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import kvjax.compress
from kvjax.compress import METHODS

MODULES = [m.name for m in pkgutil.iter_modules(kvjax.compress.__path__)] + ["share"]


@pytest.mark.parametrize("name", MODULES)
def test_has_an_example(name):
    path = "kvjax.cache.share" if name == "share" else f"kvjax.compress.{name}"
    found = doctest.DocTestFinder().find(importlib.import_module(path))
    assert any(case.examples for case in found) or name == "common"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_docstring_says_what_and_where_from(name):
    text = inspect.getdoc(METHODS[name])
    assert (">>>" in text and "ValueError" in text) or name == "dense"
    for parameter in inspect.signature(METHODS[name]).parameters:
        assert parameter in text, f"{name} does not explain {parameter}"
    assert "arXiv 2" in text or name in ("dense", "rtn", "random_eviction")
