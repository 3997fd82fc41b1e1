"""The quick suite draws the same hypothesis examples every time; `make test-all` draws new ones."""

import gc
import os
import subprocess
import sys

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("quick", derandomize=True)
hypothesis.settings.register_profile("all", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("KVJAX_HYPOTHESIS", "quick"))

# Most programs run a few times: optimising them costs more than running them. Here, and in programs
# that tests start.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
PLAINLY = "--xla_cpu_use_fusion_emitters=false"  # takes a third of the time away


def pytest_configure():
    """Before XLA reads its flags; workers have them from the process that starts them."""
    flags = os.environ.get("XLA_FLAGS", "")
    if PLAINLY not in flags:
        environment = {**os.environ, "XLA_FLAGS": f"{flags} {PLAINLY}", "JAX_PLATFORMS": "cpu"}
        start = [sys.executable, "-c", "import jax; jax.devices()"]  # dies of a flag unknown to it
        if subprocess.run(start, env=environment, capture_output=True, check=False).returncode == 0:
            os.environ["XLA_FLAGS"] = environment["XLA_FLAGS"]


@pytest.fixture
def compile_fully():
    """For what is about the compiled program itself, and for real models."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Every program compiled for the CPU holds several memory mappings, and a process may hold
    some 65,000 (vm.max_map_count); past that XLA crashes. So a module's programs go with it."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file of tests runs in one process; all kernels in one: a TPU compiler serves no second."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            kernels = nodeid.startswith("tests/pallas_kernels/")
            return "tests/pallas_kernels" if kernels else super()._split_scope(nodeid)

    return Scheduling(config, log)
