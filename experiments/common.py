"""What experiments share: the environment, results that survive interruption, tables."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from kvjax.calibrate import find
from kvjax.decode import token_lists
from kvjax.parallel import agree, is_main

# Where the output is no terminal (a log), tables get the width that they need.
console = rich.console.Console()
if not console.is_terminal:
    console = rich.console.Console(width=160)


def constants_of(folder: str, label: str, chain: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a method reads: lists of the tokenizer's tokens, and calibrated constants of a folder.

    Raises:
      ValueError: some are not there, and how to make them.
    """
    lists = token_lists(tokenizer, chain)
    others = set(chain.constants(model.config.head_dim)) - lists.keys()
    return {**lists, **find(folder, label, others, model)}


def environment() -> dict[str, Any]:
    """Versions, machine, command and revision, as they belong beside every figure."""
    import flax
    import jaxlib
    import numpy

    def git(*arguments: str) -> str | None:
        here = pathlib.Path(__file__).parent
        try:
            run = subprocess.run(
                ["git", *arguments],
                cwd=here,
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    return {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_revision": git("rev-parse", "HEAD"),
        "git_changes": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": numpy.__version__,
        "platform": jax.default_backend(),
        "devices": [d.device_kind for d in jax.devices()],
        "processes": jax.process_count(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


class Results:
    """Rows by name in `<out>/results.json`, written whole after each row, atomically, by process 0.

    Started again on the same folder with the same settings, it has the rows of before; with other
    settings it refuses.
    """

    def __init__(self, out: str, settings: Mapping[str, Any], key: str = "method"):
        self.path = pathlib.Path(out) / "results.json"
        self.key = key
        self.settings = json.loads(json.dumps(settings))
        self.rows: list[dict[str, Any]] = []
        if is_main():
            self._load()
        self.rows = agree(self.rows)

    def _load(self) -> None:
        """The rows of before; of several processes only the main one reads and writes."""
        key = self.key
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out={str(self.path.parent)!r}: {error}") from None
        if self.path.exists():
            try:
                old = json.loads(self.path.read_text())
                settings_before, rows = dict(old["settings"]), [dict(r) for r in old["rows"]]
                missing = [r for r in rows if key not in r]
            except (ValueError, KeyError, TypeError) as error:
                missing = [error]
            if missing:
                raise ValueError(
                    f"{self.path} is not a results file of this program ({missing[0]!r}): "
                    "choose another --out"
                )
            if settings_before != self.settings:
                changed = sorted(
                    k
                    for k in settings_before.keys() | self.settings.keys()
                    if settings_before.get(k) != self.settings.get(k)
                )
                raise ValueError(
                    f"{self.path} was made with other settings ({', '.join(changed)} differ): "
                    "choose another --out, or remove it"
                )
            self.rows = rows

    def get(self, name: str) -> dict[str, Any] | None:
        """The finished row of that name, if there is one that did not fail."""
        rows = [r for r in self.rows if r[self.key] == name and not r.get("error")]
        return rows[-1] if rows else None

    def put(self, row: dict[str, Any]) -> None:
        """Adds a row (in place of one of the same name) and writes the file."""
        name = row[self.key]
        self.rows = [r for r in self.rows if r[self.key] != name] + [row]
        self.write()

    def write(self, order: Sequence[str] | None = None) -> None:
        if order is not None:
            self.rows.sort(key=lambda r: order.index(r[self.key]) if r[self.key] in order else 1e9)
        if not is_main():
            return
        text = json.dumps(
            {"settings": self.settings, "environment": environment(), "rows": self.rows}, indent=1
        )
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(temporary, self.path)


def setting(values: Any, name: str) -> Any:
    """One flag: the command line's, else the config file's (checked like a flag), else default."""
    flag = values[name]
    if flag.present or values.config is None or name not in values.config:
        return flag.value
    value = values.config[name]
    try:
        return flag.parser.parse(list(value) if isinstance(value, tuple) else value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {name}={value!r}: {error}") from None


def settings(values: Any, names: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """`setting` of each of `names`; a config file may also name `others`, and nothing else.

    Raises:
      ValueError: a value that is not allowed, or a name in the config file that is no setting.
    """
    allowed = (*names, *others)
    for name in values.config or ():
        if name not in allowed:
            raise ValueError(f"config: {name!r} is no setting; expected {', '.join(allowed)}")
    return {name: setting(values, name) for name in names}


def table(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows on the terminal.

    Args:
      columns: key -> "heading|format", e.g. {"nll": "NLL|.3f"}; a missing value is a dash, a
        column that no row fills is left out.
    """
    if not is_main():
        return
    columns = filled(columns, rows)
    grid = rich.table.Table(
        title=title, title_justify="left", box=rich.box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False
    )
    for number, spec in enumerate(columns.values()):
        first = number == 0
        grid.add_column(
            spec.split("|")[0],
            justify="left" if first else "right",
            overflow="fold",
            ratio=None,
            min_width=24 if first else 5,
        )
    for row in rows:
        grid.add_row(*(cell(row.get(key), spec) for key, spec in columns.items()))
    console.print(grid)


def filled(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of which some row has a value."""
    there = {k for row in rows for k, value in row.items() if value is not None}
    return {k: spec for k, spec in columns.items() if k in there}


def cell(value: Any, spec: str) -> str:
    """One value as a table shows it."""
    form = spec.split("|")[1] if "|" in spec else ""
    if value is None:
        return "-"
    return format(value, form) if not isinstance(value, str) else value


def forget_programs(number: int, every: int = 8) -> None:
    """Drops all compiled programs when `number` methods are done, at every eighth of them.

    On a CPU each holds several memory mappings, and XLA crashes in a process that has some 65,000
    of them (vm.max_map_count): after about twenty-five methods.
    """
    if number % every == 0:
        jax.clear_caches()


def compile_cache() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start is quick."""
    from kvjax.models.embedded import cache_folder

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
