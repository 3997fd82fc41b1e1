"""kvjax's own checkpoints: parameters with orbax, the configuration as JSON beside them."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from kvjax.models.config import Config, RopeConfig
from kvjax.models.errors import CheckpointError
from kvjax.models.json_file import read_json
from kvjax.models.llama import Model, dtype_of, flatten, parameters
from kvjax.models.mamba2 import Mamba2
from kvjax.models.tokenizer import Tokenizer
from kvjax.models.weights import Sharding, sharding_of

# Kinds of recurrent layers by the name that kvjax.json calls them; add your own before loading.
RECURRENCES: dict[str, type] = {"mamba2": Mamba2}
CONFIG = "kvjax.json"
_FORMAT = 1


def save(
    folder: str | os.PathLike, model: Model, tokenizer: Tokenizer | None = None, force: bool = False
) -> None:
    """Writes a model: `params` (orbax) and kvjax.json; the tokenizer too when given.

    On several hosts every process calls it with the same folder.

    Raises:
      FileExistsError: the folder holds a checkpoint already and `force` is False.
      ValueError: the kind of recurrent layer is not in `RECURRENCES`.
    """
    folder = pathlib.Path(folder).resolve()
    config = _plain(model.config)
    if is_checkpoint(folder) and not force:
        raise FileExistsError(f"{folder} holds a checkpoint already; force=True replaces it")
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", flatten(model), force=force)
    if jax.process_index() == 0:
        if tokenizer is not None:
            tokenizer.save(folder)
        # Last and in one step: a folder with this file is complete.
        text = json.dumps({"format": _FORMAT, "config": config}, indent=2)
        (folder / f"{CONFIG}.tmp").write_text(text)
        os.replace(folder / f"{CONFIG}.tmp", folder / CONFIG)


def is_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether `save` has written this folder."""
    return (pathlib.Path(folder) / CONFIG).is_file()


def load(
    folder: str | os.PathLike,
    *,
    dtype: jnp.dtype | None = None,
    sharding: Sharding = None,
    check_finite: bool = False,
) -> Model:
    """Reads what `save` wrote, straight into the wanted dtype and sharding.

    Args:
      folder: the folder.
      dtype: floating dtype of the parameters; None: as saved.
      sharding, check_finite: as in `kvjax.models.weights.assemble`.

    Raises:
      CheckpointError: the configuration is malformed, or the parameters are not those it names.
    """
    folder = pathlib.Path(folder).resolve()
    config = _config(folder / CONFIG)
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / "params").item_metadata
        stored = dict(getattr(stored, "tree", stored))
        target = {}
        for name, (shape, axes) in parameters(config).items():
            if name not in stored or tuple(stored[name].shape) != shape:
                found = stored[name].shape if name in stored else "nothing"
                raise CheckpointError(f"{folder}: parameter {name!r}: {found}, expected {shape}")
            place = sharding_of(sharding, name, shape, axes)
            if place is None:
                place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            own = stored[name].dtype if dtype is None else dtype_of(config, name, dtype)
            target[name] = jax.ShapeDtypeStruct(shape, own, sharding=place)
        extra = sorted(stored.keys() - target)
        if extra:
            raise CheckpointError(f"{folder}: parameters {extra} are unknown to the configuration")
        params = checkpointer.restore(folder / "params", target)
    if check_finite:
        for name, value in params.items():
            if not bool(jnp.isfinite(value).all()):
                raise CheckpointError(f"{folder}: parameter {name!r} has NaN or infinite values")
    return Model(config, params)


def _config(path: pathlib.Path) -> Config:
    found = read_json(path, 2**24)
    if found.get("format") != _FORMAT or not isinstance(found.get("config"), dict):
        raise CheckpointError(
            f"{path}: format {found.get('format')!r}, this kvjax reads format {_FORMAT}"
        )
    try:
        return _restore(Config, found["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _plain(config: Config) -> dict:
    """A configuration as JSON values; a recurrence with the name of its kind."""
    values = dataclasses.asdict(config)
    if config.recurrence is not None:
        names = [name for name, kind in RECURRENCES.items() if type(config.recurrence) is kind]
        if not names:
            raise ValueError(
                f"recurrence={config.recurrence}: its kind is not in kvjax.models.checkpoint."
                f"RECURRENCES ({', '.join(RECURRENCES)}), so it could not be read back"
            )
        values["recurrence"]["kind"] = names[0]
    return values


def _restore(kind: type, values: dict):
    """A frozen dataclass from its JSON values: lists are tuples, inner dictionaries RopeConfigs, or
    the recurrence that "kind" names."""
    fixed = {}
    for name, value in values.items():
        if isinstance(value, dict):
            inner = dict(value)
            home = RECURRENCES[inner.pop("kind")] if name == "recurrence" else RopeConfig
            value = _restore(home, inner)
        fixed[name] = tuple(value) if isinstance(value, list) else value
    return kind(**fixed)
