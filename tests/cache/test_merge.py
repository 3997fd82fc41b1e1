"""Partial attention is a commutative monoid under `merge`, and any partition gives softmax.

The reference is float64 on the same float32 logits and values. exp and the weighted sums round a
few times per operation: 1e-6 of the largest value is about eight units in the last place.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import Partial, merge, partial_attention

ROWS, KEYS, WIDTH, PARTS = 3, 12, 4, 4
quick = settings(max_examples=60, deadline=None)
scales = st.sampled_from([0.0, 1.0, 30.0, 1e4])
seeds = st.integers(0, 2**31)


def case(seed, scale):
    draw = np.random.default_rng(seed)
    logits = (draw.normal(size=(ROWS, KEYS)) * scale).astype(np.float32)
    values = draw.normal(size=(KEYS, WIDTH)).astype(np.float32)
    owner = draw.integers(0, PARTS, KEYS)  # parts may be empty
    seen = draw.random((ROWS, KEYS)) < draw.choice([0.2, 0.8, 1.0])
    seen[0] &= draw.random() < 0.7  # a row that may see nothing
    masks = (owner == np.arange(PARTS)[:, None])[:, None] & seen
    return logits, values, seen, masks


def parts(logits, values, masks):
    junk = jnp.where(masks, logits, jnp.nan)  # what a part does not see is not felt
    return jax.vmap(lambda x, m: partial_attention(x, m, lambda p: p @ values))(junk, masks)


def nth(pieces, i):
    return jax.tree.map(lambda x: x[i], pieces)


def fold(pieces, order):
    done = Partial.identity((ROWS,), WIDTH)
    for i in order:
        done = merge(done, nth(pieces, i))
    return done


def tree(pieces):
    a, b, c, d = (nth(pieces, i) for i in range(PARTS))
    return merge(merge(a, b), merge(c, d))


@jax.jit
def folds(logits, values, masks, order):
    pieces = parts(logits, values, masks)
    return fold(pieces, range(PARTS)), fold(pieces, order), tree(pieces), pieces


def agree(a, b, within=1e-6):
    np.testing.assert_allclose(a.out, b.out, rtol=within, atol=within * 4)  # |values| < 4
    np.testing.assert_array_equal(a.max, b.max)  # a maximum does not round
    np.testing.assert_allclose(a.sum, b.sum, rtol=within)


@quick
@given(seeds, scales, st.permutations(range(PARTS)))
def test_any_partition_any_order_is_softmax(seed, scale, order):
    logits, values, seen, masks = case(seed, scale)
    straight, shuffled, bracketed, _ = folds(logits, values, masks, jnp.asarray(order))
    wide = np.where(seen, logits.astype(np.float64), -np.inf)
    top = wide.max(-1)
    weight = np.exp(wide - np.where(np.isinf(top), 0, top)[:, None])
    total = weight.sum(-1)
    out = weight @ values.astype(np.float64) / np.where(total > 0, total, 1)[:, None]
    for done in (straight, shuffled, bracketed):
        agree(done, Partial(out, top.astype(np.float32), total))
    lse = np.log(np.where(total > 0, total, 1)) + top
    np.testing.assert_allclose(straight.lse, lse, rtol=1e-6, atol=1e-6)


@jax.jit
def laws(logits, values, masks):
    pieces = parts(logits, values, masks)
    a, b, c = (nth(pieces, i) for i in range(3))
    none = Partial.identity((ROWS,), WIDTH)
    return (
        (merge(a, b), merge(b, a)),
        (merge(merge(a, b), c), merge(a, merge(b, c))),
        (merge(none, a), merge(a, none), a),
        merge(none, none),
    )


@quick
@given(seeds, scales)
def test_monoid(seed, scale):
    logits, values, _, masks = case(seed, scale)
    (ab, ba), (left, right), (before, after, alone), nothing = laws(logits, values, masks)
    jax.tree.map(np.testing.assert_array_equal, ab, ba)
    agree(left, right)
    jax.tree.map(np.testing.assert_array_equal, before, alone)
    jax.tree.map(np.testing.assert_array_equal, after, alone)
    jax.tree.map(np.testing.assert_array_equal, nothing, Partial.identity((ROWS,), WIDTH))


@functools.partial(jax.jit, static_argnames="split")
def gradients(logits, values, seen, masks, split):
    def loss(logits, values):
        if split:
            done = fold(parts(logits, values, masks), range(PARTS))
        else:
            done = partial_attention(logits, seen, lambda p: p @ values)
        return jnp.sum(jnp.sin(done.out))

    return jax.grad(loss, (0, 1))(logits, values)


@quick
@given(seeds, scales)
def test_gradients_are_finite_and_those_of_softmax(seed, scale):
    logits, values, seen, masks = case(seed, scale)
    got = gradients(logits, values, seen, masks, True)
    want = gradients(logits, values, seen, masks, False)
    for a, b in zip(got, want):
        assert np.isfinite(a).all() and np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@jax.jit
def grad_of_merge(a, b):
    def loss(a, b):
        done = merge(a, b)
        return jnp.sum(done.out) + jnp.sum(done.sum)

    return jax.grad(loss, (0, 1))(a, b)


def test_gradients_through_identities_are_finite():
    none = Partial.identity((ROWS,), WIDTH)
    some = Partial(jnp.ones((ROWS, WIDTH)), jnp.full((ROWS,), 1e4), jnp.ones((ROWS,)))
    for pair in ((none, none), (none, some), (some, none), (some, some)):
        for leaf in jax.tree.leaves(grad_of_merge(*pair)):
            assert np.isfinite(leaf).all()
