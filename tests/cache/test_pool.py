"""The pool, where every head holds another number of tokens: equal to a masked dense computation.

Budgets are drawn at random by a test-defined `Budget`: any head may get no prompt token at all,
or one, and rows of the batch have prompts of unequal length. Then every head grows by decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import Budget, Spec, Window, chain, first, key_norm, prune, recent, store
from kvjax.cache.paging import PAGE, Pool
from kvjax.cache.stages.store import Stored
from kvjax.codecs import per_kv, quantize
from tests.cache.harness import (
    BATCH,
    KV_HEADS,
    LAYERS,
    close,
    dense,
    done,
    empty,
    part,
    ragged_positions,
    rows,
    step,
)

PROMPT, DECODE = 24, 10


@dataclasses.dataclass(frozen=True)
class Drawn(Budget):
    """Layer l keeps `each[l]` tokens per head, shared out by chance, drawn from the scores."""

    each: tuple[int, ...]

    @property
    def ragged(self):
        return True

    def layers(self, kept, length, count):
        xp = np if isinstance(kept, np.ndarray) else jnp
        return xp.stack([xp.minimum(n, length) for n in self.each[:count]])

    def heads(self, value, per_head):
        """Stick breaking within the layer's total; no head more than there is."""
        there = jnp.sum(value > -jnp.inf, -1)
        left = jnp.minimum(per_head * KV_HEADS, jnp.sum(there, -1))
        best = jnp.argmax(value, -1).reshape(-1)
        seed = jnp.sum(best * 31 ** jnp.arange(best.size))  # as good as chance
        draw = jax.random.uniform(jax.random.key(seed), value.shape[:3])
        draw = jnp.where(draw < 0.3, 0.0, jnp.where(draw > 0.7, 1.0, draw))
        out = []
        for head in range(KV_HEADS):
            n = jnp.minimum((draw[:, :, head] * (left + 1)).astype(jnp.int32), left)
            out.append(jnp.minimum(n, there[:, :, head]))
            left = left - out[-1]
        return jnp.stack(out, -1)

    def most(self, per_head, length, heads):
        return min(length, per_head * heads)


def held_positions(cache):
    """bool [L, B, H, position]: what the pool holds, read off its own addresses."""
    own = next(s for s in cache.state[0] if isinstance(s, Stored))
    pos, address, seen = (np.asarray(x) for x in (own.pos, own.place.address, own.seen))
    held = np.zeros((LAYERS, BATCH, KV_HEADS, PROMPT + DECODE), bool)
    taken = np.zeros(pos.size, int)
    for at in np.ndindex(*address.shape):
        run = slice(address[at], address[at] + seen[at])
        taken[run] += 1
        assert (pos[run] >= 0).all() and len(set(pos[run])) == seen[at]
        held[at][pos[run]] = True
    assert taken.max() <= 1, "two heads share a slot"
    return held, own


some = prune(6, key_norm(), budget=Drawn((6, 6)))
few = prune(6, key_norm(), budget=Drawn((1, 11)))
CHAINS = {
    "even": (some, chain(store())),
    "uneven": (few, chain(store())),
    "window before": (few, chain(recent(3, 4), store())),
    "windows": (few, chain(store(keys=Window(0, 8), values=Window(5, 1)))),
    "before rotation": (some, chain(first(2), store(rope="before"))),
}


