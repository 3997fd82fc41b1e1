"""Groups of tokens, and attention that skips the empty blocks of a mask made from them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    Choice,
    Groups,
    Query,
    Rope,
    attend_bands,
    attend_new,
    bands,
    groups,
    in_chunks,
)
from kvjax.cache.rule import attend_chosen

# Prefix, three groups (the second with text inside, the third without content), a question.
SAID = [0, 0, 1, 1, 2, 2, 2, 1, 2, 0, 2, 2, 1, 0, 0]
GROUP = [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 3, 3]
PLACE = {4: 0, 5: 1, 6: 2, 8: 0, 10: 1, 11: 2}


@functools.partial(jax.jit, static_argnames="own")
def grouped(own, said, pos):
    return own(said, pos)


@pytest.mark.parametrize("before", [0, 3])
def test_groups_with_padding_anywhere(before):
    after = 3 - before
    said = jnp.asarray([[2.0] * before + SAID + [1.0] * after])
    pos = jnp.asarray([[-1] * before + list(range(len(SAID))) + [-1] * after])
    found = grouped(groups(), said, pos)
    at = slice(before, before + len(SAID))
    assert found.count.tolist() == [3]
    assert found.group[0, at].tolist() == GROUP
    assert found.kind[0, at].tolist() == SAID
    for i, place in PLACE.items():
        assert (int(found.place[0, before + i]), int(found.size[0, before + i])) == (place, 3)
    outside = np.r_[found.group[0, :before], found.group[0, at.stop :]]
    assert (outside == -2).all() and not np.asarray(found.valid)[0, :before].any()


def test_rows_that_say_nothing_are_laid_out_by_position():
    said = jnp.asarray([[0.0] * 9, [0, 0, 0, 1, 2, 0, 0, 0, 0]])
    pos = jnp.broadcast_to(jnp.arange(9), (2, 9))
    found = grouped(groups(length=3, carriers=1, prefix=2), said, pos)
    assert found.kind.tolist() == [[0, 0, 1, 2, 2, 1, 2, 2, 1], [0, 0, 0, 1, 2, 0, 0, 0, 0]]
    assert found.group.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 1, 2], [-1, -1, -1, 0, 0, 1, 1, 1, 1]]
    none = grouped(groups(), None, pos)
    assert none.count.tolist() == [0, 0] and not np.asarray(none.inside).any()


def plain_mask(kinds, chunk, previous, carry=True):
    """The mask of a sequence, bool [n, n], statement by statement."""
    n, group, number, seen = len(kinds), [], -1, 0
    last = max((i for i, k in enumerate(kinds) if k), default=-1)
    for i, kind in enumerate(kinds):
        number += kind == 1 and seen != 1
        seen = kind
        group.append(None if i > last else number)
    mask = np.zeros((n, n), bool)
    for i in range(n):
        for j in range(i + 1):
            # The question sees all, all see the prefix, carriers see and are seen.
            if group[i] is None or group[j] == -1 or (carry and 1 in (kinds[i], kinds[j])):
                mask[i, j] = True
            else:
                mask[i, j] = group[i] // chunk - group[j] // chunk <= previous
    return mask


def random_kinds(seed, n):
    draw = np.random.default_rng(seed)
    kinds = [0] * int(draw.integers(0, 6))
    while len(kinds) < n - 4:
        kinds += [1] * int(draw.integers(1, 3)) + [2] * int(draw.integers(1, 9))
    return (kinds[: n - 4] + [0] * 4)[:n]


SIZES, BLOCK = (60, 43), 8


def made(chunk, previous, carry=True, left=True):
    """Two rows of 64, one padded on the left; where they lie, their masks, their bands."""
    pos, said, where, masks = np.full((2, 64), -1), np.zeros((2, 64)), [], []
    for b, n in enumerate(SIZES):
        at = slice(64 - n, 64) if left and b else slice(0, n)
        kinds = random_kinds(b, n)
        pos[b, at], said[b, at] = np.arange(n), kinds
        where.append(at)
        masks.append(plain_mask(kinds, chunk, previous, carry))
    rule = in_chunks(groups(), chunk, previous, carry, block=BLOCK)
    seen = rule.start(jnp.asarray(pos), {"type": jnp.asarray(said, jnp.float32)})
    return pos, where, masks, seen


def whole(pos, where, masks):
    full = np.zeros((2, 64, 64), bool)
    for b, (at, mask) in enumerate(zip(where, masks)):
        full[b, at, at] = mask
    return full


@pytest.mark.parametrize(
    ("chunk", "previous", "carry"), [(1, 0, True), (2, 1, True), (1, 1, False), (3, 0, False)]
)
def test_the_mask_is_the_stated_one(chunk, previous, carry):
    pos, where, masks, seen = made(chunk, previous, carry)
    got = np.asarray(seen.allowed(0, 0, 64, 64))
    order, full = np.asarray(seen.order), whole(pos, where, masks)
    for b in range(2):
        np.testing.assert_array_equal(got[b], full[b][np.ix_(order[b], order[b])])
    # No block with an allowed pair is left out.
    blocks = got.reshape(2, 64 // BLOCK, BLOCK, 64 // BLOCK, BLOCK).any((0, 2, 4))
    needed = np.asarray(seen.needed)
    assert not (blocks & ~needed).any() and needed.sum() < needed.size * 0.7
    allowed, computed = seen.shares()
    causal = sum(n * (n + 1) / 2 for n in SIZES)
    np.testing.assert_allclose(allowed, full.sum() / causal, rtol=1e-6)
    np.testing.assert_allclose(computed, 2 * BLOCK**2 * needed.sum() / causal, rtol=1e-6)


def test_far_chunks_or_carriers_alone_are_causal_attention():
    for chunk, previous in ((1, 99), (99, 0)):
        pos, where, _, seen = made(chunk, previous)
        full = whole(pos, where, [np.tril(np.ones((n, n), bool)) for n in SIZES])
        got, order = np.asarray(seen.allowed(0, 0, 64, 64)), np.asarray(seen.order)
        for b in range(2):
            np.testing.assert_array_equal(got[b], full[b][np.ix_(order[b], order[b])])
    rule = in_chunks(groups(), 1, 0, block=BLOCK)
    seen = rule.start(
        jnp.broadcast_to(jnp.arange(64), (2, 64)), {"type": jnp.ones((2, 64), jnp.float32)}
    )
    assert (np.asarray(seen.allowed(0, 0, 64, 64)) == np.tril(np.ones((64, 64), bool))).all()


def test_share_of_pairs_is_the_closed_formula():
    """Groups of 4 with 1 carrier, chunks of 2 groups, one previous; a prefix of 16."""
    count, size, t, g, p, prefix = 12, 4, 1, 2, 1, 16
    pos = jnp.broadcast_to(jnp.arange(64), (2, 64))
    seen = in_chunks(groups(size, t, prefix), g, p, block=BLOCK).start(pos, {})
    pairs = prefix * (prefix + 1) / 2
    for chunk in range(count // g):
        before = max(chunk - p, 0) * g  # groups that content does not see, but for their carriers
        near = prefix + min(chunk, p) * g * size + before * t
        for k in range(g):
            first = prefix + (chunk * g + k) * size
            pairs += sum(first + i + 1 for i in range(t))
            pairs += sum(near + k * size + i + 1 for i in range(t, size))
    allowed, computed = seen.shares()
    np.testing.assert_allclose(allowed, pairs / (64 * 65 / 2), rtol=1e-6)
    assert 0.5 < float(allowed) < 0.9 and float(allowed) < float(computed)


def drawn():
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((2, h, 64, 8)).astype(np.float32) for h in (4, 2, 2))
    rope = Rope(jnp.ones(4), jnp.ones(()))
    return q, k, v, rope


@jax.jit
def both(q, k, v, pos, mask, seen, rope):
    none = jnp.zeros((2,), jnp.int32)
    query = Query(q, q, pos, rope, jnp.asarray(20), {}, none, 5.0, True)
    still = dataclasses.replace(query, differentiable=True)
    return (
        attend_bands(query, k, v, seen), attend_new(query, k, v, mask),
        attend_bands(still, k, v, seen),
    )  # fmt: skip


@pytest.mark.parametrize("left", [True, False])
def test_attention_is_that_under_the_mask(left):
    """With a sliding window and a soft cap; what stands in padding is not felt."""
    pos, where, masks, seen = made(1, 1, left=left)
    full = whole(pos, where, masks)
    q, k, v, rope = drawn()
    k[:, :, :][np.broadcast_to((pos < 0)[:, None], k.shape[:3])] = 1e6
    got, want, still = both(q, k, v, jnp.asarray(pos), jnp.asarray(full), seen, rope)
    for b, at in enumerate(where):
        for one in (got, still):
            np.testing.assert_allclose(one.out[b, :, at], want.out[b, :, at], atol=1e-6)
            np.testing.assert_allclose(one.lse[b, :, at], want.lse[b, :, at], atol=1e-5)


def test_gradients_flow():
    pos, where, _, seen = made(1, 1)
    q, k, v, rope = drawn()

    def loss(k):
        none = jnp.zeros((2,), jnp.int32)
        query = Query(q, q, jnp.asarray(pos), rope, none[0], {}, none, differentiable=True)
        out = attend_bands(query, k, v, seen).out
        return sum(jnp.sum(out[b, :, at] ** 2) for b, at in enumerate(where))

    slope = jax.grad(loss)(k)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0.01


def test_refuses():
    for bad in ({"length": -1}, {"length": 4, "carriers": 4}, {"carriers": 0}):
        with pytest.raises(ValueError, match="groups"):
            groups(**bad)
    for bad in ({"chunk": 0}, {"previous": -1}, {"block": 0}):
        with pytest.raises(ValueError, match="in_chunks"):
            in_chunks(Groups(), **bad)
    zero = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="reach=-1"):
        bands(zero, zero, zero > 0, zero > 0, -1)
    seen = bands(jnp.arange(4)[None], zero, zero > 0, zero > 0, 0)
    with pytest.raises(ValueError, match="neither rows nor a mask"):
        attend_chosen(
            Query(*[jnp.zeros((1, 1, 4, 2))] * 2, zero, None, zero, {}, zero), *[None] * 2,
            "causal", Choice(rows=zero > 0, bands=seen),
        )  # fmt: skip
