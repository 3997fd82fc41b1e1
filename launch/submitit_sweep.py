"""A sweep over settings as a Slurm job array, from Python (needs `pip install submitit`).

    python -m launch.submitit_sweep --partition=gpu --nodes=1 -- \\
        --model=owner/name -- --methods='kivi(bits=2)' -- --methods='snapkv(keep=0.25)'

What follows the first `--` is common to all jobs, what follows each further `--` is one job of the
sweep. With --cluster=local the jobs are processes on this machine. A job that is preempted or runs
out of time is requeued and goes on with the same --out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any


class Experiment:
    """`python -m module arguments`; submitit calls it in every task."""

    def __init__(self, module: str, arguments: list[str]):
        self.module, self.arguments = module, arguments

    def __call__(self) -> int:
        run = subprocess.run([sys.executable, "-m", self.module, *self.arguments], check=False)
        if run.returncode:
            raise RuntimeError(f"{self.module} ended with exit code {run.returncode}")
        return 0

    def checkpoint(self) -> Any:
        """What submitit queues when time is over: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(Experiment(self.module, self.arguments))


def split(arguments: list[str]) -> list[list[str]]:
    """The command lines of a sweep.

    >>> split(["--", "--model=m", "--", "--bits=2", "--", "--bits=4"])
    [['--model=m', '--bits=2'], ['--model=m', '--bits=4']]
    >>> split(["--", "--model=m"])
    [['--model=m']]
    """
    parts: list[list[str]] = []
    for argument in arguments:
        if argument == "--":
            parts.append([])
        elif not parts:
            raise ValueError(f"{argument!r}: expected -- before the arguments of the experiment")
        else:
            parts[-1].append(argument)
    common, *jobs = parts or [[]]
    return [common + job for job in jobs or [[]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", default="experiments.compress")
    parser.add_argument("--folder", default="results/sweep", help="logs and results, one per job")
    parser.add_argument("--cluster", default=None, help="slurm, local; default: what is there")
    parser.add_argument("--partition", default=None)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="per node, one task each")
    parser.add_argument("--minutes", type=int, default=240)
    own = sys.argv[1:]
    cut = own.index("--") if "--" in own else len(own)
    args = parser.parse_args(own[:cut])
    try:
        import submitit
    except ImportError:
        parser.error("needs submitit: pip install submitit")
    executor = submitit.AutoExecutor(folder=f"{args.folder}/logs", cluster=args.cluster)
    executor.update_parameters(
        nodes=args.nodes,
        tasks_per_node=max(args.gpus, 1),
        gpus_per_node=args.gpus,
        timeout_min=args.minutes,
        slurm_partition=args.partition,
    )
    jobs = [
        Experiment(args.module, [*line, f"--out={args.folder}/{number}"])
        for number, line in enumerate(split(own[cut:]))
    ]
    with executor.batch():
        started = [executor.submit(job) for job in jobs]
    for job, experiment in zip(started, jobs):
        print(job.job_id, *experiment.arguments)


if __name__ == "__main__":
    main()