def decode(transform, r):
    cache = finished(transform, r)
    outs = []
    for start in range(PROMPT, PROMPT + DECODE):
        out, cache = step(cache, part(r, start, start + 1))
        outs.append(np.asarray(out))
    return np.concatenate(outs, 3), cache


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_pool_is_masked_dense_attention(name, seed):
    pick, last = CHAINS[name]
    r = rows(seed, PROMPT + DECODE, ragged_positions(seed, PROMPT, DECODE))
    # What every head keeps is read off a store of nothing else, and is checked there.
    ready = finished(chain(pick, store()), r)
    held, own = held_positions(ready)
    check_sizes(own, np.asarray(own.seen), DECODE)
    out, cache = decode(chain(pick, last), r)
    keep = np.zeros((LAYERS, BATCH, KV_HEADS, PROMPT + DECODE, PROMPT + DECODE), bool)
    for b in range(BATCH):
        at = np.maximum(r["pos"][b], 0)
        keep[:, b] = (held[:, b][:, :, at] | (np.arange(PROMPT + DECODE) >= PROMPT))[:, :, None]
    want, _ = dense(r, keep=keep)
    close(out, want[:, :, :, PROMPT:], r["pos"][:, PROMPT:])
    if len(last.stages) == 1:
        again, _ = held_positions(cache)
        assert (again & held == held).all() and again.sum() > held.sum()


def finished(transform, r):
    cache = empty(transform, PROMPT + DECODE, PROMPT)
    for start in range(0, PROMPT, 8):
        _, cache = step(cache, part(r, start, start + 8), "prefill")
    return done(cache)


def check_sizes(own, prompt, growth):
    """Every run of pages has room for prompt and growth, and less than a page to spare."""
    pool: Pool = own.place
    pages = np.zeros((LAYERS, BATCH * KV_HEADS), int)
    owner = np.asarray(pool.owner)
    for layer in range(LAYERS):
        cut = owner[pool.starts[layer] // pool.page : pool.starts[layer + 1] // pool.page]
        for head in range(BATCH * KV_HEADS):
            pages[layer, head] = (cut == head).sum()
    need = prompt.reshape(LAYERS, -1) + growth
    room = pages * pool.page
    assert (room >= need).all() and (room - need < pool.page).all()


SPEC = Spec(3, 2, 4, 4, 8, 30 + 9, 30, totals=(40, 4, 77))


@jax.jit
def allocate(pool, count):
    return pool.allocate(count)


@st.composite
def counts(draw):
    """Prompt tokens [L, B, H] within each layer's total, many of them 0 or 1."""
    out = np.zeros((3, 2, 4), int)
    for layer, total in enumerate(SPEC.totals):
        for row in range(2):
            left = total
            for head in draw(st.permutations(range(4))):
                n = draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, 30)))
                out[layer, row, head] = min(n, left, 30)
                left -= out[layer, row, head]
    return out


@settings(max_examples=100, deadline=None)
@given(counts(), st.booleans(), st.booleans())
def test_allocation_is_a_partition(count, grows, shared):
    growth = 9 if grows else 0
    spec = SPEC if grows else SPEC.replace(max_length=30)
    if shared:  # one total for all layers: what one leaves another may take
        spec = spec.replace(totals=(sum(SPEC.totals),))
        count = count[::-1]
    pool = Pool.init(spec, 30 + growth, 1)
    assert pool.shared == shared
    pool = allocate(pool, jnp.asarray(count + growth))
    address, owner = np.asarray(pool.address), np.asarray(pool.owner)
    wanted = np.full(owner.shape, -1)
    for layer, row, head in np.ndindex(*count.shape):
        start = address[layer, row, head]
        pages = -(-(count[layer, row, head] + growth) // PAGE)
        assert start % PAGE == 0
        assert pool.starts[layer] <= start
        assert start + pages * PAGE <= pool.starts[layer + 1]
        run = slice(start // PAGE, start // PAGE + pages)
        assert (wanted[run] == -1).all(), "two heads share a page"
        wanted[run] = row * 4 + head
    np.testing.assert_array_equal(owner, wanted)


def test_pool_of_groups_holds_what_it_was_given():
    """Coded pools: at eight bits, every head's attention is that of its own tokens within the
    codes' error; with tokens in another head's pages it would be off by the size of the values."""
    codec = per_kv(k=quantize(8, axis="channel", group=8), v=quantize(8))
    coded = chain(few, store(codec, keys=Window(0, 8), values=Window(8, 1)))
    r = rows(4, PROMPT + DECODE, ragged_positions(4, PROMPT, DECODE))
    got, want = (decode(t, r)[0] for t in (coded, chain(few, store())))
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
