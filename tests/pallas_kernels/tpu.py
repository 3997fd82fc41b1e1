"""A real TPU's compiler without a TPU: ahead-of-time compilation through libtpu."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies


def device(name: str) -> Any:
    """A described, absent TPU such as "v5e:2x2"; skips where libtpu is not installed."""
    pytest.importorskip("libtpu", reason="the TPU's compiler comes with libtpu")
    if jax.default_backend() == "tpu":
        pytest.skip("a real TPU is here: what it compiles it also runs")
    # Set while libtpu starts, then taken back: in a real job it would hide the TPU.
    before = os.environ.get("TPU_SKIP_MDS_QUERY")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    finally:
        if before is None:
            del os.environ["TPU_SKIP_MDS_QUERY"]
        else:
            os.environ["TPU_SKIP_MDS_QUERY"] = before


def compiled(name: str, function: Any, *args: Any, donate: Any = (), **kwargs: Any) -> Any:
    """`function` compiled for one such TPU, for arguments of these shapes."""
    mesh = jax.sharding.Mesh(np.array([device(name)]), ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.P())
    on = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    args, kwargs = jax.tree.map(on, (args, kwargs))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks for the kind of TPU
        return jax.jit(function, donate_argnums=donate).lower(*args, **kwargs).compile()
