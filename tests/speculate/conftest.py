import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def compile_plainly():
    """These programs run a few steps each: optimising them costs more than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
