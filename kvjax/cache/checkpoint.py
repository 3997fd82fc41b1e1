"""A cache on disk: what it holds, with orbax, read back into a cache of the same kind."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from kvjax.cache.cache import Cache
from kvjax.cache.stages.stored import Stored


def save_cache(folder: str | os.PathLike, cache: Cache, force: bool = False) -> None:
    """Writes the arrays of a cache, constants included, each under its place in the tree.

    On several hosts every process calls it with the same folder.

    Args:
      folder: written by orbax, whole or not at all.
      force: replace what is there.

    Raises:
      ValueError: the folder exists and `force` is False.
    """
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder).resolve(), _arrays(cache), force=force)


def restore_cache(folder: str | os.PathLike, like: Cache) -> Cache:
    """Reads what `save_cache` wrote; decoding goes on identically.

    Args:
      like: a cache of the same method and sizes, or only its shapes:

          like = jax.eval_shape(
              lambda: finish(init_cache(config, method, batch, max_length, prompt=prompt))
          )

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it holds other arrays than `like`: the first of them is named.
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(folder).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no saved cache is there")
    wanted = _arrays(like)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata
        stored = dict(getattr(stored, "tree", None) or stored or {})
        kind = lambda x: f"{jnp.dtype(x.dtype).name}{list(x.shape)}"  # noqa: E731
        for name in sorted(wanted.keys() | stored.keys()):
            have = kind(stored[name]) if name in stored else "nothing"
            want = kind(wanted[name]) if name in wanted else "nothing"
            if have != want:
                raise ValueError(
                    f"{folder}: {name} is {have}, expected {want}: it was saved from another "
                    "method, or with other sizes"
                )
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        place = lambda x: x.sharding if isinstance(x, jax.Array) else device  # noqa: E731
        found = checkpointer.restore(
            folder,
            {
                n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x))
                for n, x in wanted.items()
            },
        )
    # Arrays without elements are not written.
    leaf = lambda path, x: found.get(_name(path), x if x.size else jnp.zeros(x.shape, x.dtype))  # noqa: E731
    cache = jax.tree_util.tree_map_with_path(leaf, like)
    stored = lambda x: isinstance(x, Stored)  # noqa: E731
    return jax.tree.map(lambda x: x.settled() if stored(x) else x, cache, is_leaf=stored)


def _arrays(cache: Cache) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return {_name(path): x for path, x in leaves if x.size}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
