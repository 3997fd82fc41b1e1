"""Rules among new rows: narrowing, dropping part-way, and what caches then hold."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.cache import (
    Choice,
    LayerMark,
    Mark,
    Query,
    Rule,
    attend_new,
    attending,
    chain,
    commit,
    finish,
    init_cache,
    marked,
    nbytes,
    prune,
    recent,
    rope_of,
    store,
    tokens_held,
)
from kvjax.cache.rule import attend_chosen
from kvjax.decode import prefill
from kvjax.models import forward
from tests.compress import plain_model
from tests.compress.harness import CONFIG, LENGTHS, PROMPT, held, inputs, model

TYPE, NOTE = Mark("type"), LayerMark("note")


@dataclasses.dataclass(frozen=True)
class Some(Rule):
    """In layer l the rows at positions p with p % (l + 2) < `most` take part; the columns note it.

    `ends`: rows of type 1 do not go on behind layer 0."""

    most: int = 1
    ends: bool = False
    drops: bool = False
    reads: tuple = (TYPE,)
    notes: tuple = (NOTE,)

    def start(self, pos, columns):
        kind = columns.get(TYPE.name, jnp.zeros(pos.shape))
        return pos >= 0, kind

    def choose(self, layer, query, keys, carry):
        alive, kind = carry
        rows = alive & (query.pos % (layer + 2) < self.most)
        return Choice(rows, columns={NOTE.name: rows + 10.0 * layer}), (alive, kind)

    def after(self, layer, query, keys, part, carry):
        alive, kind = carry
        return (alive & (kind < 0.5) if self.ends else alive), kind


@dataclasses.dataclass(frozen=True)
class Windowed(Rule):
    """Every row sees the last three rows."""

    def choose(self, layer, query, keys, carry):
        row, key = query.pos[:, :, None], query.pos[:, None]
        return Choice(mask=(row - key < 3) & (key <= row)), carry


@jax.jit
def run(model, cache, x, pos, columns):
    logits, new = forward(
        model, None, pos, cache, phase="prefill", embeddings=x, columns=columns, statistics=True
    )
    return logits, new


def kinds():
    return np.random.default_rng(3).random((3, PROMPT)) < 0.4


def given(rule, **columns):
    x, pos, *_ = inputs(fill=np.nan)
    cache = init_cache(CONFIG, chain(attending(rule), store()), 3, PROMPT + 8, prompt=PROMPT)
    return run(model(), cache, x, pos, columns), cache


def plainly(row, takes):
    """Logits of a sequence; takes(l) bool [n]."""
    x, n = inputs()[0], LENGTHS[row]

    def attention(l, q, k, v):
        t = takes(l, n)
        return plain_model.mix(plain_model.probabilities(q, k, t[:, None] & t), v)

    return plain_model.run(x[row, :n], np.arange(n), attention)


def test_a_rule_that_takes_all_changes_no_bit():
    (logits, new), cache = given(Some(most=99))
    x, pos, *_ = inputs(fill=np.nan)
    plain, other = run(model(), dataclasses.replace(
        cache, transforms=(chain(store()),), state=cache.state[:1] and (cache.state[0][1:],)
    ), x, pos, {})  # fmt: skip
    np.testing.assert_array_equal(logits, plain)
    np.testing.assert_array_equal(new.kv.k, other.kv.k)
    assert new.kv.pos.shape == other.kv.pos.shape == (1, 3, 1, PROMPT)


def test_rows_that_do_not_take_part_neither_see_nor_are_seen():
    (logits, new), _ = given(Some())
    for row, n in enumerate(LENGTHS):
        want = plainly(row, lambda l, n: np.arange(n) % (l + 2) < 1)
        np.testing.assert_allclose(logits[row, :n], want, atol=2e-5)
        note = new.kv.extra["note"][:, row, :, :n]
        want = [(np.arange(n) % (l + 2) < 1) + 10 * l for l in range(CONFIG.layers)]
        np.testing.assert_array_equal(note, np.broadcast_to(np.asarray(want)[:, None], note.shape))
        absent = np.arange(n) % 2 == 1
        assert np.isneginf(new.seen.max[0, row, :, :n][:, absent]).all()
        assert (new.seen.sum[0, row, :, :n][:, absent] == 0).all()


def test_a_mask_by_the_rule():
    (logits, _), _ = given(Windowed())
    x = inputs()[0]
    for row, n in enumerate(LENGTHS):
        i = np.arange(n)
        near = i[:, None] - i < 3
        want = plain_model.run(
            x[row, :n], i, lambda l, q, k, v: plain_model.mix(
                plain_model.probabilities(q, k, near), v)  # noqa: B023
        )  # fmt: skip
        np.testing.assert_allclose(logits[row, :n], want, atol=2e-5)


def test_rows_that_end_part_way_are_gone_for_later_layers():
    """Behind layer 0 the rows of type 1 are as if they had never been."""
    (logits, new), _ = given(Some(most=99, ends=True, drops=True), type=kinds())
    for row, n in enumerate(LENGTHS):
        gone = kinds()[row, :n]
        want = plainly(row, lambda l, n: ~gone if l else np.ones(n, bool))  # noqa: B023
        np.testing.assert_allclose(logits[row, :n][~gone], want[~gone], atol=2e-5)
        there = np.where(gone, -1, np.arange(n))
        np.testing.assert_array_equal(new.kv.pos[1, row, 0, :n], there)
        np.testing.assert_array_equal(new.kv.pos[0, row, 0, :n], np.arange(n))
        assert (new.kv.pos[:, row, 0, n:] == -1).all()
    np.testing.assert_array_equal(new.kv.extra["type"][1, 0, 1], kinds()[0])


@pytest.mark.parametrize(
    "rest",
    [(recent(5), store()), (prune(99, marked(NOTE)), store())],
    ids=["streaming", "pending"],
)
def test_layers_hold_what_the_rule_says(rest):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (3, PROMPT)))
    rule = Some(most=99, ends=True, drops=True)
    _, cache = prefill(
        model(), tokens, chain(attending(rule), *rest), lengths=jnp.asarray(LENGTHS),
        new_tokens=4, columns={"type": kinds()},
    )  # fmt: skip
    want = [
        [[i for i in range(n) if l == 0 or not kinds()[row, i]] for row, n in enumerate(LENGTHS)]
        for l in range(CONFIG.layers)
    ]
    got = held(cache)
    assert [[row[0] for row in layer] for layer in got] == want
    assert [[row[1] for row in layer] for layer in got] == want
    assert cache.length.tolist() == list(LENGTHS)
    assert tokens_held(cache) == 2 * sum(len(row) for layer in want for row in layer)
    # The next token sees in each layer what that layer holds.
    step = jnp.asarray([[3], [5], [7]])
    found, _ = forward(model(), step, cache.length[:, None], cache)
    table = np.asarray(model().embed[...], np.float64)
    for row, n in enumerate(LENGTHS):
        ids = [*np.asarray(tokens)[row, :n], int(step[row, 0])]
        gone = np.append(kinds()[row, :n], False)
        x = table[ids]

        def attention(l, q, k, v):
            t = ~gone if l else np.ones(n + 1, bool)  # noqa: B023
            return plain_model.mix(plain_model.probabilities(q, k, t[:, None] & t), v)

        want = plain_model.run(x, np.arange(n + 1), attention)
        np.testing.assert_allclose(found[row, 0], want[n], atol=2e-5)


@jax.jit
def _both(q, k, v, pos, rows):
    zero = jnp.zeros(())
    query = Query(
        q, q, pos, rope_of(CONFIG, 16)[0], zero, {}, zero, CONFIG.attention_softcap, False
    )
    choice = Choice(rows)
    slow = attend_chosen(query, k, v, "causal", choice)
    few = attend_chosen(query, k, v, "causal", choice, 2)
    return slow, few, attend_new(query, k, v, "causal")


@pytest.mark.parametrize("part", [0.1, 0.4, 1.0])
def test_smaller_programs_compute_the_same(part):
    """600 rows, of which few, many or all take part; a row of the batch has few or none."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((2, h, 600, 8)).astype(np.float32) for h in (4, 2, 2))
    rows = draw.random((2, 600)) < part
    rows[0] &= part == 1.0
    pos = np.broadcast_to(np.arange(600, dtype=np.int32), (2, 600))
    slow, few, plain = _both(q, k, v, pos, rows)
    assert np.isneginf(slow.max[~np.broadcast_to(rows[:, None], (2, 4, 600))]).all()
    for a, b in zip(jax.tree.leaves(slow), jax.tree.leaves(few)):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)
    if part == 1.0:
        np.testing.assert_array_equal(slow.out[1], plain.out[1])


