"""Verification: paths, bounds, stop tokens, and that the law of what comes out is the target's."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.decode import Sampler, repetition_penalty
from kvjax.speculate import Tree, chain_of, verify

V = 5
judge = jax.jit(verify, static_argnames=("sampler", "stop", "processor"))


def logits_of(tokens):
    """Logits [.., N, V] whose best tokens are these."""
    return 3.0 * jax.nn.one_hot(jnp.asarray(tokens), V)


def tree_of(tokens, parent, q=None):
    depth = [0]
    for p in parent[1:]:
        depth.append(depth[p] + 1)
    return Tree(jnp.asarray([tokens]), jnp.asarray([parent]), max(depth), q)


# --- greedy ---

BRANCHED = ([4, 1, 2, 3, 3, 0, 1], [-1, 0, 0, 1, 2, 4, 4])


@pytest.mark.parametrize(
    ("best", "path", "following"),
    [
        ([0, 0, 0, 0, 0, 0, 0], [0], 0),
        ([1, 0, 0, 0, 0, 0, 0], [0, 1], 0),
        ([1, 3, 0, 2, 0, 0, 0], [0, 1, 3], 2),
        ([2, 3, 3, 0, 1, 0, 4], [0, 2, 4, 6], 4),
    ],
)
def test_walk_follows_the_best_tokens(best, path, following):
    found = judge(tree_of(*BRANCHED), logits_of([best]))
    assert found.path[0, : len(path)].tolist() == path
    assert (found.path[0, len(path) :] == -1).all()
    assert found.next.tolist() == [following] and found.accepted.tolist() == [len(path) - 1]


def test_bounds_and_stop_tokens():
    tree, logits = chain_of(jnp.asarray([[4, 1, 2, 3]] * 4)), logits_of([[1, 2, 3, 0]] * 4)
    found = judge(tree, logits, allowed=jnp.asarray([0, 1, 3, 9]))
    assert found.accepted.tolist() == [0, 1, 3, 3] and found.next.tolist() == [1, 2, 0, 0]
    found = judge(tree, logits, stop=(3,), allowed=jnp.asarray([0, 1, 3, 9]))
    assert found.accepted.tolist() == [0, 1, 2, 2]  # the stop token is never accepted, only said
    assert found.next.tolist() == [1, 2, 3, 3]


def test_no_node_lies_below_a_hole():
    tree = chain_of(jnp.asarray([[4, -1, 2, 3]]))
    found = judge(tree, logits_of([[2, 2, 3, 0]]))
    assert found.accepted.tolist() == [0] and found.next.tolist() == [2]
    assert tree.positions(jnp.asarray([7])).tolist() == [[7, -1, -1, -1]]


def test_errors():
    tree = chain_of(jnp.asarray([[4, 1]]))
    with pytest.raises(ValueError, match="needs key"):
        verify(tree, logits_of([[1, 1]]), sampler=Sampler(temperature=1.0))
    with pytest.raises(ValueError, match="logits of shape"):
        verify(tree, logits_of([[1, 1, 1]]))


# --- the law ---


@st.composite
def laws(draw):
    """A law over V tokens, some of probability 0."""
    weights = draw(st.lists(st.integers(0, 9), min_size=V, max_size=V).filter(any))
    return np.asarray(weights, np.float32) / sum(weights)


DRAWS = 20000


@functools.partial(jax.jit, static_argnames=("children", "replace"))
def outcomes(p, q, key, children, replace):
    """Tokens that come out after the root, one per row, children drawn in turn from q."""

    def one(key):
        rest, tokens, laws = q, [], []
        for _ in range(children):
            key, own = jax.random.split(key)
            whole = jnp.sum(rest)
            law = jnp.where(whole > 0, rest / jnp.where(whole > 0, whole, 1.0), q)
            token = jax.random.categorical(own, jnp.log(law))
            tokens.append(token)
            laws.append(law)
            rest = rest if replace else rest.at[token].set(0.0)
        return jnp.stack([0, *tokens]), jnp.stack([q, *laws])

    tokens, laws = jax.vmap(one)(jax.random.split(key, DRAWS))
    tree = Tree(tokens, jnp.asarray([[-1, *(0,) * children]]), 1, laws)
    logits = jnp.broadcast_to(jnp.log(p), (DRAWS, children + 1, V))
    found = verify(tree, logits, sampler=Sampler(1.0), key=jax.random.fold_in(key, 1))
    first = jnp.take_along_axis(tokens, jnp.maximum(found.path[:, 1:2], 0), 1)[:, 0]
    return jnp.where(found.accepted > 0, first, found.next), found.accepted


def chi_square(counts, p):
    """(statistic, degrees of freedom); what cannot happen must not have."""
    counts, p = np.asarray(counts, np.float64), np.asarray(p, np.float64)
    assert (counts[p == 0] == 0).all()
    counts, p = counts[p > 0], p[p > 0]
    expected = counts.sum() * p / p.sum()
    return ((counts - expected) ** 2 / expected).sum(), len(p) - 1


def fits(counts, p):
    """At most 5 standard deviations above what chi-square is on average: less than 1e-4."""
    statistic, free = chi_square(counts, p)
    assert statistic <= free + 5 * np.sqrt(2 * free) + 5, (statistic, free)


@pytest.mark.parametrize(("children", "replace"), [(1, False), (2, False), (3, True)])
@settings(max_examples=8, deadline=None)
@given(laws(), laws(), st.integers(0, 2**30))
def test_whatever_the_draft_the_law_is_the_targets(children, replace, p, q, seed):
    tokens, _ = outcomes(jnp.asarray(p), jnp.asarray(q), jax.random.key(seed), children, replace)
    fits(np.bincount(tokens, minlength=V), p)


def test_acceptance_is_that_of_theory():
    """Chance that a child is accepted: golden numbers for two laws over three tokens."""
    q, p = np.asarray([0.5, 0.3, 0.2, 0, 0]), np.asarray([0.2, 0.3, 0.5, 0, 0])
    for children, replace, expected in (
        (1, False, 0.7), (2, False, 0.82), (2, True, 0.76), (3, True, 0.808)
    ):  # fmt: skip
        _, accepted = outcomes(jnp.asarray(p), jnp.asarray(q), jax.random.key(3), children, replace)
        # Four standard deviations of a mean of so many draws.
        assert abs(float(accepted.mean()) - expected) < 4 * 0.5 / np.sqrt(DRAWS)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler(0.5),
        Sampler(1.5, top_k=3),
        Sampler(0.8, top_p=0.7),
        *(pytest.param(Sampler(t), marks=pytest.mark.slow) for t in (0.3, 1.0, 2.0)),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_two_tokens_of_a_chain(sampler, drawn):
    """A chain of two guesses; the two tokens that come out against their exact joint law."""
    table = 2.0 * jax.random.normal(jax.random.key(5), (V + 1, V))  # a bigram target; V: the root
    q = jax.nn.softmax(jax.random.normal(jax.random.key(6), (2, V)), -1)
    keys = jax.random.split(jax.random.key(7), 3)
    law = np.asarray(jax.nn.softmax(sampler.filter(table), -1), np.float64)
    if drawn:
        shape = (DRAWS, 2, V)
        guess = jax.random.categorical(keys[0], jnp.broadcast_to(jnp.log(q), shape))
        laws = jnp.concatenate([jnp.zeros((DRAWS, 1, V)), jnp.broadcast_to(q, shape)], 1)
    else:
        guess, laws = jnp.broadcast_to(jnp.argsort(-law[V])[:2][None], (DRAWS, 2)), None
    tree = chain_of(jnp.concatenate([jnp.full((DRAWS, 1), V), guess], 1).astype(jnp.int32), laws)
    found = judge(tree, table[tree.tokens], sampler=sampler, key=keys[1])
    first = jnp.where(found.accepted > 0, guess[:, 0], found.next)
    # Where only one token came out, the next pass would draw the second: do so here.
    again = jax.random.categorical(keys[2], sampler.filter(table)[first])
    second = jnp.where(found.accepted > 1, guess[:, 1], found.next)
    second = jnp.where(found.accepted > 0, second, again)
    counts = np.bincount(np.asarray(first * V + second), minlength=V * V)
    fits(counts, (law[V][:, None] * law[:V]).reshape(-1))
    # Log-probabilities are those of the unfiltered logits, as in plain decoding.
    plain = jax.nn.log_softmax(table)
    np.testing.assert_allclose(found.logprobs[:, 0], plain[V, first], rtol=0, atol=1e-5)


def test_processors_see_the_accepted_path():
    """A token said once is penalised below itself in the tree."""
    processor = repetition_penalty(10.0)
    tree = chain_of(jnp.asarray([[4, 1, 1, 1]]))
    state = processor.init(jnp.asarray([[4]]), V)
    logits = jnp.asarray([[[0.0, 3.0, 2.0, 0.0, 0.0]] * 4])
    for sampler, q in itertools.product(
        (Sampler(), Sampler(0.01)), (None, jnp.ones((1, 4, V)) / V)
    ):
        tree = Tree(tree.tokens, tree.parent, tree.depth, q)
        found = judge(
            tree, logits, processor=processor, state=state, sampler=sampler, key=jax.random.key(0)
        )
        assert found.accepted.tolist() == [1] and found.next.tolist() == [2]
        assert found.processor[0].tolist() == [False, True, False, False, True]
