"""Which parameters are trained: a tree in two parts, and labels for groups of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Filter = Callable[[str], bool] | str | None


def leaf_name(path: tuple) -> str:
    """The name of a leaf by its path: "layers.q" for `model.layers.q`, an NNX parameter."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def partition(tree: Any, trainable: Filter = None) -> tuple[Any, Any]:
    """(trainable part, frozen part): two trees of the same form, None where the other has the leaf.

    Args:
      tree: any pytree: a model (NNX or not), or a dictionary of models and adapters.
      trainable: says it of each leaf's name: a function, or a regular expression that is to match
        somewhere in it; None: all floating-point leaves.

    Raises:
      ValueError: nothing is trainable, or a chosen leaf has no floating-point numbers.

    >>> params, frozen = partition({"base": jnp.ones(2), "adapter": jnp.zeros(3)}, "^adapter")
    >>> params["base"] is None, frozen["adapter"] is None
    (True, True)
    """
    if isinstance(trainable, str):
        trainable = lambda name, pattern=trainable: re.search(pattern, name) is not None  # noqa: E731
    chosen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        name = leaf_name(path)
        if floating if trainable is None else trainable(name):
            if not floating:
                raise ValueError(
                    f"trainable: {name!r} is {jnp.result_type(leaf)}, which has no gradient"
                )
            chosen.add(path)
    if not chosen:
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        raise ValueError(f"trainable: chooses none of the parameters {', '.join(names)}")
    part = lambda mine: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, leaf: leaf if (path in chosen) == mine else None, tree
    )
    return part(True), part(False)


def combine(params: Any, frozen: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, params, frozen, is_leaf=lambda x: x is None
    )


def labels(params: Any, rules: Mapping[str, str], default: str = "default") -> Any:
    """A label for every leaf, for `optax.multi_transform`: learning rates by group of parameters.

    Args:
      rules: regular expression -> label; the first that matches somewhere in the name counts.

    >>> labels({"embed": jnp.ones(1), "norm": jnp.ones(1)}, {"norm": "slow"})
    {'embed': 'default', 'norm': 'slow'}
    """

    def label(path: tuple, _: Any) -> str:
        name = leaf_name(path)
        return next((found for rule, found in rules.items() if re.search(rule, name)), default)

    return jax.tree_util.tree_map_with_path(label, params)
