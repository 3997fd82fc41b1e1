"""Decode attention: every implementation against float64, on shapes chosen to break it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.cache import Partial, merge
from pallas_kernels import decode_attention
from tests.pallas_kernels.cases import Case, check

RACES = pltpu.InterpretParams(detect_races=True)
HOW = {
    "reference": {"implementation": "reference"},
    "tpu": {"implementation": "tpu", "interpret": RACES},
    "gpu": {"implementation": "gpu", "interpret": True},
}
CASES = {
    "ragged rows, head size 64": Case(used=(300, 7)),
    "head size 80, several tokens": Case(width=80, tokens=3, slots=257, used=(256, 129)),
    "head size 128, bfloat16": Case(width=128, dtype="bfloat16", slots=640, used=(0, 513)),
    "everything else": Case(
        heads=8, width=64, slots=200, softcap=20.0, window=90, bias=True, per_head=True, tokens=2,
        used=(150, 200),
    ),
    "scores of 1e4": Case(batch=1, top=1e4, width=64, slots=520),
    "scores of 1e4 in bfloat16": Case(batch=1, top=1e4, width=128, slots=130, dtype="bfloat16"),
    "nothing": Case(batch=1, holes=1.0, slots=40),
}  # fmt: skip
MORE = {
    "head size 96": Case(width=96, slots=1000, used=(999, 1)),
    "head size 256": Case(width=256, slots=384, batch=1, queries=1, dtype="bfloat16"),
    "head size 256 in float32": Case(width=256, slots=130, batch=1, queries=1),
    "one slot": Case(slots=1, holes=0.0, batch=3),
    "one layer, many heads": Case(layers=1, heads=16, queries=1, width=128, batch=1, slots=150),
    "long": Case(layers=1, batch=1, heads=1, slots=5000, used=(4097,)),
    "window of one block": Case(window=64, slots=700, batch=1),
    "head size 8": Case(width=8, slots=33, batch=1),
}


@functools.partial(jax.jit, static_argnames=("case", "how"))
def run(given, case, how):
    return decode_attention(softcap=case.softcap, **given, **HOW[how])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_equals_float64(name, how):
    case = {**CASES, **MORE}[name]
    given, plain, empty = case.inputs(packed=False)
    check(case, run(given, case, how), plain, empty)


def test_only_blocks_in_use_are_read():
    """The grid ends with the longest row's last block; a shorter row stays at its own last."""
    steps = set()

    def record(device, at, core):
        steps.add(tuple(int(i) for i in at))
        return np.int32(0)

    how = pltpu.InterpretParams(grid_point_recorder=record)
    case = Case(layers=1, heads=1, queries=1, slots=5000, width=128, dtype="float32")
    given, *_ = case.inputs(packed=False)
    given["used"] = jnp.asarray([2500, 10])
    part = decode_attention(**given, implementation="tpu", interpret=how)
    jax.block_until_ready(part)
    assert steps == {(b, 0, n) for b in range(2) for n in range(2)}  # blocks of 2,048 slots


def test_parts_merge_to_the_whole():
    case = Case(batch=1, slots=256, holes=0.0)
    given, plain, empty = case.inputs(packed=False)

    def cut(a, b):
        return {n: x[:, :, :, a:b] if n in ("k", "v", "pos") else x for n, x in given.items()}

    parts = [run(cut(a, b), case, "gpu") for a, b in ((0, 128), (128, 256))]
    check(case, merge(*parts), plain, empty)
    assert isinstance(parts[0], Partial)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"implementation": "cuda"}, "implementation='cuda': expected"),
        ({"q": jnp.zeros((2, 5, 1, 64))}, "multiple of 2 heads"),
        ({"q": jnp.zeros((2, 6, 1, 32))}, "q has 32 channels, k 64"),
        ({"v": jnp.zeros((2, 2, 2, 300, 32))}, "expected \\[L, B, H, N, D\\] for both"),
        ({"pos": jnp.zeros((2, 2, 3, 300), jnp.int32)}, "pos has shape"),
        ({"span": 4}, "a sliding window needs both"),
        ({"used": jnp.zeros((1, 2, 3), jnp.int32)}, "used has shape"),
        ({"bias": jnp.zeros((1, 2, 2, 300))}, "bias has shape"),
        ({"q": jnp.zeros((2, 200, 4, 64))}, "take up to 256"),
        (
            {"q": jnp.zeros((2, 6, 1, 64), jnp.float16), "implementation": "tpu"},
            "q is float16: implementation='tpu' takes float32, bfloat16",
        ),
    ],
)
def test_errors_say_what_is_expected(change, words):
    given, *_ = Case().inputs(packed=False)
    with pytest.raises(ValueError, match=words):
        decode_attention(**{**given, **change})


def test_what_the_reference_is_compared_with():
    """The float64 statement is attention: one key of weight 1, two of 1/2."""
    case = Case(layers=1, batch=1, heads=1, queries=1, slots=2, width=8, holes=0.0)
    given, plain, _ = case.inputs(packed=False)
    given["k"] = given["k"].at[:, :, :, 1].set(given["k"][:, :, :, 0])
    part = run(given, case, "reference")
    np.testing.assert_allclose(part.out[0, 0, 0], plain["v"][0, 0, 0].mean(0), atol=1e-6)
    assert float(part.sum[0, 0, 0]) == 2.0
