"""`launch/`: real processes on this machine; the files for elsewhere as far as can be checked."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from kvjax.parallel import fail_together
from kvjax.parallel.distributed import settings
from launch.submitit_sweep import split

ROOT = pathlib.Path(__file__).parents[2]


def python(*arguments, **environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


def local(*arguments, processes=2, **environment):
    launch = ("-m", "launch.local", f"--processes={processes}", "--")
    return python(*launch, *arguments, **environment)


def test_processes_find_each_other_and_add_up():
    run = local("-m", "launch.check", "--processes=2", "--devices=2", "--megabytes=0.1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "[0] process 0 of 2" in run.stdout and "[1] process 1 of 2" in run.stdout
    assert "[0] sum over 2 devices is right" in run.stdout
    assert "[1] sum" not in run.stdout


def test_a_mismatch_is_an_error():
    run = local("-m", "launch.check", "--devices=3", processes=1)
    assert run.returncode != 0
    assert "number of devices is 1, expected 3" in run.stderr


FAILING = """
import sys
from absl import app
from kvjax.parallel import agree, fail_together, init

def main(argv):
    init(timeout=60)
    import jax
    agree("here")
    if jax.process_index() == 1:
        raise ArithmeticError("the second process has had enough")
    agree("never answered by the other")  # waits

app.run(fail_together(main))
"""


def test_a_failing_process_ends_all_with_its_traceback():
    begin = time.monotonic()
    run = local("-c", FAILING)
    assert run.returncode == 1
    assert time.monotonic() - begin < 60  # not JAX's timeouts of 100 s and more
    assert "process 1 failed (exit code 1); its last lines:" in run.stderr
    assert "Traceback" in run.stderr
    assert "ArithmeticError: the second process has had enough" in run.stderr


def test_waiting_for_nobody_ends_with_a_reason():
    run = python(
        "-c", "from kvjax.parallel import init; init(timeout=1)",
        JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1",
    )  # fmt: skip
    assert run.returncode != 0
    assert "process 1 of 2 (coordinator 127.0.0.1:1) waited 1 s" in run.stderr


def test_how_processes_are_recognised():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    assert settings({}) is None
    assert settings({"JAX_COORDINATOR_ADDRESS": "host:1"}) is None
    assert settings(slurm) == {}
    assert settings({**slurm, "SLURM_NTASKS": "1"}) is None
    one_task = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert settings({**slurm, **one_task}) == {"local_device_ids": [0, 1]}
    assert settings({**slurm, **one_task, "JAX_LOCAL_DEVICE_IDS": "0"}) == {}
    hand = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert settings({**slurm, **hand})["process_id"] == 1
    assert settings({**hand, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    with pytest.raises(ValueError, match="not JAX_PROCESS_ID"):
        settings({name: hand[name] for name in list(hand)[:2]})
    with pytest.raises(ValueError, match="JAX_PROCESS_ID=2"):
        settings({**hand, "JAX_PROCESS_ID": "2"})


def test_alone_nothing_is_caught():
    def main(argv):
        raise KeyError(argv[0])

    with pytest.raises(KeyError, match="x"):
        fail_together(main)(["x"])


@pytest.mark.parametrize("name", ["openmpi.sh", "tpu_vm.sh", "xpk.sh", "slurm.sbatch"])
def test_shell_files(name):
    path = ROOT / "launch" / name
    check = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    assert "experiments.compress" in path.read_text()
    # Without arguments each says how it is used, and starts nothing.
    run = subprocess.run(["bash", str(path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode != 0 and "experiments.compress" in run.stderr


@pytest.mark.parametrize("name", ["jobset.yaml", "k8s_job.yaml"])
def test_manifests(name):
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))
    assert documents[-1]["kind"] in ("JobSet", "Job")
    text = json.dumps(documents)
    assert '["python", "-m", "experiments.compress"]' in text
    container = _find(documents[-1], "containers")[0]
    from absl import flags

    from experiments import compress  # noqa: F401

    known = flags.FLAGS
    assert all(argument.split("=")[0].lstrip("-") in known for argument in container["args"])


def _find(tree, name):
    if isinstance(tree, dict):
        if name in tree:
            return tree[name]
        tree = list(tree.values())
    found = (_find(x, name) for x in tree) if isinstance(tree, list) else ()
    return next((x for x in found if x is not None), None)


def test_sweeps():
    assert split([]) == [[]]
    with pytest.raises(ValueError, match="expected --"):
        split(["--bits=2"])
