"""Trees in two parts."""

import jax
import jax.numpy as jnp
import optax
import pytest

from kvjax.train import combine, labels, partition


def names(tree):
    from kvjax.train import leaf_name

    return [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_combine_is_the_inverse(tiny):
    for chosen in (None, "norm", lambda name: name.startswith("layers.q"), "^head$"):
        params, frozen = partition(tiny, chosen)
        back = combine(params, frozen)
        assert jax.tree.structure(back) == jax.tree.structure(tiny)
        assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tiny)))
        assert len(jax.tree.leaves(params)) + len(jax.tree.leaves(frozen)) == len(names(tiny))


def test_names_choose(tiny):
    assert names(partition(tiny, "norm")[0]) == [
        "layers.attention_norm", "layers.mlp_norm", "norm",
    ]  # fmt: skip
    assert names(partition({"student": tiny, "teacher": tiny}, "^student.head")[0]) == [
        "student.head"
    ]


def test_integers_are_frozen_unless_asked_for():
    tree = {"codes": jnp.zeros(3, jnp.int8), "scale": jnp.ones(3)}
    assert names(partition(tree)[0]) == ["scale"]
    with pytest.raises(ValueError, match="'codes' is int8"):
        partition(tree, "codes")
    with pytest.raises(ValueError, match="none of the parameters codes, scale"):
        partition(tree, "adapter")


def test_labels_give_groups_their_own_rates(tiny):
    params, _ = partition(tiny, "norm|head")
    marks = labels(params, {"^layers": "fast", "norm": "slow"}, default="still")
    assert [mark for mark in jax.tree.leaves(marks)] == ["still", "fast", "fast", "slow"]
    rates = {"fast": optax.sgd(1.0), "slow": optax.sgd(0.1), "still": optax.set_to_zero()}
    optimizer = optax.multi_transform(rates, marks)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    found = [float(u.ravel()[0]) for u in jax.tree.leaves(updates)]
    assert found == pytest.approx([0.0, -1.0, -1.0, -0.1])
