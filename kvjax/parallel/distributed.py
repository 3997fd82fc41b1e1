"""Several processes: joining them, what only one of them does, and failing together.

def main(argv):
    init()                      # after flags are parsed, before anything is computed
    ...
    if is_main():               # one process writes
        path.write_text(...)

app.run(fail_together(main))
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given, or None where there is but one process.

    Known are, in this order: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID
    (`launch.local`, Kubernetes, by hand); KVJAX_DISTRIBUTED=auto (JAX looks for itself: Cloud TPU);
    Slurm, within srun; Open MPI; TPU hosts of GKE.

    Raises:
      ValueError: the first three are incomplete or no numbers that fit.

    >>> settings({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    >>> settings({"OMPI_COMM_WORLD_SIZE": "4"})
    {}
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {name: environ[name] for name in names if environ.get(name)}
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"{', '.join(given)} is set, but not {', '.join(missing)}")
        address, *numbers = given.values()
        count, number = (int(n) if n.isdecimal() else -1 for n in numbers)
        if not 0 <= number < count or ":" not in address:
            raise ValueError(
                ", ".join(f"{name}={value}" for name, value in given.items())
                + ": expected host:port, the number of processes, and which of them this is (from "
                "0)"
            )
        if count == 1:
            return None
        return {"coordinator_address": address, "num_processes": count, "process_id": number}
    if environ.get("KVJAX_DISTRIBUTED") == "auto":
        return {}
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        local = slurm_devices(environ)
        return {} if local is None else {"local_device_ids": local}
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return {}
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return {}
    return None


def slurm_devices(environ: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a Slurm task, as JAX's `local_device_ids`; None: leave it to JAX.

    JAX gives task i of a node its GPU i. That is wrong for one task per node (all GPUs but one
    would idle) and where Slurm shows each task only its own GPUs, numbered from 0.

    >>> slurm_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NTASKS_PER_NODE": "1"})
    [0, 1, 2, 3]
    >>> slurm_devices({"CUDA_VISIBLE_DEVICES": "3", "SLURM_NTASKS_PER_NODE": "4"})
    [0]
    >>> slurm_devices({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_NTASKS_PER_NODE": "4"})
    """
    if environ.get("JAX_LOCAL_DEVICE_IDS") or not environ.get("CUDA_VISIBLE_DEVICES"):
        return None
    count = len(environ["CUDA_VISIBLE_DEVICES"].split(","))
    each = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    if count == 1 or each.split("(")[0] == "1":
        return list(range(count))
    return None


def init(timeout: int = 120, environ: Mapping[str, str] | None = None) -> int:
    """Joins the processes that were started together; does nothing where there is but one.

    To be called once flags are parsed and before anything is computed; again: does nothing.

    Args:
      timeout: seconds to wait for the others.
      environ: None: `os.environ`; see `settings`.

    Returns:
      The number of processes.

    Raises:
      ValueError: an environment that contradicts itself.
      RuntimeError: something was computed before.

    Where the others do not come in time, that is said and JAX ends the process.
    """
    if timeout < 1:
        raise ValueError(f"timeout={timeout}: expected at least 1 second")
    if jax.distributed.is_initialized():
        return jax.process_count()
    chosen = settings(os.environ if environ is None else environ)
    if chosen is None:
        return 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # At the end of its patience JAX ends the process from C++, with a stack of its own: say first
    # what that means.
    warning = threading.Timer(timeout - 0.5, _say_late, (chosen, timeout))
    warning.daemon = True
    warning.start()
    try:
        jax.distributed.initialize(**chosen, initialization_timeout=timeout)
    finally:
        warning.cancel()
    return jax.process_count()


def _say_late(chosen: Mapping[str, Any], timeout: int) -> None:
    who = "this process"
    if "num_processes" in chosen:
        who = "process {process_id} of {num_processes} (coordinator {coordinator_address})"
        who = who.format(**chosen)
    print(
        f"kvjax: {who} waited {timeout} s for the others and gives up. Were all of them started, "
        "can they reach the coordinator (process 0), and do they agree on the number of processes?",
        file=sys.stderr,
        flush=True,
    )


def is_main() -> bool:
    """Whether this is the process that writes files and tables."""
    return jax.process_index() == 0


def fetch(x: Any) -> np.ndarray:
    """An array as NumPy, whole, on every process; all processes must call this together."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def agree(value: Any) -> Any:
    """What process 0 calls this with (JSON), on every process; all must call this together."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    if is_main():
        padded[:] = text
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).decode())


def fail_together(main: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
    """`main`, but of several processes one that fails ends at once, with its traceback.

    Otherwise it would wait, at exit, for others that wait for it. Whatever started the processes
    (`launch.local`, srun, mpirun, Kubernetes) ends the rest.
    """

    @functools.wraps(main)
    def run(argv: list[str]) -> Any:
        try:
            return main(argv)
        except BaseException as error:
            clean = isinstance(error, SystemExit) and error.code in (0, None)
            if clean or not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            code = getattr(error, "code", None)
            os._exit(code if isinstance(code, int) and code else 1)

    return run
