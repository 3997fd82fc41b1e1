"""Recurrent state under the contract of caches: commits of any rows, padding, chunks, no copies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    KV,
    New,
    apart,
    chain,
    commit,
    finish,
    horizon,
    init_cache,
    logical_axes,
    nbytes,
    previous,
    recent,
    store,
    together,
    tokens_held,
)
from kvjax.models import Config, init
from kvjax.models.decoder import forward
from kvjax.models.mamba2 import FEW, Mamba2

LAYERS, BATCH, ROWS = 3, 2, 6
KIND = Mamba2(heads=4, head_dim=3, state_size=5, groups=2, chunk=8)
PURE = Config(
    29, 6, 0, LAYERS, 0, 0, 0, recurrence=KIND, recurrent_layers=tuple(range(LAYERS))
)  # fmt: skip
HYBRID = Config(29, 6, 8, 4, 4, 2, 8, recurrence=KIND, recurrent_layers=(0, 2, 3))
take = jax.jit(commit, static_argnames="phase")


def rows_of(seed, count, poison=None):
    """`New` of random rows at positions 0, 1, ...; those of `poison` [B, T] hold NaN."""
    draw = np.random.default_rng(seed)
    size = lambda *shape: draw.normal(size=(LAYERS, BATCH, count, *shape)).astype(np.float32)  # noqa: E731
    rows = {
        "decay": -np.abs(size(KIND.heads)),
        "input": size(KIND.heads, KIND.head_dim),
        "key": size(KIND.groups, KIND.state_size),
        "conv": size(KIND.channels),
    }
    if poison is not None:
        for x in rows.values():
            x[:, poison] = np.nan
    nothing = jnp.zeros((0, BATCH, 0, count, 0))
    pos = jnp.broadcast_to(jnp.arange(count), (1, BATCH, 1, count)).astype(jnp.int32)
    return New(KV(nothing, nothing, pos), recurrent=jax.tree.map(jnp.asarray, rows))


def row(new, t, there):
    """Row t of every row of the batch, padding where `there` [B] is false."""
    pos = jnp.where(jnp.asarray(there)[None, :, None, None], new.kv.pos[..., t : t + 1], -1)
    kv = KV(new.kv.k[:, :, :, :1], new.kv.v[:, :, :, :1], pos)
    return New(kv, recurrent=jax.tree.map(lambda x: x[:, :, t : t + 1], new.recurrent))


def begun(config=PURE, seed=7):
    """A cache whose state is not zero."""
    cache = init_cache(config, chain(store()), BATCH, 64)
    own = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(seed), x.shape), cache.state[cache.recurrent]
    )
    return cache.replace(state=(*cache.state[:-1], own))


def by_hand(state, new, path, batch):
    """The recurrence in float64, one token after the other, for one row of the batch."""
    memory = np.asarray(state["memory"], np.float64)[:, batch]
    tail = list(np.moveaxis(np.asarray(state["tail"])[:, batch], 1, 0))
    for t in path:
        x = {n: np.asarray(v, np.float64)[:, batch, t] for n, v in new.recurrent.items()}
        key = np.repeat(x["key"], KIND.heads // KIND.groups, 1)
        memory = np.exp(x["decay"])[..., None, None] * memory
        memory = memory + x["input"][..., None] * key[:, :, None]
        tail = [*tail[1:], x["conv"]]
    return memory, np.stack(tail, 1)


paths = st.lists(
    st.lists(st.integers(0, ROWS - 1), unique=True, max_size=ROWS),
    min_size=BATCH, max_size=BATCH,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(paths, st.integers(0, 99))
def test_any_rows_leave_the_state_of_those_rows_alone_to_the_last_bit(found, seed):
    keep = np.full((BATCH, ROWS), -1, np.int32)
    for b, path in enumerate(found):
        keep[b, : len(path)] = path  # in any order: positions say which comes first
    poison = np.array([[t not in found[b] for t in range(ROWS)] for b in range(BATCH)])
    new, cache = rows_of(seed, ROWS, poison), begun()
    together_ = take(cache, new, keep=jnp.asarray(keep), phase="verify")
    alone = cache
    for t in range(ROWS):
        alone = take(alone, row(new, t, [t in path for path in found]))
    for a, b in zip(jax.tree.leaves(together_.state), jax.tree.leaves(alone.state)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(together_.length, alone.length)
    for b, path in enumerate(found):
        memory, tail = by_hand(cache.state[0], new, sorted(path), b)
        # A sum of at most seven products of size about 1, in float32.
        np.testing.assert_allclose(together_.state[0]["memory"][:, b], memory, atol=3e-6)
        np.testing.assert_array_equal(together_.state[0]["tail"][:, b], tail.astype(np.float32))


@pytest.mark.parametrize("count", [FEW + 1, 3 * KIND.chunk])
def test_many_rows_at_once_and_in_parts(count):
    new, cache = rows_of(3, count), begun()
    poison = np.zeros((BATCH, count), bool)
    poison[0, ::3] = poison[1, -9:] = True
    pos = np.where(poison, -1, np.cumsum(~poison, 1) - 1)
    holes = dataclasses.replace(
        rows_of(3, count, poison), kv=KV(new.kv.k, new.kv.v, jnp.asarray(pos)[None, :, None])
    )
    whole = take(cache, holes, phase="prefill")
    for b in range(BATCH):
        memory, tail = by_hand(cache.state[0], new, np.flatnonzero(~poison[b]), b)
        # Products within chunks and replay round differently: float32, sums of a few terms.
        np.testing.assert_allclose(whole.state[0]["memory"][:, b], memory, atol=3e-6)
        np.testing.assert_array_equal(whole.state[0]["tail"][:, b], tail.astype(np.float32))
    half = count // 2
    parts = cache
    for cut in (slice(0, half), slice(half, None)):
        kv = KV(*(x[:, :, :, cut] for x in (holes.kv.k, holes.kv.v)), holes.kv.pos[..., cut])
        rows = jax.tree.map(lambda x, cut=cut: x[:, :, cut], holes.recurrent)
        parts = take(parts, New(kv, recurrent=rows), phase="append")
    for a, b in zip(jax.tree.leaves(parts.state), jax.tree.leaves(whole.state)):
        np.testing.assert_allclose(a, b, atol=3e-6)
    np.testing.assert_array_equal(parts.length, whole.length)


advance = jax.jit(KIND.advance)


@pytest.mark.parametrize("count", [1, ROWS, FEW + 1])
def test_rows_that_are_not_valid_change_nothing(count):
    """Whatever they hold: `advance` by itself, not only after `commit` has cleared them."""
    rows, state = rows_of(5, count).recurrent, begun().state[0]
    valid = (np.arange(count) + np.arange(BATCH)[:, None]) % 2 == 1
    found = advance(state, rows, jnp.asarray(valid))
    for b in range(BATCH):
        memory, tail = by_hand(state, New(None, recurrent=rows), np.flatnonzero(valid[b]), b)
        np.testing.assert_allclose(found["memory"][:, b], memory, atol=3e-6)
        np.testing.assert_array_equal(found["tail"][:, b], tail.astype(np.float32))


windows = jax.jit(previous, static_argnums=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([0, 1, 3]))
def test_windows_skip_padding(valid, width):
    found = np.asarray(windows(jnp.asarray([valid]), width))[0]
    before = list(range(width))
    for t, there in enumerate([*valid, False]):
        assert found[t].tolist() == before[len(before) - width :]
        before += [width + t] if there else []


def test_what_a_cache_says_of_recurrent_state():
    pure, hybrid = begun(), begun(HYBRID)
    state = LAYERS * BATCH * (KIND.heads * KIND.head_dim * KIND.state_size + 3 * KIND.channels) * 4
    assert nbytes(pure) == state
    assert nbytes(init_cache(PURE, chain(), BATCH, 4096)) == state  # whatever the length
    assert nbytes(hybrid) > state + 2 * BATCH * 2 * 64 * 8 * 4
    assert pure.chains == () and hybrid.chains == (0,) and hybrid.recurrent == 1
    assert pure.foldable and hybrid.foldable
    assert tokens_held(pure) == tokens_held(hybrid) == 0
    assert horizon(pure).min() > 2**20 and horizon(hybrid).min() > 2**20
    windowed = init_cache(HYBRID, chain(recent(4)), BATCH, 64)
    reach = windowed.transforms[0].horizon(windowed.state[0])
    assert horizon(windowed).tolist() == reach.tolist() == [5, 5]  # what attention sees decides
    assert jax.tree.structure(finish(pure)) == jax.tree.structure(pure)
    again = together(*apart(pure))
    assert jax.tree.structure(again) == jax.tree.structure(pure)
    axes = logical_axes(hybrid).state[1]
    assert axes == {
        "memory": ("layers", "batch", "heads", None, None),
        "tail": ("layers", "batch", None, "inner"),
    }
    assert dataclasses.replace(KIND) == KIND and hash(KIND) == hash(dataclasses.replace(KIND))


@pytest.mark.parametrize(
    ("config", "how", "match"),
    [
        (PURE, {"transform": chain(recent(4))}, "no attention layers"),
        (HYBRID, {"exact_layers": (0,)}, "layer 0 is recurrent"),
        (HYBRID, {"exact_layers": (4,)}, "there are 4 layers"),
    ],
)
def test_caches_refuse_what_would_do_nothing(config, how, match):
    with pytest.raises(ValueError, match=match):
        init_cache(config, **({"transform": chain(store())} | how), batch=1, max_length=8)


def test_exact_layers_are_those_of_the_model():
    cache = init_cache(HYBRID, chain(recent(4)), 1, 32, exact_layers=(1,))
    assert cache.groups == ((0,), (0, 1, 2)) and cache.transforms[0] == chain(store())


def step(config, model, moving, rest, token):
    cache = together(moving, rest)
    out, new = forward(model, token, cache.length[:, None], cache)
    return out, apart(commit(cache, new))[0]


@pytest.mark.usefixtures("compile_fully")
def test_decode_step_writes_the_state_in_place():
    kind = Mamba2(heads=8, head_dim=64, state_size=128)
    config = Config(64, 64, 0, 6, 0, 0, 0, recurrence=kind, recurrent_layers=tuple(range(6)))
    cache = jax.eval_shape(lambda: init_cache(config, chain(), 1, 64))
    model = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    moving, rest = apart(cache)
    run = jax.jit(functools.partial(step, config), donate_argnums=1)
    found = run.lower(model, moving, rest, token).compile().memory_analysis()
    state = nbytes(cache)
    assert found.alias_size_in_bytes >= state
    # One layer at a time: its weights (64 x 1,800 and back) and its part of the state.
    layer = 4 * (64 * (2 * 512 + 256 + 8) + 512 * 64) + state // 6
    assert found.temp_size_in_bytes < 1.5 * layer < state
