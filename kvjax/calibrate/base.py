"""What a calibration is, and the files that hold its constants."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

FILE = "calibration.json"
PROGRAM = "experiments.calibrate"
SHAPE = ("layers", "heads", "kv_heads", "head_dim", "width", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How the constants of one method, with its arguments, are found.

    Attributes:
      names: of the constants.
      run: (model, batches) -> constants by name, their first axis that of the attention layers;
        batches of tokens, int32 [B, T].
      program: the module that makes and keeps them; None: they are found from the model alone, at
        once, and `batches` is not read.
    """

    names: tuple[str, ...]
    run: Callable[[Any, Iterable[Array]], dict[str, Array]]
    program: str | None = PROGRAM

    @property
    def arguments(self) -> dict[str, Any]:
        """The method's arguments that the constants depend on, defaults included."""
        return dict(getattr(self.run, "keywords", {}))

    def __call__(self, model: Any, batches: Iterable[Array] = ()) -> dict[str, Array]:
        if self.program not in (None, PROGRAM):
            raise ValueError(f"these constants are not calibrated but trained: {self.command()}")
        found = self.run(model, batches)
        assert set(found) == set(self.names), (sorted(found), self.names)
        return found

    def command(self, label: str = "...", root: str | os.PathLike = "results/calibration") -> str:
        """The command that makes the constants of the method `label` and keeps them in `root`."""
        where = "out" if self.program == PROGRAM else "calibration"
        mark = '"' if "'" in label else "'"
        return f"python -m {self.program} --methods={mark}{label}{mark} --{where}={root}"


def calibration(
    method: Callable[..., Any],
    names: tuple[str, ...] | Callable[..., tuple[str, ...]],
    run: Callable[..., dict[str, Array]],
    program: Callable[..., str | None] = lambda **_: PROGRAM,
    reads: tuple[str, ...] | None = None,
) -> Callable[..., Calibration]:
    """A function that takes the arguments of `method`, with its defaults and its errors, and gives
    the calibration for them: `run(model, batches, **arguments)`, `program(**arguments)`, and the
    names, or `names(**arguments)`. `reads`: the arguments on which the constants depend, so that
    those of one expression serve others; None: all."""
    signature = inspect.signature(method)

    def make(*args: Any, **kwargs: Any) -> Calibration:
        method(*args, **kwargs)  # raises what is wrong with them
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        how = given.arguments
        named = names(**how) if callable(names) else names
        asked = how if reads is None else {n: how[n] for n in reads}
        return Calibration(named, functools.partial(run, **asked), program(**how))

    make.__module__ = run.__module__  # where it is kept, as of a function written there
    make.__name__ = make.__qualname__ = method.__name__
    make.__doc__ = f"What `kvjax.compress.{method.__name__}` with the same arguments reads."
    make.__signature__ = signature.replace(return_annotation=Calibration)
    return make


def folder_of(root: str | os.PathLike, method: str, name: str, config: Any) -> pathlib.Path:
    """Where the constants of a method (as `parse` writes it) for a model belong.

    >>> from kvjax.models import Config
    >>> str(folder_of("c", "kvquant(bits=3)", "smollm2-135m", Config(9, 64, 9, 2, 4, 2, 16)))
    'c/kvquant-bits=3-smollm2-135m-2x2x16'
    """
    shape = "x".join(str(getattr(config, n)) for n in ("layers", "kv_heads", "head_dim"))
    text = f"{method}-{pathlib.Path(name).name}-{shape}"
    return pathlib.Path(root) / re.sub(r"[^\w=.]+", "-", text.replace(")", ""))


