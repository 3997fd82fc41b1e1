"""Do all processes and devices work together? Run this before the real job.

    python -m launch.local --processes=2 -- -m launch.check

Every process prints its devices; a sum over all devices is checked; the bandwidth of an all-reduce
is measured. Exits non-zero if a number of processes or devices is not as said, or the sum is wrong.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from kvjax.parallel import fail_together, init, is_main, make_mesh, replicated

flags.DEFINE_integer("processes", 0, "Expected number of processes; 0: any.", lower_bound=0)
flags.DEFINE_integer("devices", 0, "Expected number of devices in all; 0: any.", lower_bound=0)
flags.DEFINE_float("megabytes", 16.0, "Of the all-reduce, per device.", lower_bound=0.001)
flags.DEFINE_integer("timeout", 120, "Seconds to wait for the other processes.", lower_bound=1)
FLAGS = flags.FLAGS


def expect(what: str, found: float, wanted: float) -> None:
    if found != wanted:
        raise SystemExit(f"check failed: {what} is {found:g}, expected {wanted:g}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    init(timeout=FLAGS.timeout)
    local, every = jax.local_devices(), jax.devices()
    print(
        f"process {jax.process_index()} of {jax.process_count()}: {len(local)} of {len(every)} "
        f"devices ({', '.join(map(str, local))}), {local[0].device_kind}",
        flush=True,
    )
    if FLAGS.processes:
        expect("the number of processes", jax.process_count(), FLAGS.processes)
    if FLAGS.devices:
        expect("the number of devices", len(every), FLAGS.devices)
    mesh = make_mesh({"data": len(every)})
    size = max(int(FLAGS.megabytes * 2**20 / 4), 1)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return np.full((1, size), index[0].start or 0, np.float32)

    x = jax.make_array_from_callback((len(every), size), rows, part)
    add = jax.jit(lambda x: jnp.sum(x, 0), out_shardings=replicated(mesh))
    total = jax.block_until_ready(add(x))
    expect("the sum over devices", float(total[0]), sum(range(len(every))))
    expect("its last element", float(total[-1]), sum(range(len(every))))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        jax.block_until_ready(add(x))
        seconds.append(time.perf_counter() - begin)
    if is_main():
        rate = 4 * size / np.median(seconds) / 1e9
        print(f"sum over {len(every)} devices is right; all-reduce {rate:.2f} GB/s per device")


if __name__ == "__main__":
    app.run(fail_together(main))
