"""Compiling for a TPU where there is none: the real compiler, through the package libtpu.

    python -m pallas_kernels.aot

prints what the kernels and a decode step need on v5e and v6e, as in docs/kernels.md.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

TPUS = {"v5e": ("v5e:2x2", 819e9), "v6e": ("v6e:2x2", 1640e9)}  # HBM bytes per second
SHAPES = ((1, 8, 4, 32768, 128), (8, 8, 4, 8192, 128), (8, 3, 3, 8192, 64))  # B, H, Hq / H, N, D


def tpu(name: str) -> Any:
    """A described, absent device of a topology such as "v5e:2x2".

    Raises:
      ImportError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for an absent TPU needs `pip install libtpu`")
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


def compile_for(name: str, function: Callable, *args: Any, donate: Any = ()) -> Any:
    """`function` compiled for one device of a topology, for arguments of these shapes.

    Args:
      args: pytrees of arrays or `jax.ShapeDtypeStruct`. donate: numbers of donated ones.
    """
    mesh = jax.sharding.Mesh(np.array([tpu(name)]), ("x",))
    here = jax.sharding.NamedSharding(mesh, jax.P())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks for the kind of TPU
        return jax.jit(function, donate_argnums=donate).lower(*args).compile()


def table() -> str:
    """Markdown: per kernel and shape what one call reads at best, and what the compiler says."""
    from kvjax.codecs import quantize
    from pallas_kernels import decode_attention, quantized_decode_attention

    spec = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    rows = [
        "| TPU | stored in | B, H, Hq/H, N, D | bytes of a layer | at best | XLA says | other |",
        "|---|---|---|---|---|---|---|",
    ]
    for chip, (name, speed) in TPUS.items():
        for batch, heads, each, slots, width in SHAPES:
            for bits in (16, 4, 2):
                lead = (4, batch, heads)
                q = spec("bfloat16", batch, heads * each, 1, width)
                small = (spec("int32", 1, batch, 1, slots), spec("int32"), spec("int32", batch))
                if bits == 16:
                    k = v = spec("bfloat16", *lead, slots, width)
                    run = lambda q, k, v, pos, layer, used: decode_attention(  # noqa: E731
                        q, k, v, pos, layer, used=used, implementation="tpu"
                    )
                else:
                    k, v = (
                        quantize(bits, axis, 32, scale_dtype="bfloat16").code_spec(
                            lead, slots, width
                        )
                        for axis in ("channel", "token")
                    )
                    run = lambda q, k, v, pos, layer, used, bits=bits: quantized_decode_attention(  # noqa: E731
                        q, k, v, pos, layer, used=used, k_bits=bits, v_bits=bits,
                        implementation="tpu",
                    )  # fmt: skip
                program = compile_for(name, run, q, k, v, *small)
                read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((k, v))) // 4
                read += 4 * batch * slots
                said = program.cost_analysis().get("optimal_seconds", float("nan"))
                temporary = program.memory_analysis().temp_size_in_bytes
                what = "bfloat16" if bits == 16 else f"{bits} bits"
                rows.append(
                    f"| {chip} | {what} | {batch}, {heads}, {each}, {slots:,}, {width} "
                    f"| {read:,} | {read / speed * 1e6:.0f} us "
                    f"| {'-' if said < 0 else f'{said * 1e6:.0f} us'} | {temporary:,} |"
                )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