def save(
    folder: str | os.PathLike,
    method: str,
    constants: Mapping[str, Array],
    model: Any,
    name: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes constants (orbax) and, last and at once, a JSON file that says what they are for: a
    folder without it is not complete and is never read."""
    folder = pathlib.Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / "constants", ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "constants", {n: jnp.asarray(x) for n, x in constants.items()})
    text = {
        "method": method,
        "model": name,
        "shape": _shape(model),
        "weights": _weights(model),
        "constants": {n: [list(x.shape), str(x.dtype)] for n, x in sorted(constants.items())},
        **(about or {}),
    }
    (folder / f"{FILE}.tmp").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    os.replace(folder / f"{FILE}.tmp", folder / FILE)


def load(folder: str | os.PathLike, model: Any) -> dict[str, Array]:
    """The constants in a folder.

    Raises:
      ValueError: they were made for a model of another shape, or with other weights; or the folder
        holds no finished calibration.
    """
    folder = pathlib.Path(folder).resolve()
    if not complete(folder):
        raise ValueError(
            f"{folder} holds no finished calibration; make it with python -m experiments.calibrate"
        )
    about, shape = _about(folder), _shape(model)
    differ = [f"{n} {about['shape'].get(n)}, not {shape[n]}" for n in SHAPE
              if about["shape"].get(n) != shape[n]]  # fmt: skip
    what = f"{folder} holds constants of {about['method']} for the model {about['model']!r}"
    if differ:
        raise ValueError(f"{what}, of another shape ({'; '.join(differ)}): calibrate this model")
    # A cast to 16 bits moves a mean of n numbers by some 1e-3 / sqrt(n) of itself; others by more.
    near = 1e-4 + 0.01 / model.layers.k[...][0].size ** 0.5
    if not np.allclose(about["weights"], _weights(model), rtol=near):
        raise ValueError(f"{what}, which has other weights: calibrate this model")
    form = {n: np.zeros(shape, dtype) for n, (shape, dtype) in about["constants"].items()}
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "constants", form)


def find(root: str | os.PathLike, label: str, names: Iterable[str], model: Any) -> dict[str, Array]:
    """Constants for the method `label`, from the folders in `root` that were made for it or for a
    method inside it (its storage); or from the model, where its weights are enough. Of no names:
    none, and nothing is read.

    Raises:
      ValueError: none has them, and how to make them; or they do not fit the model.
    """
    names, refused = set(names), None
    if not names:
        return {}
    asked = calibrations_in(label)
    for file in sorted(pathlib.Path(root).glob(f"*/{FILE}")):
        about = _about(file.parent)
        if not names <= about["constants"].keys() or not _made_for(
            about["method"], (how for _, how in asked)
        ):
            continue
        try:
            return {n: x for n, x in load(file.parent, model).items() if n in names}
        except ValueError as error:  # perhaps another folder fits
            refused = error
    if refused is not None:
        raise refused
    inside = [(text, c) for text, c in asked if names <= set(c.names)]
    for _, how in inside:
        if how.program is None:
            return {n: x for n, x in how(model).items() if n in names}
    text, how = inside[0] if inside else (label, Calibration((), lambda *_: {}))
    raise ValueError(
        f"{label} reads the constants {sorted(names)}, and {root} holds none made for it: run "
        f"{how.command(text, root)}"
    )


def calibrations_in(label: str) -> list[tuple[str, Calibration]]:
    """The calibrated methods that an expression names, each with its calibration.

    >>> [text for text, _ in calibrations_in("snapkv(keep=0.5, storage=kvquant(bits=2))")]
    ['kvquant(bits=2)']
    """
    from kvjax.calibrate import CALIBRATIONS
    from kvjax.compress import parse

    tree = ast.parse(label, mode="eval")
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALIBRATIONS:
            found += parse(ast.unparse(called.get(id(node), node)), CALIBRATIONS)
    return found


def _made_for(label: str, asked: Iterable[Calibration]) -> bool:
    """Whether constants of the method `label` are those of one that is asked for: equal arguments,
    defaults included, however they are written."""
    try:
        ((_, made),) = calibrations_in(label)
    except ValueError:  # of another version
        return False
    same = lambda a, b: (a.run.func, a.arguments) == (b.run.func, b.arguments)  # noqa: E731
    return any(same(made, one) for one in asked)


def complete(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a finished calibration."""
    return (pathlib.Path(folder) / FILE).is_file()


def _about(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


def _shape(model: Any) -> dict[str, int]:
    return {n: getattr(model.config, n) for n in SHAPE}


def _weights(model: Any) -> list[float]:
    """Mean magnitudes of each layer's key and value projection: they tell models apart."""
    layers = model.layers
    means = [
        jnp.mean(jnp.abs(w[...].astype(jnp.float32)), tuple(range(1, w[...].ndim)))
        for w in (layers.k, layers.v)
    ]
    return [float(x) for x in jnp.concatenate(means)]
