"""Checkpoints of a training run: its state and its place in the data, by orbax."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from kvjax.train.parts import leaf_name


class Checkpoints:
    """Steps of one run in a folder: `<folder>/<step>/state` and `<folder>/<step>/data`.

    A step is complete or absent: orbax writes it beside and renames it. On several hosts every
    process makes one with the same folder and calls it alike. Use it as a context manager.

        with Checkpoints("run", every=500) as checkpoints:
            state = checkpoints.restore(state, data)   # as given, where nothing is saved
            state = fit(step, state, frozen, data, 5000, checkpoints=checkpoints)
    """

    def __init__(self, folder: str | os.PathLike, every: int = 1000, keep: int = 2):
        """Args:
        folder: made when it does not exist.
        every: steps from one checkpoint to the next. keep: how many of the newest stay.
        """
        if every < 1 or keep < 1:
            raise ValueError(f"every={every}, keep={keep}: expected at least 1")
        managers = ocp.checkpoint_managers
        when = (managers.FixedIntervalPolicy(every), managers.PreemptionCheckpointingPolicy())
        # In the background, but not on CPU, where arrays share memory with what the next step
        # overwrites.
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=managers.AnySavePolicy(when),
            max_to_keep=keep,
            enable_async_checkpointing=jax.default_backend() != "cpu",
        )
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            pathlib.Path(folder).resolve(), options=options, item_handlers=handlers
        )

    @property
    def latest(self) -> int | None:
        """The last step saved."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether to save after this step: at the interval, or when the host is to be preempted."""
        return self._manager.should_save(step)

    def save(self, state: Any, data: Any) -> None:
        """Saves now.

        Args:
          state: a pytree with a field `step`.
          data: a `grain.DatasetIterator`: of it the place is saved, not the examples.
        """
        step = int(state.step)
        if step == self.latest:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_flat(state)), data=grain.checkpoint.CheckpointSave(data)
        )
        self._manager.save(step, args=args, force=True)

    def restore(self, state: Any, data: Any, step: int | None = None) -> Any:
        """The state of a saved step, and `data` set to where it was then.

        Args:
          state: of the same form, as `start` gives it: its shapes, dtypes and shardings are those
            of what is read (a run may go on with other devices).
          data: an iterator made in the same way.
          step: which; None: the last one.

        Returns:
          The state; the one given, if nothing has been saved yet.

        Raises:
          ValueError: the step was not saved, or what was saved is a state of another form.
        """
        if step is None and self.latest is None:
            return state
        step = self.latest if step is None else step
        if step not in self._manager.all_steps():
            raise ValueError(f"step={step}: saved are {self._manager.all_steps()}")
        target = _flat(state)
        stored = self._manager.item_metadata(step)["state"]
        stored = dict(getattr(stored, "tree", stored))
        for name in sorted(stored.keys() | target.keys()):
            shapes = [
                tuple(tree[name].shape) if name in tree else None for tree in (stored, target)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"checkpoint of step {step}: {name!r} has shape {shapes[0]}, expected "
                    f"{shapes[1]}; it belongs to another model or optimizer"
                )
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in target.items()
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(data)
        )
        return _unflat(self._manager.restore(step, args=args)["state"], state)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _flat(state: Any) -> dict[str, jax.Array]:
    """Name -> leaf, keys as numbers: files do not depend on the classes of a state."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found[leaf_name(path)] = jax.random.key_data(leaf) if key else leaf
    return found


def _unflat(flat: dict[str, jax.Array], state: Any) -> Any:
    def leaf(path: tuple, like: jax.Array) -> jax.Array:
        value = flat[leaf_name(path)]
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
        return value

    return jax.tree_util.tree_map_with_path(leaf, state)
