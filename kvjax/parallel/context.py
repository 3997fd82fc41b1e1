"""How a cache lies over a mesh, and attention whose slots are split over its devices.

Rows of the batch and heads never meet in attention, so XLA splits them by itself from where the
arrays lie. Slots do meet: each device attends to those that it holds, and the partial results are
put together by `merge`, the monoid that puts together everything else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.cache import Cache, Partial, Query, logical_axes, merge_over
from kvjax.cache.axes import state_axes
from kvjax.cache.stages.stored import Stored
from kvjax.parallel.rules import Rules, parameter_sharding, shardings

RULES = Rules()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a cache lies over the devices of a mesh: `init_cache(..., layout=Layout(mesh))`.

    Equal by value; a static part of the cache.

    Attributes:
      mesh: from `make_mesh`.
      rules: logical axis -> mesh axes.
    """

    mesh: Mesh
    rules: Rules = RULES

    @property
    def context(self) -> tuple[str, ...]:
        """The mesh axes that slots are split over."""
        axes = self.rules.of("slots")
        return tuple(axis for axis in axes if self.mesh.shape.get(axis, 1) > 1)

    @property
    def shards(self) -> int:
        """Into how many runs slots are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.context)

    def shardings(self, cache: Cache) -> Cache:
        """The cache (arrays, or shapes) with the sharding of each array in its place.

        Raises:
          ValueError: see `Rules.spec`; a store in host memory, which belongs to one device.
        """
        stored = lambda x: isinstance(x, Stored)  # noqa: E731
        states = filter(stored, jax.tree.leaves(cache.state, is_leaf=stored))
        if any(state.host for state in states):
            raise ValueError("a cache with store(host=True) lies on one device, not on a mesh")
        return shardings(logical_axes(cache), cache, self.mesh, self.rules)

    def constrain(self, cache: Cache) -> Cache:
        """The cache with its arrays kept where they lie; for use within `jit`."""
        return jax.lax.with_sharding_constraint(cache, self.shardings(cache))

    def create(self, make: Callable[[], Cache]) -> Cache:
        """`make()`, each device making its own part; no array is ever whole on one device."""
        return jax.jit(make, out_shardings=self.shardings(jax.eval_shape(make)))()

    def rows(self, x: Any) -> Array:
        """An array [B, ...] that every process has whole, its rows laid out as those of a cache.

        Raises:
          ValueError: see `Rules.spec`.
        """
        x = np.asarray(x)
        names = ("batch", *(None,) * (x.ndim - 1))
        where = NamedSharding(self.mesh, self.rules.spec(names, x.shape, self.mesh, "rows"))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    def heads(self, *arrays: Array) -> tuple[Array, ...]:
        """Queries, keys and values [B, heads, T, D], each device with the heads that it holds.

        Raises:
          ValueError: see `Rules.spec`.
        """

        def one(x: Array) -> Array:
            spec = self.rules.spec(("batch", "kv_heads", None, None), x.shape, self.mesh)
            return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return tuple(one(x) for x in arrays)

    def everywhere(self, tree: Any) -> Any:
        """Arrays that every device has whole."""
        return jax.device_put(tree, replicated(self.mesh)) if tree else tree

    @property
    def _slots(self) -> Rules:
        """The rule of the slots alone."""
        only = tuple(rule for rule in self.rules.axes if rule[0] == "slots")
        return Rules(only, self.rules.replicate)

    def _run(self, local: Callable, in_specs: Any, out_specs: Any, axes: Any) -> Callable:
        """`local(shard, ...)` on each device of the mesh axes `axes`; XLA goes on splitting the
        others."""
        run = jax.shard_map(
            lambda shard, *rest: local(shard[0], *rest),
            mesh=self.mesh,
            in_specs=(PartitionSpec(self.context), *in_specs),
            out_specs=out_specs,
            axis_names=set(axes),
            check_vma=False,
        )
        return functools.partial(run, jnp.arange(self.shards, dtype=jnp.int32))

    def attend(
        self, attend: Callable, state: Any, layer: Array, query: Query, carry: Any
    ) -> tuple[Partial | None, Any]:
        """`attend(state, layer, query, carry)` of a stage whose slots may be split.

        Each device runs it on the slots that it holds and is told which these are
        (`Query.shard`); everything else of the query it has whole.
        """
        query = dataclasses.replace(query, layout=None)
        if not self.context:
            return attend(state, layer, query, carry)
        where = shardings(state_axes(state), state, self.mesh, self._slots)
        specs = jax.tree.map(lambda sharding: sharding.spec, where)
        whole = PartitionSpec()
        if all(spec == whole for spec in jax.tree.leaves(specs)):
            return attend(state, layer, query, carry)

        def local(
            shard: Array, state: Any, layer: Array, query: Query, carry: Any
        ) -> tuple[Partial, Any]:
            part, carry = attend(state, layer, dataclasses.replace(query, shard=shard), carry)
            return merge_over(part, self.context), carry

        run = self._run(local, (specs, whole, whole, whole), (whole, whole), self.context)
        return run(state, layer, query, carry)

    def write(
        self, put: Callable[[Array, Array, Array], Array], x: Array, slot: Array, rows: Array
    ) -> Array:
        """`put(x, slot, rows)`, see `put_rows`, each device into the part of x that it holds.

        All mesh axes are taken by hand: of a scatter into an array that is split along several,
        XLA's partitioner makes a gather, or fails where some are by hand and others are not.
        """
        names = ("layers", "batch", "kv_heads", "slots")
        of = lambda x, n: self.rules.spec(names[:n], x.shape[:n], self.mesh)  # noqa: E731
        split = of(x, 4)

        def local(shard: Array, x: Array, slot: Array, rows: Array) -> Array:
            here = slot - shard * x.shape[3] if len(split) > 3 else slot
            return put(x, here, rows)

        specs = (split, of(slot, 3), of(rows, 3))
        return self._run(local, specs, split, self.mesh.axis_names)(x, slot, rows)


def shard(tree: Any, mesh: Mesh, rules: Rules | None = None) -> Any:
    """A model or a cache with its arrays laid over a mesh.

    A cache whose slots are to be split must have been made for it, with
    `init_cache(..., layout=Layout(mesh, rules))`, which also lays it out; a large model is better
    loaded straight to its place, `kvjax.load(name, sharding=parameter_sharding(mesh))`.

    Args:
      tree: a `Model` or a `Cache`.
      rules: None: `Rules()`.

    Raises:
      ValueError: see `Rules.spec`; a cache that was made for another number of context devices.
    """
    from kvjax.models.llama import Model, flatten

    rules = Rules() if rules is None else rules
    if isinstance(tree, Model):
        where = parameter_sharding(mesh, rules).all(tree.config)
        flat = {name: jax.device_put(x, where[name]) for name, x in flatten(tree).items()}
        return Model(tree.config, flat)
    if not isinstance(tree, Cache):
        raise ValueError(f"shard({type(tree).__name__}): expected a Model or a Cache")
    layout = Layout(mesh, rules)
    made = 1 if tree.layout is None else tree.layout.shards
    if layout.shards != made:
        raise ValueError(
            f"shard(cache): slots split over {layout.shards} devices, but the cache was made for "
            f"{made}; make it with init_cache(..., layout=Layout(mesh, rules))"
        )
    tree = tree.replace(layout=layout)
    return jax.device_put(tree, layout.shardings(tree))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of the mesh has whole."""
    return NamedSharding(mesh, PartitionSpec())
