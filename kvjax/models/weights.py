"""From tensors in files to stacked parameters on devices, one parameter and few rows at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.models.config import Config
from kvjax.models.errors import CheckpointError
from kvjax.models.llama import Model, dtype_of, logical_axes, parameters, stacked

CHUNK_BYTES = 2**23  # float32 bytes of one tensor that are in flight at a time


class ByAxes(Protocol):
    """Says where a parameter goes by its logical axes (`kvjax.parallel.parameter_sharding`)."""

    def by_axes(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> jax.sharding.Sharding: ...


Sharding = (
    jax.sharding.Sharding
    | Mapping[str, jax.sharding.Sharding]
    | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
    | ByAxes
    | None
)


class Tensor(Protocol):
    """A tensor in a file: nothing is read until `rows` is called."""

    name: str
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of the first axis, [stop - start, ...], in a floating dtype."""
        ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one layer of one parameter is found: some rows of a tensor.

    Attributes:
      tensor: the tensor, [rows, ...].
      start, stop: its rows that belong to the parameter; None: to the end.
      places: row `start + i` of the tensor is row places[i] of the parameter; None: row i.
      shift: added to every value (GGUF stores Gemma's norms as 1 + w).
    """

    tensor: Tensor
    start: int = 0
    stop: int | None = None
    places: np.ndarray | None = None
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, one layer of it."""
        first, *rest = self.tensor.shape
        return (min(first if self.stop is None else self.stop, first) - self.start, *rest)


def assemble(
    config: Config,
    find: Callable[[str, int], Piece],
    *,
    dtype: jnp.dtype = jnp.float32,
    sharding: Sharding = None,
    check_finite: bool = False,
    source: str = "checkpoint",
) -> Model:
    """Builds a model from the pieces that `find(name, layer)` returns.

    All names and shapes are checked before anything is allocated. Parameters are then read the
    largest first, shard by shard, so that host memory stays near the model's own size.

    Args:
      config: what the model is.
      find: (flat parameter name, layer among those of its kind; 0 for those without layers) ->
        Piece; raises CheckpointError where the tensor is missing.
      dtype: floating dtype of the parameters (of a recurrence some stay float32).
      sharding: one sharding, a mapping from flat name, a function of (flat name, shape), or rules
        (`kvjax.parallel.parameter_sharding`); None: the default device.
      check_finite: refuse NaN and infinity.
      source: what error messages call the checkpoint.

    Raises:
      CheckpointError: a tensor is missing, has another shape than the config says, or holds
        values that are not finite or do not fit the dtype.
      TypeError: dtype is not a floating dtype.
    """
    dtype = np.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype={dtype}: parameters need a floating dtype")
    plan = {}
    for name, (shape, _) in parameters(config).items():
        layers = stacked(name)
        plan[name] = shape, [find(name, layer) for layer in range(shape[0] if layers else 1)]
        expected = shape[1:] if layers else shape
        for piece in plan[name][1]:
            if piece.shape != expected:
                raise CheckpointError(
                    f"{source}: tensor {piece.tensor.name!r} of shape {piece.tensor.shape} gives "
                    f"{piece.shape} for {name!r}, but the configuration says {expected}"
                )
    _check_rope(config, source)
    params = {}
    axes = logical_axes(config)
    for name in sorted(plan, key=lambda name: -math.prod(plan[name][0])):
        shape, pieces = plan[name]
        own = np.dtype(dtype_of(config, name, dtype))

        def block(index, name=name, shape=shape, pieces=pieces, own=own):
            return _read_block(pieces, name, shape, index, own, check_finite, source)

        params[name] = _place(block, shape, sharding_of(sharding, name, shape, axes[name]))
    return Model(config, params)


def _check_rope(config: Config, source: str) -> None:
    """Refuses rotary rules that give no usable frequencies, before anything is allocated."""
    if not config.attention_layers:
        return
    for rope in (config.rope, config.local_rope):
        if rope is None:
            continue
        try:
            with np.errstate(all="ignore"):
                for length in (1, 2**31):
                    frequencies, factor = rope.frequencies(
                        config.rotated, config.max_length, length
                    )
                    usable = np.isfinite(frequencies).all() and 0 < factor < np.inf
        except (ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{source}: rotary rule {rope.kind!r}: {error}") from None
        if not usable:
            raise CheckpointError(
                f"{source}: rotary rule {rope} gives frequencies that are not finite"
            )


def sharding_of(
    sharding: Sharding, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.sharding.Sharding | None:
    """The sharding of one parameter, or None for the default device."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        return sharding
    if isinstance(sharding, Mapping):
        if name not in sharding:
            raise ValueError(f"sharding has no entry for parameter {name!r}")
        return sharding[name]
    if hasattr(sharding, "by_axes"):
        return sharding.by_axes(name, shape, axes)
    return sharding(name, shape)


def _place(block: Callable, shape: tuple[int, ...], sharding) -> jax.Array:
    """Reads each addressable shard once and puts it on its devices, one shard at a time."""
    if sharding is None:
        return jax.block_until_ready(jax.device_put(block((slice(None),) * len(shape))))
    shards = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        key = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        shards.setdefault(key, []).append(device)
    arrays = []
    for key, devices in shards.items():
        values = block(tuple(slice(*part) for part in key))
        arrays += [jax.block_until_ready(jax.device_put(values, device)) for device in devices]
        del values
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_block(pieces, name, shape, index, dtype, check_finite, source) -> np.ndarray:
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape)]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    if stacked(name):
        layers, *bounds = bounds
        targets = [(out[i], pieces[layer]) for i, layer in enumerate(range(*layers))]
    else:
        targets = [(out, pieces[0])]
    for target, piece in targets:
        try:
            with np.errstate(over="raise"):
                _fill(target, piece, bounds)
        except FloatingPointError:
            raise CheckpointError(
                f"{source}: tensor {piece.tensor.name!r} has values beyond the range of "
                f"{dtype}; load as bfloat16 or float32"
            ) from None
        if check_finite and not np.isfinite(target).all():
            raise CheckpointError(
                f"{source}: tensor {piece.tensor.name!r} has NaN or infinite values"
            )
    return out


def _fill(out: np.ndarray, piece: Piece, bounds: list[tuple[int, int]]) -> None:
    """Writes the part `bounds` of a piece (in the parameter's axes) into `out`."""
    (low, high), *rest = bounds
    columns = tuple(slice(*part) for part in rest)
    total = piece.shape[0]
    step = max(1, CHUNK_BYTES // (4 * math.prod(piece.tensor.shape[1:]) or 1))
    first, last = (low, high) if piece.places is None else (0, total)
    for start in range(first, last, step):
        stop = min(start + step, last)
        values = piece.tensor.rows(piece.start + start, piece.start + stop)
        if piece.shift:
            values = values + np.float32(piece.shift)
        if piece.places is None:
            out[start - low : stop - low] = values[:, *columns]
        else:
            places = piece.places[start:stop]
            inside = (places >= low) & (places < high)
            out[places[inside] - low] = values[inside][:, *columns]
