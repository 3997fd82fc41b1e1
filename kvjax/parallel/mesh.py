"""Meshes: the devices as a grid with the axes "data", "tensor" and "context"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "tensor", "context")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the mesh axes as a command line gives them.

    Args:
      text: "data=2,tensor=4"; an axis left out has size 1.

    Raises:
      ValueError: an unknown or repeated axis, or a size that is no positive integer.

    >>> parse_mesh("context=2,data=4")
    {'data': 4, 'tensor': 1, 'context': 2}
    >>> parse_mesh("")
    {'data': 1, 'tensor': 1, 'context': 1}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not value.isdecimal() or int(value) < 1:
            raise ValueError(
                f"mesh={text!r}: {part!r} is not axis=size; expected each of {', '.join(AXES)} "
                "at most once, with sizes of at least 1, such as 'data=2,tensor=4'"
            )
        sizes[name] = int(value)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(
    sizes: str | Mapping[str, int] = "", devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes "data", "tensor" and "context", in this order.

    Args:
      sizes: "data=2,tensor=4" or a mapping; axes left out have size 1.
      devices: None: all devices of all processes, the first ones where one process needs fewer.

    Raises:
      ValueError: sizes that are none, or ask for more devices than there are; with several
        processes, sizes that leave a device out.

    >>> dict(make_mesh("data=1").shape)
    {'data': 1, 'tensor': 1, 'context': 1}
    """
    if not isinstance(sizes, str):
        sizes = ",".join(f"{name}={size}" for name, size in sizes.items())
    shape = parse_mesh(sizes)
    found = jax.devices() if devices is None else list(devices)
    count = math.prod(shape.values())
    several = len({device.process_index for device in found}) > 1
    if count > len(found) or (several and count < len(found)):
        raise ValueError(
            f"mesh={sizes!r} is a grid of {count} devices, but there are {len(found)}"
            + (" and every process must take part" if several and count < len(found) else "")
        )
    return jax.make_mesh(
        tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=found[:count]
    )
