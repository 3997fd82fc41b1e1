"""The horizon: how many tokens may be accepted at once, and still be those of plain decoding.

Exact statement. Let S be a cache, h = horizon(S)[b], and t_1 .. t_h tokens of row b. Row i of one
forward pass over all of them (read from S, the earlier ones exact among the new rows) attends as
token i does when they are forwarded and committed one by one. Equivalently, for every i < h the
cache after t_1 .. t_i is S plus these i tokens as they came: no held token has changed or gone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import (
    Window,
    accumulated_attention,
    best_pages,
    by_position,
    chain,
    first,
    heavy,
    horizon,
    key_norm,
    newest_attention,
    prefix,
    prune,
    random,
    recent,
    store,
    window_attention,
)
from kvjax.cache.stage import FOREVER
from kvjax.codecs import dense, per_kv, quantize
from tests.cache.harness import close, cut, empty, look, rows, step

LENGTH, ROWS = 40, 6
reach = jax.jit(horizon)
half = dense("bfloat16")
kivi = per_kv(k=quantize(2, axis="channel", group=8), v=quantize(4))
CHAINS = {
    "streaming": chain(first(3, "slot"), recent(5, release=4)),
    "h2o": chain(recent(4, release=3), heavy(7, accumulated_attention())),
    "heavy first": chain(heavy(12, newest_attention(), recent=3), recent(3)),
    "kivi": chain(store(kivi, keys=Window(0, 8), values=Window(8, 8))),
    "half": chain(first(2), store(half, keys=Window(3, 4))),
    "coded slots": chain(first(5, codec=quantize(8)), recent(4, codec=half), heavy(9, key_norm())),
    "reader": chain(store(reader=best_pages(2, 4))),
    "reader of groups": store(
        kivi, keys=Window(4, 8), values=Window(9, 8), reader=best_pages(1, 8)
    ),
    "forgets": chain(first(10)),
    "ends": chain(first(2), recent(60, 9)),
}  # fmt: skip


@st.composite
def cases(draw):
    return draw(st.integers(0, 10**6)), [draw(st.integers(0, LENGTH - ROWS)) for _ in range(2)]


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=4, deadline=None)
@given(cases())
def test_accepting_horizon_rows_is_plain_decoding(name, case):
    seed, lengths = case
    r = rows(seed, LENGTH)
    cache = empty(CHAINS[name], LENGTH)
    start = np.asarray(lengths)
    for i in range(start.max()):  # before: plain decoding, rows of different lengths
        _, cache = step(cache, cut(r, np.where(i < start, i, -1)[:, None]))
    several = np.minimum(np.asarray(reach(cache)), ROWS)
    assert (several >= 1).all()
    index = np.where(np.arange(ROWS) < several[:, None], start[:, None] + np.arange(ROWS), -1)
    verified, _ = look(cache, cut(r, index))
    plain = []
    for i in range(ROWS):
        out, cache = step(cache, cut(r, index[:, i : i + 1]))
        plain.append(np.asarray(out))
    # Two float32 computations of the same sums.
    close(verified, np.concatenate(plain, 3), cut(r, index)["pos"], 1e-5)


def horizons(transform, tokens):
    """The horizon after 0, 1, .., tokens commits."""
    r = rows(0, LENGTH)
    cache = empty(transform, LENGTH)
    found = [int(horizon(cache)[0])]
    for i in range(tokens):
        _, cache = step(cache, cut(r, np.full((2, 1), i)))
        found.append(int(horizon(cache)[0]))
    return found


def test_horizon_counts_down():
    assert horizons(recent(3, release=4), 9) == [7, 6, 5, 4, 3, 2, 1, 4, 3, 2]
    assert horizons(heavy(3, random()), 4) == [4, 3, 2, 1, 1]
    assert horizons(chain(first(2), recent(2), store()), 5) == [3, 3, 3, 2, 1, 1]
    group = store(quantize(4), keys=Window(0, 4), values=Window(0, 4))
    assert horizons(group, 4) == [4, 3, 2, 1, 4]
    assert horizons(store(reader=best_pages(2, 4)), 5) == [4, 3, 2, 1, 4, 3]


@pytest.mark.parametrize(
    "transform, reach",
    [
        (recent(LENGTH, release=4), FOREVER),
        (recent(LENGTH - 3, release=4), FOREVER),
        (recent(LENGTH - 4, release=4), LENGTH),
        (heavy(LENGTH, random()), FOREVER),
        (heavy(LENGTH - 1, random()), LENGTH),
        (store(), FOREVER),
        (store(quantize(4)), 1),
        (store(quantize(4), keys=Window(LENGTH), values=Window(LENGTH)), FOREVER),
        (store(reader=best_pages(10, 4)), FOREVER),
        (by_position(LENGTH), FOREVER),
        (recent(9, codec=quantize(8)), 1),
        (recent(LENGTH, codec=dense("float32")), FOREVER),
        (recent(LENGTH, codec=dense("bfloat16")), 1),
        (chain(prefix(), store()), FOREVER),
        # What leaves the last stage is forgotten by the next row.
        (chain(prefix()), 1),
        (first(LENGTH - 1), 1),
        (first(LENGTH), FOREVER),
    ],
)
def test_horizon_of_an_empty_cache(transform, reach):
    assert horizons(transform, 0) == [reach]


def test_horizon_before_finish_and_of_nothing():
    pending = horizon(empty(prune(3, window_attention(2)), 9, 5))
    assert pending.dtype == jnp.int32 and (pending == FOREVER).all()
    with pytest.raises(ValueError, match="empty chain"):
        horizon(empty(chain(), 9))
