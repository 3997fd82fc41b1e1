"""The kernels and the decode step around them, compiled for TPUs and lowered for CUDA.

What compiles need not be fast; that no array of the cache is copied is checked here.
"""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from kvjax.cache import Window, chain, commit, first, init_cache, nbytes, recent, store
from kvjax.codecs import per_kv, quantize
from kvjax.models import Config, forward, llama
from pallas_kernels import decode_attention, quantized_decode_attention
from tests.pallas_kernels.cases import Case
from tests.pallas_kernels.tpu import compiled

EXACT = {
    "head size 64": Case(4, 2, 3, 3, 1, 8192, 64),
    "head size 128, bfloat16": Case(
        4, 1, 8, 4, 2, 4096, 128, dtype="bfloat16", window=99, bias=True
    ),
    "head size 80, ragged": Case(4, 2, 4, 4, 1, 1000, 80, dtype="bfloat16", softcap=30.0),
}
EXACT_MORE = {
    "head size 96, a few slots": Case(2, 1, 2, 2, 1, 100, 96),
    "head size 256": Case(4, 2, 8, 1, 2, 4096, 256),
    "16 heads, each its own tokens": Case(2, 2, 16, 1, 4, 2048, 128, per_head=True, bias=True),
    "head size 8": Case(2, 1, 2, 2, 1, 40, 8),
    "12 heads": Case(2, 1, 12, 2, 8, 777, 64, dtype="bfloat16", per_head=True, window=50),
}
CODED = {
    "2 bits": Case(4, 1, 8, 4, 1, 8192, 128, dtype="bfloat16", bits=(2, 2), scales="bfloat16"),
    "4 bits, head size 64": Case(4, 2, 3, 3, 1, 4096, 64, bias=True, window=99),
    "8 bits, head size 80": Case(2, 2, 4, 4, 1, 960, 80, bits=(8, 8), groups=(16, 16)),
}
CODED_MORE = {
    "2 bits, head size 96": Case(2, 1, 2, 2, 1, 96, 96, bits=(2, 2)),
    "4 bits, head size 256": Case(4, 2, 8, 1, 2, 4096, 256, groups=(64, 64), scales="float32"),
    "8 bits, values by rows": Case(2, 1, 2, 2, 8, 2048, 128, bits=(8, 8), groups=(128, 128)),
    "2 bits, head size 80": Case(2, 1, 2, 4, 1, 1024, 80, bits=(2, 2), groups=(64, 16)),
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
TPUS = ["v5e:2x2", "v6e:2x2"]
pytestmark = pytest.mark.usefixtures("compile_fully")


def arguments(case, packed):
    """Shapes of the arguments of a kernel."""
    spec = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    lead = (case.layers, case.batch, case.heads)
    lens = lead if case.per_head else (1, case.batch, 1)
    k = v = spec(case.dtype, *lead, case.slots, case.width)
    if packed:
        (kb, vb), (g, gv), scales = case.bits, case.groups, case.scales
        k = quantize(kb, "channel", g, scale_dtype=scales).code_spec(lead, case.slots, case.width)
        v = quantize(vb, "token", gv, scale_dtype=scales).code_spec(lead, case.slots, case.width)
    given = {
        "q": spec(case.dtype, case.batch, case.heads * case.queries, case.tokens, case.width),
        "k": k, "v": v, "pos": spec("int32", *lens, case.slots),
        "layer": spec("int32"), "used": spec("int32", case.batch),
    }  # fmt: skip
    if case.window is not None:
        given |= {"q_pos": spec("int32", case.batch, case.tokens), "span": spec("int32")}
    if case.bias:
        given["bias"] = spec("float32", *lead, case.slots)
    return given


def call(case, packed, implementation):
    """The kernel as a function of its arrays."""

    def run(given):
        how = {"softcap": case.softcap, "implementation": implementation}
        if not packed:
            return decode_attention(**given, **how)
        bits = {"k_bits": case.bits[0], "v_bits": case.bits[1]}
        return quantized_decode_attention(**given, **bits, **how)

    return run


def copies(hlo, sizes):
    """Instructions outside of fusions that copy or reorder an array of one of these sizes."""
    fusions = set(re.findall(r" fusion\(.* calls=%?([\w.-]+)", hlo))
    found, inside = [], ""
    for line in hlo.splitlines():
        if line and not line.startswith(" "):
            inside = line.removeprefix("ENTRY ").lstrip("%").split(" ")[0]
        match = re.search(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|transpose)\(", line)
        if match and inside not in fusions and math.prod(map(int, match[1].split(","))) in sizes:
            found.append(line.strip()[:120])
    return found


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("name", [*EXACT, *map(slow, EXACT_MORE)])
def test_exact_compiles_for_tpus_and_copies_nothing(name, tpu):
    case = {**EXACT, **EXACT_MORE}[name]
    given = arguments(case, packed=False)
    program = compiled(tpu, call(case, False, "tpu"), given)
    assert "tpu_custom_call" in program.as_text()
    if case.slots >= 1000:  # XLA may move arrays of a few kilobytes as it likes
        assert not copies(program.as_text(), {given["k"].size})
        assert program.memory_analysis().temp_size_in_bytes < given["k"].size // 8


@pytest.mark.parametrize("tpu", TPUS)
@pytest.mark.parametrize("name", [*CODED, *map(slow, CODED_MORE)])
def test_coded_compiles_for_tpus(name, tpu):
    case = {**CODED, **CODED_MORE}[name]
    given = arguments(case, packed=True)
    program = compiled(tpu, call(case, True, "tpu"), given)
    assert "tpu_custom_call" in program.as_text()
    if case.width % 128 == 0 and case.scales != "float16":
        codes = {given[side]["codes"].size for side in "kv"}
        assert not copies(program.as_text(), codes)
        assert program.memory_analysis().temp_size_in_bytes < min(codes) // 8


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
def test_lowers_for_cuda(packed, which):
    cases = CODED if packed else EXACT
    if which == "all":
        cases = CODED_MORE if packed else EXACT_MORE
    for case in cases.values():
        traced = jax.jit(call(case, packed, "gpu")).trace(arguments(case, packed))
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_libtpu_without_a_tpu_leaves_the_cpu():
    """Nobody who installs it for its compiler is hindered, nor warned by Python."""
    if importlib.util.find_spec("libtpu") is None or jax.default_backend() != "cpu":
        pytest.skip("for machines with libtpu and without an accelerator")
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import jax; print(jax.devices()[0].platform)"],
        env={k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout.strip()) == (0, "cpu"), found.stderr[-2000:]


# --- the whole decode step ----------------------------------------------------------------------

CAPACITY = 4096
two = {"scale_dtype": "bfloat16"}
CODEC = per_kv(k=quantize(2, "channel", 32, **two), v=quantize(2, "token", 32, **two))
STEPS = {
    "dense, head size 64": (64, chain(store())),
    "dense, head size 128": (128, chain(store())),
    "sinks and a window": (64, chain(first(4), recent(CAPACITY - 4))),
    "packed": (128, chain(store(CODEC, keys=Window(0, 128), values=Window(128, 1)))),
}


def step(model, moving, rest, token):
    cache = rest.replace(state=moving[0], length=moving[1])
    out, new = forward(model, token, cache.length[:, None], cache)
    cache = commit(cache, new)
    return out, (cache.state, cache.length)


COPIES = pytest.mark.xfail(
    strict=True, reason="docs/kernels.md: codes of values and exact windows are copied in each step"
)


@pytest.mark.parametrize("tpu", ["v5e:2x2", slow("v6e:2x2")])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=COPIES if name == "packed" else ()) for name in STEPS]
)
def test_a_decode_step_copies_nothing_of_the_cache(name, tpu):
    width, transform = STEPS[name]
    config = Config(64, 256, 256, 4, 8, 4, width)
    half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)  # noqa: E731
    model = jax.tree.map(half, jax.eval_shape(lambda: llama.init(config, jax.random.key(0))))
    cache = jax.eval_shape(
        lambda: init_cache(config, transform, 1, CAPACITY, dtype=jnp.bfloat16, kernels="tpu")
    )
    moving, rest = (cache.state, cache.length), cache.replace(state=None, length=None)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    program = compiled(tpu, step, model, moving, rest, token, donate=1)
    text, used = program.as_text(), program.memory_analysis()
    assert "tpu_custom_call" in text
    large = {x.size for x in jax.tree.leaves(moving) if x.size * x.dtype.itemsize > 2**17}
    assert not copies(text, large)
    assert used.alias_size_in_bytes >= nbytes(moving) - 1024
    assert used.temp_size_in_bytes < nbytes(moving) // 8