def test_what_does_not_go_together_is_refused():
    one = attending(Windowed())
    with pytest.raises(ValueError, match="under one rule"):
        chain(one, attending(Some()), store())
    with pytest.raises(ValueError, match="exact_layers"):
        init_cache(CONFIG, chain(one, store()), 1, 32, exact_layers=(0,))
    with pytest.raises(ValueError, match="chunk=8: Windowed"):
        prefill(model(), jnp.zeros((1, 24), int), chain(one, store()), new_tokens=1, chunk=8)
    with pytest.raises(ValueError, match="fold=True"):
        cache = init_cache(CONFIG, chain(one, store()), 1, 32)
        forward(model(), jnp.zeros((1, 4), int), jnp.arange(4)[None], cache, phase="prefill",
                fold=True)  # fmt: skip
    assert not cache.foldable


def test_layers_apart_need_a_chain_that_says_so():
    x, pos, *_ = inputs()
    rule = Some(most=1, ends=True, drops=True)
    cache = init_cache(CONFIG, chain(store()), 3, 32, prompt=PROMPT)
    _, new = forward(model(), None, pos, cache, phase="prefill", embeddings=x, rule=rule)
    with pytest.raises(ValueError, match=r"new\.kv\.pos has shape \(2, 3, 1, 24\)"):
        commit(cache, new, phase="prefill")
    pending = init_cache(CONFIG, chain(attending(rule), prune(4, marked(NOTE)), store()), 3, 32, 24)
    _, plain = forward(model(), None, pos, pending, phase="append", embeddings=x)
    with pytest.raises(ValueError, match=r"'note'.*phase='prefill'"):
        commit(pending, plain, phase="prefill")


def test_a_rule_costs_no_bytes():
    size = lambda c: nbytes(  # noqa: E731
        jax.eval_shape(finish, init_cache(CONFIG, c, 2, 544, prompt=512))
    )
    assert size(chain(attending(Some()), store())) == size(chain(store())) + 2 * 4
