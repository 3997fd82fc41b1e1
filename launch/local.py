"""Several processes on this machine, as on a cluster: a rehearsal, and what CI runs.

    python -m launch.local --processes=2 -- -m experiments.compress --out=results/two

Each process is `python` with what follows `--`, on CPU devices of its own. Their output comes line
by line with the process number before it. The first that fails ends all others; its last lines are
shown again at the end, and its exit code is that of the launcher.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE = 2.0  # seconds between asking a process to end and ending it
SETTLE = 2.0  # seconds in which the others may fail of themselves
LAST = 60  # lines of the process that failed, shown again


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(number: int, count: int, devices: int, port: int, command: list[str]) -> subprocess.Popen:
    env = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it starts ends with it
    )


def forward(number: int, process: subprocess.Popen, kept: collections.deque) -> None:
    for raw in process.stdout:
        line = raw.decode(errors="replace").rstrip("\n")
        kept.append(line)
        print(f"[{number}] {line}", flush=True)


def end(processes: list[subprocess.Popen]) -> None:
    """Ends what still runs: asked first, since JAX's own handlers may take SIGTERM."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, name)
                except ProcessLookupError:
                    continue
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.05)


def run(count: int, devices: int, command: list[str]) -> int:
    """Runs the processes to their end; the exit code of one that failed, else 0."""
    port = free_port()
    kept = [collections.deque(maxlen=LAST) for _ in range(count)]
    processes, readers = [], []
    try:
        for number in range(count):
            process = start(number, count, devices, port, command)
            processes.append(process)
            reader = threading.Thread(target=forward, args=(number, process, kept[number]))
            reader.start()
            readers.append(reader)
        codes = [p.poll() for p in processes]
        while not any(codes) and None in codes:
            time.sleep(0.05)
            codes = [p.poll() for p in processes]
        # The first seen to end may be the one that lost its peer: let the others end themselves.
        deadline = time.monotonic() + SETTLE
        while any(codes) and None in codes and time.monotonic() < deadline:
            time.sleep(0.05)
            codes = [p.poll() for p in processes]
    finally:
        end(processes)
        for reader in readers:
            reader.join(GRACE)
    failed = [(number, code) for number, code in enumerate(codes) if code]
    for number, code in failed:
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"process {number} failed ({what}); its last lines:", file=sys.stderr)
        for line in kept[number]:
            print(f"[{number}] {line}", file=sys.stderr)
    if not failed:
        return 0
    code = failed[0][1]
    return code if code > 0 else 128 - code


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- arguments of python")
    args = parser.parse_args()
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.processes < 1 or args.devices < 1:
        parser.error(f"--processes={args.processes} --devices={args.devices}: at least 1 each")
    if not command:
        parser.error("nothing to run: python -m launch.local --processes=2 -- -m experiments.x ...")
    try:
        code = run(args.processes, args.devices, command)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
