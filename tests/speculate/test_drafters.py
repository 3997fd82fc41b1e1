"""Prompt lookup and Token Recycling against independent statements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.speculate import (
    Context,
    Outcome,
    chain_template,
    paper_tree,
    prompt_lookup,
    small_tree,
    template,
    token_recycling,
)
from kvjax.speculate.prompt_lookup import continuation

SIZE = 24


def looked_up(text, ngram, width, least, latest):
    """The rule, in words: longest n-gram first; the first (last) occurrence that has enough after
    it; what followed it."""
    for m in range(min(ngram, len(text)), 0, -1):
        starts = [
            s + m
            for s in range(len(text) - m)
            if text[s : s + m] == text[len(text) - m :] and s + m + least <= len(text)
        ]
        if starts:
            start = starts[-1 if latest else 0]
            return (text[start : start + width] + [-1] * width)[:width]
    return [-1] * width


look = jax.jit(continuation, static_argnums=(2, 3, 4, 5))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=SIZE), min_size=2, max_size=2),
    st.sampled_from([(1, 2, 1), (3, 4, 4), (3, 4, 1), (2, 5, 3)]),
    st.booleans(),
)
def test_prompt_lookup_is_the_rule(texts, sizes, latest):
    ngram, width, least = sizes
    tokens = np.full((2, SIZE), -1, np.int32)
    for row, text in zip(tokens, texts):
        row[: len(text)] = text
    lengths = jnp.asarray([len(text) for text in texts])
    found = look(jnp.asarray(tokens), lengths, ngram, width, least, latest)
    assert found.tolist() == [looked_up(t, ngram, width, least, latest) for t in texts]


def test_unknown_history_is_never_matched():
    tokens = jnp.asarray([[-1, -1, 5, -1, -1, -1]])
    assert look(tokens, jnp.asarray([5]), 3, 3, 1, False).tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    "settings", [{"length": 0}, {"ngram": 0}, {"match": "any"}, {"least": 11}, {"least": 0}]
)
def test_prompt_lookup_refuses(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        prompt_lookup(**settings)


# --- Token Recycling ---


def context_of(root, active=None):
    root = jnp.asarray(root)
    batch = len(root)
    return Context(
        None, root[:, None], jnp.ones((batch,), jnp.int32),
        jnp.ones((batch,), bool) if active is None else active, jax.random.key(0),
    )  # fmt: skip


def test_templates():
    tree = paper_tree()
    assert tree.width == 8 and len(set(tree.paths)) == 80
    for number in range(1, 81):
        part = small_tree(number)  # `template` refuses a node without its parent
        assert part.size == number + 1 and set(part.paths) <= set(tree.paths)
    assert chain_template(3).parents == (-1, 0, 1, 2)
    for wrong in ([()], [(0,), (0,)], [(0, 0)], [(-1,)]):
        with pytest.raises(ValueError, match="template"):
            template(wrong)


def test_token_recycling_refuses():
    with pytest.raises(ValueError, match="no node"):
        token_recycling(template([]))
    with pytest.raises(ValueError, match="width=2"):
        token_recycling(template([(0,), (2,)]), width=2)
    with pytest.raises(ValueError, match="between 1 and 80"):
        token_recycling(81)
    with pytest.raises(ValueError, match="a template or a number"):
        token_recycling("2.2.2")


def test_draft_unrolls_the_table():
    drafter = token_recycling(template([(0,), (1,), (0, 0), (1, 1), (0, 0, 1)]), width=2)
    table = jnp.asarray([[1, 2], [2, 3], [3, 0], [-1, 1]])
    tree = drafter.draft(table, context_of([0, 1, 3]))
    assert tree.tokens.tolist() == [
        [0, 1, 2, 2, 0, 0],  # 0 -> 1, 2; 1 -> 2; 2 -> 0 (rank 1); 2 -> 0 (rank 1)
        [1, 2, 3, 3, 1, 1],
        [3, -1, 1, -1, 3, -1],  # a row not known gives no guess, and none below it
    ]


def recycled(table, tokens, positions, best, path):
    """Node after node: accepted ones last, so that they stand; others in order."""
    table = table.copy()
    nodes = [(b, i) for b in range(tokens.shape[0]) for i in range(tokens.shape[1])]
    real = {(b, i) for b, row in enumerate(path) for i in row if i >= 0}
    for b, i in [n for n in nodes if n not in real] + [n for n in nodes if n in real]:
        if positions[b, i] >= 0:
            table[tokens[b, i]] = best[b, i]
    return table


RECYCLING = token_recycling(template([(0,), (1,), (0, 0), (1, 0)]), width=2)
update = jax.jit(lambda table, outcome: RECYCLING.update(table, None, outcome))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30))
def test_update_is_the_rule(seed):
    draw = np.random.default_rng(seed)
    table = jnp.asarray(draw.integers(-1, 6, (6, 2)), jnp.int32)
    root = jnp.asarray(draw.integers(0, 6, 2), jnp.int32)
    tree = RECYCLING.draft(table, context_of(root))
    active = jnp.asarray([5, draw.choice([-1, 3])])
    positions = tree.positions(active)
    logits = jnp.asarray(draw.standard_normal((2, 5, 6)), jnp.float32)
    path = jnp.asarray([[0, 1, 3], [0, 2, -1]])
    path = jnp.where((active >= 0)[:, None], path, -1)
    outcome = Outcome(tree, positions, logits, {}, path, root)
    mine = update(table, outcome)
    best = np.argsort(-np.asarray(logits), -1, kind="stable")[..., :2]
    tokens, positions, path = map(np.asarray, (tree.tokens, positions, path))
    other = recycled(np.asarray(table), tokens, positions, best, path)
    np.testing.assert_array_equal(mine, other)
