"""`chain` is a monoid by plain equality, and transforms are values: equal ones compile once."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.cache import (
    KV,
    Chain,
    New,
    Window,
    accumulated_attention,
    adaptive,
    best_pages,
    by_position,
    chain,
    commit,
    first,
    heavy,
    key_norm,
    nbytes,
    nearest,
    newest_attention,
    prefix,
    prune,
    pyramid,
    recent,
    store,
    uniform,
    window_attention,
)
from kvjax.codecs import per_kv, quantize
from tests.cache.harness import BATCH, KV_HEADS, LAYERS, WIDTH, empty, part, rows, step

STAGES = (
    lambda: first(2),
    lambda: first(2, "slot"),
    lambda: recent(4),
    lambda: recent(4, release=3),
    lambda: recent(4, codec=quantize(8)),
    lambda: heavy(3, accumulated_attention()),
    lambda: heavy(3, newest_attention(whole_layer=False), recent=1),
    lambda: heavy(3, key_norm(), absorb=nearest(0.25)),
    lambda: prune(keep=0.5, score=window_attention(4)),
    lambda: prune(5, window_attention(4), budget=adaptive(0.5, 4, pyramid(2.0, 4))),
    lambda: prune(5, key_norm(), budget=uniform()),
    lambda: prefix("shared"),
    store,
    lambda: store(per_kv(k=quantize(2, axis="channel", group=8), v=quantize(4))),
    lambda: store(keys=Window(0, 8), values=Window(8, 1), rope="before"),
    lambda: store(reader=best_pages(2, 4)),
)
stages = st.sampled_from(STAGES)
chains = st.lists(stages, max_size=4)


def build(makers):
    return chain(*(make() for make in makers))


@given(chains, chains, chains)
def test_associative_with_identity(a, b, c):
    x, y, z = build(a), build(b), build(c)
    assert chain(chain(x, y), z) == chain(x, chain(y, z)) == build(a + b + c)
    assert chain(x, chain()) == chain(chain(), x) == chain(x) == x
    assert chain() == Chain(())


@given(chains, chains)
def test_equal_when_built_twice(a, b):
    assert build(a) == build(a) and hash(build(a)) == hash(build(a))
    assert (build(a) == build(b)) == (a == b)


@pytest.mark.parametrize("make", STAGES)
def test_caches_of_equal_transforms_have_equal_treedefs(make):
    shapes = [jax.eval_shape(lambda: empty(make(), 16, 8)) for _ in range(2)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert hash(jax.tree.structure(shapes[0])) == hash(jax.tree.structure(shapes[1]))


def test_one_compile_for_equal_transforms():
    traces = []

    @jax.jit
    def write(cache, r):
        traces.append(1)
        return commit(cache, r)

    for seed in range(3):
        r = rows(seed, 1)
        new = New(KV(r["k"], r["v"], jnp.asarray(r["pos"])[None, :, None]))
        cache = empty(chain(first(2), recent(3, release=2), store(quantize(4))), 16)
        cache = write(write(cache, new), new)
    assert len(traces) == 1


def test_by_position_must_stand_first():
    with pytest.raises(ValueError, match=r"must stand first .* place 2 of 2"):
        chain(first(2), by_position(16))
    assert chain(chain(), by_position(16)).stages == (by_position(16),)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: chain(4), r"chain\(4\): expected stages or chains"),
        (lambda: first(-1), r"first\(n=-1\)"),
        (lambda: first(1, "none"), r"positions='none'"),
        (lambda: recent(0), r"recent\(n=0\)"),
        (lambda: recent(1, release=0), "release=0"),
        (lambda: recent(2, codec=quantize(4, axis="channel", group=8)), "codec of single tokens"),
        (lambda: heavy(0, key_norm()), r"heavy\(n=0\)"),
        (lambda: heavy(3, key_norm(), recent=4), "recent=4"),
        (lambda: heavy(3, window_attention(4)), "statistics of a whole prompt"),
        (lambda: prune(score=None, n=3), "score=None"),
        (lambda: prune(3, key_norm(), keep=0.5), "exactly one of n and keep"),
        (lambda: prune(keep=1.5, score=key_norm()), "keep=1.5"),
        (lambda: prune(0, key_norm()), "n=0"),
        (lambda: by_position(0), "n=0"),
        (lambda: store(quantize(4, axis="channel", group=8), keys=Window(0, 4)), "multiple of 8"),
        (lambda: store(rope="never"), "rope='never'"),
        (lambda: Window(-1), "n=-1"),
        (lambda: best_pages(0), "pages=0"),
        (lambda: window_attention(0), "window=0"),
        (lambda: window_attention(4, kernel=2), "kernel=2"),
        (lambda: pyramid(0.5), "beta=0.5"),
        (lambda: adaptive(1.5), "alpha=1.5"),
        (lambda: empty(by_position(8), 9), "max_length=9"),
        (lambda: empty(store(quantize(2, group=3 * 4)), 9), "12"),
        (lambda: empty(store(), 9, 10), "prompt=10"),
        (lambda: empty(store(), 9, exact_layers=(2,)), r"exact_layers=\(2,\)"),
        (lambda: empty(store(), 9, batch=0), "batch=0"),
        (lambda: empty("dense", 9), "expected a chain"),
    ],
)
def test_errors_name_what_was_wrong(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_commit_errors():
    pending = empty(prune(4, key_norm()), 16, 8)
    r = rows(0, 1)
    with pytest.raises(ValueError, match="not finished"):
        step(pending, r, "decode")
    with pytest.raises(ValueError, match="phase='later'"):
        step(pending, r, "later")


def test_nbytes_counts_what_is_allocated():
    tokens = 2 * LAYERS * BATCH * KV_HEADS * 16 * WIDTH * 4
    cache = empty(recent(16), 16)
    assert nbytes(cache) == tokens + 16 * BATCH * 4 + BATCH * 4
    shared = jnp.ones((3, 5))
    assert nbytes(cache.replace(constants={"a": shared, "b": shared})) == nbytes(cache) + 60
    assert nbytes(part(rows(0, 4), 0, 2)) > 0
