"""Every launcher of docs/how-to/multi-node.md trains the same three steps; a killed rank ends the whole.

Real processes on this machine, on the CPU. SLURM itself is not here: two processes get what `srun` would set.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from faults.harness import environment, losses, write_spec, write_world

from anchor_cli.data.training_set import prepare_raw
from anchor_cli.processes.ranks import free_port
from anchor_cli.spec.load import load_spec

pytestmark = pytest.mark.slow
PYTHON = sys.executable
LAUNCHERS = ("anchor", "torchrun", "two torchruns", "deepspeed", "slurm")
PATIENCE_S = 400.0
"""For a start on a loaded machine; a run that is told to end has `END_S`."""
END_S = 120.0


def commands(launcher: str, spec: Path) -> list[tuple[list[str], dict[str, str]]]:
    """(command line, environment) of every process that a user, or a scheduler, starts for two ranks."""
    port = str(free_port())
    train = ["-m", "anchor_cli", "train", str(spec)]
    torchrun = [PYTHON, "-m", "torch.distributed.run"]
    if launcher == "anchor":
        return [([PYTHON, *train, "--nproc-per-node", "2"], {})]
    if launcher == "torchrun":
        return [([*torchrun, "--nproc-per-node", "2", "--master-port", port, *train], {})]
    if launcher == "two torchruns":  # two nodes on one machine, meeting by c10d
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "kure",
                   "--rdzv-endpoint", f"localhost:{port}"]  # fmt: skip
        return [([*torchrun, *meeting, *train], {})] * 2
    if launcher == "deepspeed":
        script = "from deepspeed.launcher.runner import main; main()"
        flags = ["--num_gpus", "2", "--master_port", port, "--no_local_rank", "--module"]
        return [([PYTHON, "-c", script, *flags, *train[1:]], {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"})]
    return [
        ([PYTHON, *train], {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
                            "SLURM_JOB_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank in range(2)
    ]  # fmt: skip


@contextmanager
def started(launcher: str, spec: Path, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    processes = []
    log = folder / f"{spec.stem}.log"
    try:
        with log.open("ab") as out:
            for command, more in commands(launcher, spec):
                env = environment(folder / "home", **more)
                processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=folder))
        yield processes
    finally:
        for process in processes:
            for each in [*family(process), process]:
                try:
                    os.kill(each.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for_all(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    return [process.wait(max(0.1, end - time.monotonic())) for process in processes]


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("launchers")
    write_world(place)
    prepare_raw(load_spec(write_spec(place, small_model)))  # other launchers' workers prepare nothing
    return place


@pytest.fixture(scope="module")
def found(folder: Path, small_model: Path) -> dict[str, list[tuple[float, ...]]]:
    """Losses, learning rate and gradient norm of three steps, by launcher."""
    steps = {}
    for launcher in LAUNCHERS:
        name = launcher.replace(" ", "-")
        spec = write_spec(folder, small_model, experiment_id=name, max_steps=3, eval_steps=0, save_steps=0)
        with started(launcher, spec, folder) as processes:
            codes = wait_for_all(processes, PATIENCE_S)
        said = (folder / f"{name}.log").read_text(errors="replace")[-3000:]
        assert codes == [0] * len(codes), f"{launcher}: {codes}\n{said}"
        steps[launcher] = losses(folder / "out" / name)
    return steps


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_same_three_steps(found: dict[str, list[tuple[float, ...]]], launcher: str) -> None:
    assert [step[0] for step in found["anchor"]] == [1, 2, 3]
    assert found[launcher] == found["anchor"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_whole(launcher: str, folder: Path, small_model: Path) -> None:
    """SIGKILL to rank 1 in the middle of training: nobody stays, and the exit code says that it failed."""
    name = "killed-" + launcher.replace(" ", "-")
    spec = write_spec(folder, small_model, experiment_id=name, max_steps=100_000, eval_steps=0, save_steps=0)
    with started(launcher, spec, folder) as processes:
        metrics = folder / "out" / name / "metrics.jsonl"
        end = time.monotonic() + PATIENCE_S
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            assert time.monotonic() < end, (folder / f"{name}.log").read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        everyone = [each for process in processes for each in [psutil.Process(process.pid), *family(process)]]
        victim = next(each for each in everyone if is_rank_1(each))
        os.kill(victim.pid, signal.SIGKILL)
        codes = wait_for_all(processes, END_S)
        _, alive = psutil.wait_procs(everyone, timeout=10)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    assert all(codes), codes


def is_rank_1(process: psutil.Process) -> bool:
    """The worker of rank 1."""
    try:
        env, line = process.environ(), process.cmdline()
    except psutil.Error:
        return False
    return "anchor_cli" in line and env.get("RANK", env.get("SLURM_PROCID")) == "1"  # launchers have no rank
