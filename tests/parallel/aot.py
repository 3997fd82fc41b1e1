"""Compiles the decode step of a Llama-3.1-70B-shaped model for TPUs that are not there.

    python -m tests.parallel.aot

One row, 131,072 tokens, bfloat16, on v5e:4x4 (16 chips of 16 GB): the real XLA compiler for TPU
(the PyPI package libtpu), shapes only. Prints what each chip holds as JSON.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time

# Without a TPU: libtpu must not ask a metadata server for one.
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from kvjax.compress import parse
from kvjax.models import Config, llama
from kvjax.models.config import RopeConfig
from kvjax.parallel import Layout, make_mesh, parameter_sharding
from tests.parallel.simulated import compiled_step, moved, shard_sizes

ROPE = RopeConfig(5e5, "llama3", factor=8.0, original_length=8192, low_freq=1.0, high_freq=4.0)
LLAMA_70B = Config(
    128256, 8192, 28672, layers=80, heads=64, kv_heads=8, head_dim=128, rope=ROPE, tied=False,
    max_length=131072,
)  # fmt: skip


def weights(layout: Layout) -> int:
    """Bytes of weights that each chip holds."""
    where = parameter_sharding(layout.mesh, layout.rules).all(LLAMA_70B)
    shapes = llama.parameters(LLAMA_70B)
    return 2 * sum(math.prod(s.shard_shape(shapes[name][0])) for name, s in where.items())


def main(method: str = "dense", mesh: str = "tensor=8,context=2") -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
    layout = Layout(make_mesh(mesh, devices))
    begin = time.perf_counter()
    compiled, moving = compiled_step(
        LLAMA_70B, dict(parse(method))[method], layout, 1, jnp.bfloat16, 131072, 512
    )
    memory, sizes = compiled.memory_analysis(), shard_sizes(moving)
    hlo = compiled.as_text()
    print(
        json.dumps(
            {
                "method": method,
                "mesh": mesh,
                "seconds": time.perf_counter() - begin,
                "arguments": memory.argument_size_in_bytes,
                "weights": weights(layout),
                "largest": max(
                    n * x.dtype.itemsize for n, x in zip(sizes, jax.tree.leaves(moving))
                ),
                "temporaries": memory.temp_size_in_bytes,
                "alias": memory.alias_size_in_bytes,
                "state": sum(n * x.dtype.itemsize for n, x in zip(sizes, jax.tree.leaves(moving))),
                "collectives": len(moved(hlo)),
                "moved": max(n for _, n in moved(hlo)),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
