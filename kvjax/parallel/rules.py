"""Rules: which mesh axes the logical axes of parameters and caches are split over, as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes; equal by value. Axes without a rule, or of size 1, are whole.

    Query heads, MLP channels and the vocabulary of the weights are split over tensor and context
    together, so that context devices need not hold the same weights; of a step's activations
    little has to move for it.

    Attributes:
      axes: ((logical axis, (mesh axis, ...)), ...).
      replicate: logical axes of which an array may have fewer shards than the rule says, down to
        none, where its size does not divide: the longest run of mesh axes that divides it. For
        all others that is an error.

    >>> Rules().replace(mlp=("tensor",)) == Rules().replace(mlp="tensor")
    True
    """

    axes: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("batch", ("data",)),
        ("heads", ("tensor", "context")),
        ("inner", ("tensor", "context")),
        ("kv_heads", ("tensor",)),
        ("mlp", ("tensor", "context")),
        ("slots", ("context",)),
        ("vocab", ("tensor", "context")),
    )
    # A window of a few tokens is not worth splitting; stores make their slots divide. The inner
    # width of a recurrent layer is several parts side by side, of sizes that seldom divide alike.
    replicate: tuple[str, ...] = ("slots", "inner")

    def replace(
        self, replicate: tuple[str, ...] | None = None, **axes: str | tuple[str, ...] | None
    ) -> Rules:
        """These rules with others in place of some; None: not split."""
        table = dict(self.axes)
        for name, value in axes.items():
            value = (value,) if isinstance(value, str) else value
            table[name] = tuple(value or ())
        kept = tuple(sorted((name, value) for name, value in table.items() if value))
        return Rules(kept, self.replicate if replicate is None else tuple(replicate))

    def of(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of one logical axis."""
        return dict(self.axes).get(name, ())

    def spec(self, names: Names, shape: tuple[int, ...], mesh: Mesh, what: str = "") -> Any:
        """The PartitionSpec of an array.

        Args:
          names: a logical axis name or None for each of its axes. shape: its sizes.
          what: what errors call it.

        Raises:
          ValueError: a size that the mesh axes do not divide, a mesh axis the mesh has not, or one
            mesh axis for two axes of the array.
        """
        chosen, taken = [], {}
        for name, size in zip(names, shape, strict=True):
            axes = self.of(name)
            if unknown := [axis for axis in axes if axis not in mesh.shape]:
                raise ValueError(
                    f"rules: {name!r} -> {axes}: the mesh has no axis {unknown[0]!r}; it has "
                    f"{', '.join(mesh.axis_names)}"
                )
            axes = tuple(axis for axis in axes if size > 1 and mesh.shape[axis] > 1)
            while axes and size % math.prod(mesh.shape[axis] for axis in axes):
                if name not in self.replicate:
                    raise ValueError(
                        f"{what or 'array'} of shape {tuple(shape)}: its axis {name!r} of size "
                        f"{size} does not divide into {_product(axes, mesh)} parts; choose another "
                        f"mesh, or say Rules().replace(replicate=({name!r}, ...)) to let it be "
                        "replicated"
                    )
                axes = axes[:-1]
            for axis in axes:
                if axis in taken:
                    raise ValueError(
                        f"{what or 'array'} of shape {tuple(shape)}: rules split both "
                        f"{taken[axis]!r} and {name!r} over the mesh axis {axis!r}"
                    )
                taken[axis] = name
            chosen.append(axes if len(axes) > 1 else (axes[0] if axes else None))
        while chosen and chosen[-1] is None:
            chosen.pop()
        return PartitionSpec(*chosen)


def _product(axes: tuple[str, ...], mesh: Mesh) -> str:
    return " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)


def shardings(axes: Any, arrays: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """The sharding of every array of a tree.

    Args:
      axes: the tree with a tuple of logical axis names in place of each array, as
        `kvjax.cache.logical_axes(cache)` and `kvjax.models.llama.logical_axes(config)` give.
      arrays: the tree itself: arrays, or anything with a shape, or shapes.
      mesh: from `make_mesh`. rules: None: `Rules()`.

    Returns:
      The tree of `NamedSharding`.

    Raises:
      ValueError: see `Rules.spec`.

    >>> from jax.sharding import PartitionSpec
    >>> from kvjax.parallel import make_mesh
    >>> shardings({"w": ("embed", "mlp")}, {"w": (8, 16)}, make_mesh())["w"].spec == PartitionSpec()
    True
    """
    rules = Rules() if rules is None else rules
    plain = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    paths, structure = jax.tree_util.tree_flatten_with_path(arrays, is_leaf=plain)
    names = structure.flatten_up_to(axes)

    def one(path: Any, x: Any, names: Names) -> NamedSharding:
        shape = x if isinstance(x, tuple) else x.shape
        what = jax.tree_util.keystr(path)
        return NamedSharding(mesh, rules.spec(names, shape, mesh, what))

    return structure.unflatten([one(path, x, n) for (path, x), n in zip(paths, names)])


@dataclasses.dataclass(frozen=True)
class ParameterSharding:
    """Where each parameter of a model goes: what `kvjax.load(..., sharding=...)` takes."""

    mesh: Mesh
    rules: Rules

    def by_axes(self, name: str, shape: tuple[int, ...], axes: Names) -> NamedSharding:
        """The sharding of one parameter, from its logical axis names.

        Raises:
          ValueError: see `Rules.spec`.
        """
        what = f"parameter {name!r}"
        return NamedSharding(self.mesh, self.rules.spec(axes, shape, self.mesh, what))

    def all(self, config: Any) -> dict[str, NamedSharding]:
        """Flat parameter name -> sharding, for a model of that configuration."""
        from kvjax.models.llama import parameters

        return {name: self.by_axes(name, *found) for name, found in parameters(config).items()}


def parameter_sharding(mesh: Mesh, rules: Rules | None = None) -> ParameterSharding:
    """Where the parameters of any model go, whatever its kinds of layers:
    `kvjax.load(name, sharding=parameter_sharding(mesh))`.

    Args:
      mesh: from `make_mesh`. rules: None: `Rules()`.
    """
    return ParameterSharding(mesh, Rules() if rules is None else rules)
