"""Every method through the same cases. One compiled run per method: all cases share its shape."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    apart,
    commit,
    finish,
    init_cache,
    nbytes,
    restore_cache,
    save_cache,
    used_bytes,
)
from kvjax.compress import METHODS, parse
from kvjax.models import forward
from tests.compress.harness import (
    CONFIG,
    LENGTHS,
    PROMPT,
    STEPS,
    TRACES,
    base,
    cache_of,
    go,
    held,
    inputs,
    model,
    plain,
    plain_constants,
    rows,
    run,
)

VOTE = "window=4, kernel=3"
FEW = "carriers=1, block=1, window=4"
# name -> settings under which a prompt of 24 tokens is really compressed.
SETTINGS = {
    "dense": "dense",
    "rtn": "rtn(bits=4)",
    "random_eviction": "random_eviction(keep=0.5)",
    "streaming_llm": "streaming_llm(tokens=10, sinks=2)",
    "h2o": "h2o(keep=0.5)",
    "tova": "tova(keep=0.5)",
    "snapkv": f"snapkv(keep=0.5, {VOTE})",
    "pyramidkv": f"pyramidkv(keep=0.5, beta=4, {VOTE})",
    "adakv": f"adakv(keep=0.5, {VOTE})",
    "expected_attention": "expected_attention(keep=0.5, sinks=2, future=16)",
    "keydiff": "keydiff(keep=0.5)",
    "knorm": "knorm(keep=0.5)",
    "kivi": "kivi(bits=2, group=4, residual=8)",
    "gear": "gear(bits=2, group=4, buffer=8, span=16)",
    "mikv": "mikv(keep=0.5)",
    "mikv, growing": "mikv(keep=0.5, grow=True)",
    "turboquant": "turboquant(bits=4)",
    "rotatekv": "rotatekv(sinks=3)",
    "kvquant": "kvquant",
    "vidkv": "vidkv(group=8, residual=8)",
    "mustafar": "mustafar(window=4)",
    "kvzip": "kvzip(keep=0.5, chunk=10, hint=3, sinks=2)",
    "kvzip, all heads alike": "kvzip(keep=0.5, chunk=24, sinks=2, uniform=True)",
    "xkv": "xkv(group=2, key_rank=9, value_rank=14)",
    "xkv, selective": "xkv(key_rank=9, value_rank=14, budget=4, chunk=2, local=1, outliers=1)",
    "compress_kv_heads": "compress_kv_heads(sinks=2)",
    "cskv": "cskv(window=6)",
    "cskv 4 bits": "cskv(window=8, sliding=False, bits=4)",
    "d2o": "d2o(keep=0.5, sinks=2)",
    "d2o, layers alike": "d2o(tokens=9, sinks=1, layers=False)",
    "ems": "ems(keep=0.5, window=4, threshold=0.1)",
    "chelsea": "chelsea(keep=0.5, chunk=4, sinks=2, recent=3, release=3)",
    "prefixkv": "prefixkv(keep=0.5)",
    "prefixkv, offline": "prefixkv(keep=0.5, parts=(2, 1))",
    "hydragen": "hydragen",  # without a prefix; with one: test_hydragen.py
    "hydragen in kivi": "hydragen(levels=2, storage=kivi(bits=4, group=4, residual=8))",
    "double_sparsity": "double_sparsity(tokens=6, channels=3, dense_layers=0)",
    "double_sparsity 4 bits": "double_sparsity(tokens=6, channels=4, bits=4, dense_layers=1)",
    "zipvl": "zipvl(tau=0.6, probes=4, drawn=6, interval=5, group=4)",
    "zipvl, forgetting": "zipvl(tau=0.6, probes=4, drawn=6, evict=True)",
    "mustdrop": "mustdrop(tau_g=0.2, tau_x=0.2, layers=(1,), visual=(2, 20))",
    "mustdrop in one pool": "mustdrop(tau_g=0.1, tau_x=0.1, layers=(1,), visual=(2, 20), keep=0.8)",
    "video_xl_2": f"video_xl_2(length=6, {FEW}, chunk=1, previous=1, relevant=1, stride=2)",
    "video_xl_2, half": f"video_xl_2(keep=0.5, length=5, {FEW}, prefix=3, bias=True, by='mean')",
    "sentencekv": f"sentencekv(tokens=8, factor=2, first=2, recent=2, {VOTE})",
    "sentencekv, streaming": "sentencekv(tokens=8, keep=1.0, first=2, recent=2, dense_steps=1)",
    "actqkv": "actqkv(blocks=2, block=2, sinks=2, local=4, representatives=1, warmup=5)",
    "actqkv, layers alike": "actqkv(blocks=2, block=2, sinks=2, local=4, representatives=1, "
    "dynamic=False)",
    "snapkv in kivi": f"snapkv(keep=0.5, {VOTE}, storage=kivi(bits=4, group=4, residual=8))",
    "streaming_llm 4 bits": "streaming_llm(tokens=10, sinks=2, storage=rtn(bits=4))",
    "adakv in gear": f"adakv(keep=0.5, {VOTE}, storage=gear(bits=2, group=4, buffer=8, span=8))",
}
# Settings that must equal dense decoding; tokens beyond the prompt too, hence 32 of them.
LIMITS = {
    "rtn": "rtn(bits=16)",
    "random_eviction": "random_eviction(keep=1.0)",
    "streaming_llm": "streaming_llm(tokens=32, sinks=2)",
    "h2o": "h2o(tokens=32)",
    "tova": "tova(tokens=32)",
    "snapkv": f"snapkv(tokens=24, {VOTE})",
    "pyramidkv": f"pyramidkv(keep=1.0, {VOTE})",
    "adakv": f"adakv(keep=1.0, {VOTE})",
    "expected_attention": "expected_attention(tokens=24, sinks=2, future=16)",
    "keydiff": "keydiff(tokens=24)",
    "knorm": "knorm(keep=1)",
    "kivi": "kivi(bits=16, group=4, residual=8)",
    "kivi, never full": "kivi(bits=2, group=4, residual=32)",
    "gear": "gear(bits=2, group=4, buffer=32)",
    "mikv": "mikv(keep=0.5, bits=16)",
    "mikv, all of them as they come": "mikv(keep=1.0, grow=True)",
    "turboquant": "turboquant(bits=16)",
    "rotatekv": "rotatekv(bits=16, sinks=3)",
    "kvquant": "kvquant(bits=16)",
    "vidkv": "vidkv(key_bits=16, value_bits=16)",
    "vidkv, never full": "vidkv(group=8, residual=32)",
    "mustafar": "mustafar(key_sparsity=0, value_sparsity=0, window=4)",
    "mustafar, all entries large": "mustafar(key_sparsity=0.1, value_sparsity=0.2, window=4)",
    "mustafar, all in the window": "mustafar(window=32)",
    "cskv": "cskv(key_density=1.0, value_density=1.0, window=4)",
    "cskv, no window": "cskv(key_density=1.0, value_density=1.0, window=0)",
    "cskv, never full": "cskv(bits=4)",
    "kvquant, all sinks": "kvquant(sinks=32)",
    "d2o": "d2o(tokens=32)",
    "d2o, a prompt that fits": "d2o(tokens=32, sinks=0, limit=1)",
    "ems": "ems(tokens=24, window=4)",
    "chelsea": "chelsea(tokens=32, sinks=2, recent=3)",
    "prefixkv": "prefixkv(keep=1.0)",
    "prefixkv, offline": "prefixkv(keep=1.0, parts=(1, 3))",
    "kvzip": "kvzip(keep=1.0, chunk=10, sinks=2)",
    "xkv": "xkv(key_rank=1.0, value_rank=1.0)",
    "xkv, selective": "xkv(key_rank=1.0, value_rank=1.0, budget=24, outliers=1)",
    "compress_kv_heads": "compress_kv_heads(keep=1.0)",
    "hydragen": "hydragen(levels=3)",
    "double_sparsity": "double_sparsity(tokens=32, channels=4, bits=2, dense_layers=0)",
    "double_sparsity, no sparse layer": "double_sparsity(tokens=2, channels=8)",
    "sentencekv": f"sentencekv(tokens=32, factor=1, first=2, recent=3, dense_steps=0, {VOTE})",
    "sentencekv, all dense": "sentencekv(tokens=9, keep=1.0, first=2, recent=3, dense_steps=9)",
    "actqkv": "actqkv(blocks=16, block=2, sinks=2, local=4, representatives=1, constant=False)",
    "actqkv, all of it near": "actqkv(local=32)",
    "compress_kv_heads, before": "compress_kv_heads(keep=1.0, rope='before')",
    "zipvl": "zipvl(tau=1.0, bits=16, group=4)",
    "zipvl, both exact": "zipvl(tau=1.0, bits=16, low_bits=16, interval=3, group=4)",
    "zipvl, forgetting": "zipvl(tau=1.0, evict=True)",
    "mustdrop": "mustdrop(tau_g=0, layers=(0, 1), visual=(2, 20))",
    "mustdrop, single": "mustdrop(tau_g=9, tau_x=0, layers=(1,), visual=(2, 20), keep=1.0)",
    "mustdrop, nothing visual": "mustdrop(tau_g=9, tau_x=9, layers=(0, 1))",
    "video_xl_2": f"video_xl_2(length=6, {FEW}, stride=1, chunk=1, previous=3)",
    "video_xl_2, all relevant": f"video_xl_2(length=6, {FEW}, relevant=4, previous=0)",
    "xkv, all of it local": "xkv(key_rank=1, value_rank=1, budget=8, local=3)",
}
# Methods that have no budget keep every token; so does mikv, whose budget is of exact ones, and
# compress_kv_heads, whose budget is of heads.
EVERYTHING = {n for n, f in METHODS.items() if "keep" not in inspect.signature(f).parameters}
EVERYTHING |= {"mikv", "mikv, growing", "xkv, selective", "compress_kv_heads", "cskv 4 bits"}
EVERYTHING |= {"hydragen in kivi", "double_sparsity 4 bits", "sentencekv, streaming"}
EVERYTHING |= {"actqkv, layers alike"}  # and `evict` is no budget
EXACT = 2e-5  # of logits of size about 3: float32 sums in another order
# Sums in another order may move a float16 scale by its rounding, or at a tie a code by a step. What
# the cases look for (a wrong row, a felt NaN) moves logits by 0.5 and more.
CODED = 0.02


def slower(names, also=()):
    """The quick suite has every method once; more of its settings ("name, how") are slow tests."""
    more = lambda name: ", " in name or name in also  # noqa: E731
    return [pytest.param(n, marks=pytest.mark.slow) if more(n) else n for n in names]


every = pytest.mark.parametrize(
    "name",
    slower(
        SETTINGS,
        ("hydragen in kivi", "double_sparsity 4 bits", "cskv 4 bits", "mustdrop in one pool"),
    ),
)


def near(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=EXACT)


def alike(name, a, b):
    """Equal up to the order of sums."""
    words = ("bits", "mikv", "vidkv", "kvquant", "rotatekv", "zipvl")
    coded = any(word in SETTINGS[name] for word in words)
    np.testing.assert_allclose(a, b, rtol=0, atol=CODED if coded else EXACT)


def test_tables_cover_every_method():
    assert METHODS.keys() <= SETTINGS.keys() and METHODS.keys() - {"dense"} <= LIMITS.keys()


def test_dense_is_the_model():
    logits, _ = base("dense")
    whole = plain(model(), rows(), np.tile(np.arange(PROMPT + STEPS, dtype=np.int32), (3, 1)))
    for i, length in enumerate(LENGTHS):
        near(logits[i], np.asarray(whole)[i, length - 1 : length + STEPS])


@pytest.mark.parametrize("name", slower(LIMITS))
def test_limit_equals_dense(name):
    near(go(LIMITS[name])[0], base("dense")[0])


def test_a_prompt_of_sinks_is_exact():
    """RotateKV codes only what comes after it: felt from the second decoded token on."""
    logits, dense = go("rotatekv(bits=2, sinks=32)")[0], base("dense")[0]
    near(logits[:, :2], dense[:, :2])
    assert np.abs(logits[:, 2:] - dense[:, 2:]).max() > 0.01


@every
def test_padding_is_never_felt(name):
    """NaN in the place of padding changes nothing; nor does padding on the other side."""
    logits, _ = go(SETTINGS[name], fill=np.nan)
    near(logits, base(SETTINGS[name])[0])
    logits, _ = go(SETTINGS[name], left=True, fill=np.nan)
    alike(name, logits, base(SETTINGS[name])[0])


@every
def test_rows_are_independent(name):
    """A row beside others, and beside none."""
    logits, _ = go(SETTINGS[name], (17, 24, 0), (1, 2, 0))
    alike(name, logits[0], base(SETTINGS[name])[0][1])


@every
def test_saved_and_restored(name, tmp_path):
    """The same arrays and the same kind of cache; a second prompt goes on identically from both."""
    cache = base(SETTINGS[name])[1]
    save_cache(tmp_path / "cache", cache)
    like = jax.eval_shape(lambda: finish(cache_of(SETTINGS[name])))
    found = restore_cache(tmp_path / "cache", like)
    assert jax.tree.structure(found) == jax.tree.structure(cache)
    assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(cache)))
    (logits, after), (again, same) = (second_prompt(model(), x) for x in (cache, found))
    assert np.isfinite(logits).all() and np.array_equal(logits, again)
    assert all(map(np.array_equal, jax.tree.leaves(after), jax.tree.leaves(same)))
    assert (after.length - cache.length).tolist() == [0, 3, 3]


@jax.jit
def second_prompt(model, cache):
    """Three more rows at once behind what is held, where there is room for them."""
    at = cache.length[:, None] + jnp.arange(3)
    at = jnp.where(at < cache.max_length, at, -1)
    columns = {m.name: jnp.ones(at.shape) for m in cache.transforms[0].token_marks}
    logits, new = forward(model, at, at, cache, phase="append", columns=columns)
    return logits, commit(cache, new, phase="append")


def test_another_cache_is_not_restored(tmp_path):
    save_cache(tmp_path / "cache", base("dense")[1])
    like = jax.eval_shape(lambda: finish(cache_of("kivi(group=4, residual=8)")))
    with pytest.raises(
        ValueError, match=r"cache: \.?state.* expected .*: it was saved from another"
    ):
        restore_cache(tmp_path / "cache", like)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        restore_cache(tmp_path / "nowhere", like)


@pytest.mark.parametrize("name", ["h2o", "adakv in gear"])
def test_row_alone(name):
    logits, _ = go(SETTINGS[name], LENGTHS[1:2], (1,))
    alike(name, logits[0], base(SETTINGS[name])[0][1])


@every
def test_rows_permute(name):
    order = (2, 0, 1)
    logits, cache = go(SETTINGS[name], tuple(LENGTHS[i] for i in order), order)
    expected, before = base(SETTINGS[name])
    alike(name, logits, expected[list(order)])
    assert [[l[i] for i in order] for l in held(before)] == held(cache)


@every
def test_equal_methods_compile_once(name):
    base(SETTINGS[name])
    count = len(TRACES)
    run(model(), cache_of(SETTINGS[name]), *inputs())
    assert len(TRACES) == count


@every
def test_slots_are_distinct_with_true_positions(name):
    _, cache = base(SETTINGS[name])
    for layer in held(cache):
        for length, row in zip(LENGTHS, layer):
            for head in row:
                assert len(head) >= 1 and len(set(head)) == len(head)
                assert head[0] >= 0 and head[-1] < length + STEPS
    size = sum(len(head) for layer in held(cache) for row in layer for head in row)
    everything = CONFIG.layers * CONFIG.kv_heads * (sum(LENGTHS) + 3 * STEPS)
    assert (size == everything) == (name in EVERYTHING)


@every
def test_used_bytes_are_those_of_slots_that_hold_tokens(name):
    cache = base(SETTINGS[name])[1]
    used, allocated = used_bytes(cache), nbytes(cache)
    assert 0 < used <= allocated
    if name == "dense":
        held = sum(LENGTHS) + 3 * STEPS
        assert used == round(allocated * held / (3 * (PROMPT + STEPS)))


@every
def test_no_array_stands_twice(name):
    """A fresh cache can be donated: XLA refuses the same buffer twice."""
    leaves = [x for x in jax.tree.leaves(apart(cache_of(SETTINGS[name]))[0]) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


# --- memory: shapes alone say it, so nothing is compiled ---


def bytes_of(text: str, prompt: int = 512, length: int = 544) -> int:
    chain = parse(text)[0][1]
    given = plain_constants(chain, CONFIG_64)
    cache = init_cache(CONFIG_64, chain, 2, length, prompt=prompt, constants=given)
    return nbytes(jax.eval_shape(finish, cache))


CONFIG_64 = type(CONFIG)(50, 64, 48, 2, 2, 2, 64)


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        # 512 + 32 tokens against those kept, + 32 where decoding appends; positions cost little.
        ("random_eviction(keep=0.25)", 0.29, 0.31),
        ("streaming_llm(keep=0.25)", 0.23, 0.25),
        ("h2o(keep=0.25)", 0.23, 0.26),
        ("tova(keep=0.25)", 0.23, 0.26),
        ("snapkv(keep=0.25)", 0.29, 0.31),
        ("pyramidkv(keep=0.25)", 0.29, 0.36),  # a page and its fraction more per head
        ("adakv(keep=0.25)", 0.29, 0.36),
        ("kvzip(keep=0.25)", 0.29, 0.36),
        ("d2o(keep=0.25)", 0.47, 0.50),  # slots for twice the mean, of which half are used
        ("d2o(keep=0.25, layers=False)", 0.23, 0.26),
        ("ems(keep=0.25)", 0.29, 0.31),
        ("chelsea(keep=0.25)", 0.29, 0.31),
        ("prefixkv(keep=0.25)", 0.29, 0.36),
        ("prefixkv(keep=0.25, parts=(3, 1))", 0.29, 0.36),
        ("kvzip(keep=0.25, uniform=True)", 0.29, 0.31),
        ("expected_attention(keep=0.25)", 0.29, 0.31),
        ("keydiff(keep=0.25)", 0.29, 0.31),
        ("knorm(keep=0.25)", 0.29, 0.31),
        # bits / 32 here, where exact is float32
        ("rtn(bits=4)", 0.13, 0.15),
        ("kivi(bits=2, residual=32)", 0.09, 0.16),
        # 512 tokens in blocks of a prompt; room for 32 new ones and, of a shorter prompt, 255 that
        # fill no such block; 63 may wait exactly.
        ("gear(bits=2)", 0.28, 0.32),
        ("gear(bits=2, span=64, prompt_rank=2)", 0.20, 0.26),  # one store
        ("mikv(keep=0.25)", 0.29, 0.34),
        ("turboquant(bits=4)", 0.13, 0.15),
        ("rotatekv", 0.11, 0.13),  # 2.5 bits, and 20 of 544 tokens exactly
        ("vidkv(residual=32)", 0.07, 0.13),  # 2.2 bits, 31 of 544 tokens may wait exactly
        ("kvquant", 0.11, 0.13),  # 3.4 bits
        ("mustafar", 0.39, 0.41),  # (21 x 32 + 64) / 64 bits = 0.36, 32 of 544 tokens exactly
        ("mustafar(key_sparsity=0.5, value_sparsity=0.5)", 0.57, 0.59),  # 0.55
        # half of the channels, and projections as large as 32 of these few tokens
        ("compress_kv_heads", 0.55, 0.57),
        ("compress_kv_heads(keep=0.25)", 0.27, 0.29),
        # a rank per token and group, the maps of 512 ranks, and 32 exact tokens
        ("xkv", 0.27, 0.29),
        ("hydragen", 1.0 - 1e-9, 1.001),  # nothing is shared
        # all, and labels of 32 channels for each of 2 heads of 64, keys and values
        ("double_sparsity", 1.24, 1.26),
        ("double_sparsity(bits=4)", 1.03, 1.05),
        # and the sum of the keys of a span for 8 tokens that can come: 544 / 8 / 2 / 544 = 0.06
        ("sentencekv(keep=1.0)", 1.06, 1.08),
        ("sentencekv(keep=0.25, shortest=16)", 0.32, 0.34),  # 160 of 544 tokens, 34 spans: 0.03
        # all, and a key for every 16 tokens
        ("actqkv(blocks=2, block=16, sinks=4, local=64)", 1.03, 1.05),
        # Half of 512, 32 of 544 tokens exactly: 0.53; and 4 matrices of 128 x 64 each layer: 0.12.
        ("cskv", 0.64, 0.66),
        # Room for 544 tokens at 5 bits and for as many at 3, each being in one: 0.25 of 32 bits; 32
        # wait for the split: 0.06; the keys of 31 on both sides for their groups: 0.06
        ("zipvl", 0.34, 0.38),
        ("zipvl(limit=0.5)", 0.25, 0.3),
        ("zipvl(evict=True, limit=0.5)", 0.52, 0.54),
        ("mustdrop", 1.0, 1.01),  # positions of each layer; what is dropped leaves empty slots
        ("mustdrop(keep=0.25)", 0.29, 0.36),
        ("video_xl_2", 1.0 - 1e-9, 1.001),  # room for all, as any block may be relevant
        ("video_xl_2(keep=0.25, bias=True)", 0.29, 0.32),
        ("cskv(bits=4)", 0.30, 0.32),  # 2.5 bits: 0.07; 63 tokens may wait exactly: 0.12; 0.12
        ("snapkv(keep=0.25, storage=kivi(bits=2, residual=32))", 0.02, 0.1),
    ],
)
def test_bytes_are_as_promised(text, least, most):
    assert least < bytes_of(text) / bytes_of("dense") < most


@pytest.mark.parametrize(
    "name", sorted(METHODS.keys() - EVERYTHING | {"mikv", "compress_kv_heads"})
)
def test_bytes_fall_with_the_budget(name):
    sizes = [bytes_of(f"{name}(keep={keep})") for keep in (0.75, 0.5, 0.25)]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize("name", METHODS)
def test_bare_name_runs(name):
    """Defaults suit a model of head size 64 and a prompt longer than every window."""
    assert bytes_of(name) > 0
