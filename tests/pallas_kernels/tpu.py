"""A real TPU's compiler without a TPU, where libtpu is installed."""

from __future__ import annotations

from typing import Any

import jax
import pytest

from pallas_kernels.aot import compile_for


def compiled(name: str, function: Any, *args: Any, donate: Any = ()) -> Any:
    """`compile_for`; skips, saying why, where it cannot be."""
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with libtpu")
    if jax.default_backend() == "tpu":
        pytest.skip("a real TPU is here: what it compiles it also runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)  # libtpu dies of those of the CPU
        return compile_for(name, function, *args, donate=donate)
