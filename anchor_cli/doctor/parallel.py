"""Checks that need several processes: does an all-reduce give the right sum, are DeepSpeed's gradients right.

Each rank is a process of its own (`python -m anchor_cli.doctor.worker`), so that a hang or a crash of a library
ends that process only and becomes a line here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anchor_cli.base.check import Check
from anchor_cli.doctor.needs import Needs
from anchor_cli.processes.ranks import free_port

ALL_REDUCE_TIMEOUT_S = 120.0
GRADIENTS_TIMEOUT_S = 300.0
SLOW_ALL_REDUCE_GB_S = 5.0
"""Bus bandwidth below which the link between two GPUs of one host is broken (assumption: PCIe 4 x16 gives 20)."""


class WorkerFailed(Exception):
    """A rank ended badly or hung; `str` says which and why."""


def num_workers() -> int:
    """All GPUs, or two CPU processes."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def run_workers(task: str, world_size: int, timeout_s: float, **arguments: str) -> dict[str, Any]:
    """Run `doctor.worker TASK` in `world_size` processes and return rank 0's JSON.

    Raises:
        WorkerFailed: a rank left with an error, or they were not done after `timeout_s` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="anchor-doctor-") as folder:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
        base = {**os.environ, **meeting}
        base.setdefault("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "anchor_cli.doctor.worker", task, str(Path(folder, "answer.json"))]
        command += [f"{key}={value}" for key, value in arguments.items()]
        logs = [Path(folder, f"rank-{rank}.log") for rank in range(world_size)]
        workers = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as out:
                    environment = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                    workers.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            _wait(workers, logs, timeout_s)
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        answer: dict[str, Any] = json.loads(Path(folder, "answer.json").read_text())
        return answer


def _wait(workers: list[subprocess.Popen[bytes]], logs: list[Path], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(worker.poll() is None for worker in workers):
        for rank, worker in enumerate(workers):
            if worker.poll() not in (None, 0):
                raise WorkerFailed(f"rank {rank} ended with {worker.returncode}: {_last_line(logs[rank])}")
        if time.monotonic() > end:
            waiting = [str(rank) for rank, worker in enumerate(workers) if worker.poll() is None]
            raise WorkerFailed(f"no answer in {timeout_s:.0f} s from rank {', '.join(waiting)}")
        time.sleep(0.1)
    for rank, worker in enumerate(workers):
        if worker.returncode != 0:
            raise WorkerFailed(f"rank {rank} ended with {worker.returncode}: {_last_line(logs[rank])}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def all_reduce(_: Needs) -> Iterator[Check]:
    """A sum over all ranks by NCCL (gloo on a CPU host): right, in time, and how fast."""
    count = num_workers()
    try:
        answer = run_workers("all_reduce", count, ALL_REDUCE_TIMEOUT_S)
    except WorkerFailed as error:
        yield Check("all-reduce", "fail", str(error),
                    "NCCL_DEBUG=INFO says more; NCCL_P2P_DISABLE=1 or NCCL_SOCKET_IFNAME often help")  # fmt: skip
        return
    unit = "processes" if answer["backend"] == "gloo" else "GPUs"
    message = f"{answer['backend']} over {count} {unit}, {answer['gb_s']:.1f} GB/s"
    if not answer["right"]:
        yield Check("all-reduce", "fail", f"{message}: wrong sum", "a broken link or driver: try fewer GPUs")
    elif answer["backend"] == "nccl" and count > 1 and answer["gb_s"] < SLOW_ALL_REDUCE_GB_S:
        yield Check("all-reduce", "warn", f"{message}: slow", "see GPU links above; NCCL_DEBUG=INFO")
    else:
        yield Check("all-reduce", "ok", message)


def gradients(needs: Needs) -> Iterator[Check]:
    """DeepSpeed's accumulated gradients of a small Stage I step against plain autograd of the same step."""
    count = min(num_workers(), 4)
    config = needs.deepspeed
    try:
        answer = run_workers("gradients", count, GRADIENTS_TIMEOUT_S, **({"config": config} if config else {}))
    except WorkerFailed as error:
        yield Check("gradients", "fail", str(error), "anchor train would fail too: see docs/troubleshooting.md")
        return
    message = (
        f"{answer['config']}, {count} ranks x {answer['micro_batches']} micro-batches: "
        f"relative error {answer['error']:.1e} (allowed {answer['allowed']:.0e})"
    )
    if answer["error"] > answer["allowed"]:
        yield Check("gradients", "fail", f"{message}, worst in {answer['worst']}",
                    "do not train with this DeepSpeed: pip install -c constraints.txt deepspeed")  # fmt: skip
    else:
        yield Check("gradients", "ok", message)
