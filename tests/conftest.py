"""The quick suite draws the same hypothesis examples every time; `make test-all` draws new ones."""

import gc
import os

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("quick", derandomize=True)
hypothesis.settings.register_profile("all", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("KVJAX_HYPOTHESIS", "quick"))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Every program compiled for the CPU holds several memory mappings, and a process may hold
    some 65,000 (vm.max_map_count); past that XLA crashes. So a module's programs go with it."""
    yield
    jax.clear_caches()
    gc.collect()
