"""Decode attention over packed codes: every implementation against float64, and the codecs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.codecs import quantize
from pallas_kernels import quantized_decode_attention
from pallas_kernels.quantized_decode_attention.tpu import wide
from tests.pallas_kernels.cases import Case, check

HOW = {
    "reference": {"implementation": "reference"},
    "tpu": {"implementation": "tpu", "interpret": pltpu.InterpretParams(detect_races=True)},
    "gpu": {"implementation": "gpu", "interpret": True},
}
CASES = {
    "2 bits, ragged": Case(bits=(2, 2), slots=320, used=(300, 7)),
    "4 and 2 bits, bfloat16, scales too": Case(
        width=128, dtype="bfloat16", scales="bfloat16", bits=(4, 2), slots=640, used=(0, 513),
    ),
    "8 bits, head size 80": Case(width=80, groups=(16, 16), bits=(8, 8), tokens=2, slots=272),
    "everything else": Case(
        heads=8, slots=224, softcap=20.0, window=90, bias=True, per_head=True, tokens=2,
        used=(150, 224), bits=(2, 4),
    ),
    "scores of 1e4": Case(batch=1, top=1e4, slots=544),
    "nothing": Case(batch=1, holes=1.0, slots=64),
}  # fmt: skip
MORE = {
    "head size 96": Case(width=96, slots=992, used=(959, 1), bits=(2, 2)),
    "head size 256, groups of 64": Case(
        width=256, groups=(64, 64), slots=384, batch=1, dtype="bfloat16", queries=1
    ),
    "values that lie by rows": Case(width=128, groups=(32, 128), bits=(8, 8), slots=320, batch=1),
    "one group per value": Case(groups=(128, 64), bits=(4, 4), slots=512, batch=1),
    "small groups": Case(width=80, groups=(8, 8), bits=(4, 4), slots=40, batch=1, scales="float32"),
    "many heads": Case(layers=1, heads=16, queries=1, width=128, batch=1, slots=160, bits=(2, 2)),
    "long": Case(layers=1, batch=1, heads=1, slots=4096, used=(2049,), bits=(2, 2)),
}


@functools.partial(jax.jit, static_argnames=("case", "how"))
def run(given, case, how):
    return quantized_decode_attention(
        softcap=case.softcap, k_bits=case.bits[0], v_bits=case.bits[1], **given, **HOW[how]
    )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_equals_float64(name, how):
    case = {**CASES, **MORE}[name]
    given, plain, empty = case.inputs(packed=True)
    check(case, run(given, case, how), plain, empty)


def test_reads_what_the_codecs_write():
    """Keys and values coded by `quantize`: the kernel attends to what `decode` gives back."""
    case = Case(batch=1, slots=64, holes=0.0, bits=(2, 4))
    given, plain, empty = case.inputs(packed=True)
    draw = np.random.default_rng(0)
    k, v = draw.normal(size=(2, *plain["k"].shape)).astype(np.float32)
    keys, values = quantize(2, "channel", 32), quantize(4, "token", 32)
    given["k"], given["v"] = keys.encode(jnp.asarray(k)), values.encode(jnp.asarray(v))
    plain["k"] = np.asarray(keys.decode(given["k"]), np.float64)
    plain["v"] = np.asarray(values.decode(given["v"]), np.float64)
    for how in HOW:
        check(case, run(given, case, how), plain, empty)


def test_every_float16_is_read_as_it_is():
    """A TPU has no float16: its bits are turned into float32 by hand, subnormal ones too."""
    every = jnp.arange(2**16, dtype=jnp.uint16)
    halves = jax.lax.bitcast_convert_type(every, jnp.float16)
    finite = np.isfinite(np.asarray(halves, np.float32))
    got = np.asarray(jax.jit(wide)(jax.lax.bitcast_convert_type(every, jnp.int16)))
    np.testing.assert_array_equal(got[finite], np.asarray(halves, np.float32)[finite])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"k_bits": 3}, "k_bits=3: expected 2, 4 or 8"),
        ({"v_bits": 8}, "codes of keys"),
        ({"q": jnp.zeros((2, 6, 1, 32))}, "codes of keys"),
        ({"k": {"codes": jnp.zeros((2, 2, 2, 10, 16, 64), jnp.uint8)}}, "expected codes, scale"),
        ({"q": jnp.zeros((6, 64))}, "expected \\[B, Hq, T, D\\]"),
    ],
)
def test_errors_say_what_is_expected(change, words):
    given, *_ = Case(slots=320).inputs(packed=True)
    with pytest.raises(ValueError, match=words):
        quantized_decode_attention(**{**given, "k_bits": 4, "v_bits": 4, **change})


def test_groups_too_long_for_a_tpu_are_refused():
    given, *_ = Case(slots=512, groups=(256, 32)).inputs(packed=True)
    with pytest.raises(ValueError, match="groups of 256 tokens"):
        quantized_decode_attention(**given, k_bits=4, v_bits=4, implementation="tpu")
