"""The diffusion loop compiled plainly: its programs run once or twice each."""

import pytest

from kvjax.diffusion import loop
from tests.compress.harness import quick_jit


@pytest.fixture(scope="package", autouse=True)
def _compile_quickly():
    quick = quick_jit(loop._denoise.__wrapped__, static_argnames=loop._static)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_denoise", quick)
        yield
