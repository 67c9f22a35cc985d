"""Start the local workers of a run, pass signals on, and leave with the exit code that tells what happened.

torch elastic's process context starts and watches the workers (logs per rank, death noticed within a second). What is
ours: a signal goes to every worker, which finish their step and save; when one dies, the others go at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from anchor_cli.engine.worker import LAUNCHED
from anchor_cli.words.console import say
from anchor_cli.words.errors import RunError, Stopped

_POLL_S = 0.2


def launch(arguments: list[str], num_processes: int, log_folder: Path) -> None:
    """Run `anchor {arguments}` in `num_processes` local workers and wait for them.

    Rank 0 talks to this terminal; every rank's output is kept in `{log_folder}/rank-N.log`.

    Raises:
        Stopped: the workers saved after a signal.
        RunError: a worker failed; the first one is named, with its last words.
        SystemExit: all workers refused the input (2), said by rank 0.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std, start_processes

    log_folder.mkdir(parents=True, exist_ok=True)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes),
              "LOCAL_WORLD_SIZE": str(num_processes), LAUNCHED: "1"}  # fmt: skip
    if "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_processes))
    environments = {rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)}
    context = start_processes(
        name="anchor",
        entrypoint=sys.executable,
        args=dict.fromkeys(range(num_processes), ("-m", "anchor_cli", *arguments)),
        envs=environments,
        logs_specs=DefaultLogsSpecs(
            log_dir=str(log_folder / "workers"),
            redirects=dict.fromkeys(range(1, num_processes), Std.ALL),
        ),
    )
    signals = _forward_signals(context)
    try:
        _wait(context, signals)
    finally:
        context.close(signal.SIGKILL)


def _forward_signals(context: Any) -> list[int]:
    """Every stop signal that comes here goes to every worker (once more for each repetition)."""
    seen: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for pid in context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    return seen


def _wait(context: Any, signals: list[int]) -> None:
    """Wait until all workers have ended or one has failed; its peers then have a moment to end the same way."""
    result = None
    while result is None:
        result = context.wait(timeout=_POLL_S)
    if not result.is_failed():
        return
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    code = first.exitcode
    if code == Stopped.exit_code:
        raise Stopped("stopped after saving", hint="run the same command again to continue")
    if code == 2:
        raise SystemExit(2)
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    say(f"rank {first.local_rank} {how}; the other workers were ended")
    message = f"rank {first.local_rank} (pid {first.pid}) {how}{_last_words(first)}"
    raise RunError(message, hint="run the same command again to continue")


def _last_words(failure: Any) -> str:
    """The last line that a worker other than rank 0 wrote to stderr."""
    try:
        lines = Path(failure.error_file).with_name("stderr.log").read_text(errors="replace").strip().splitlines()
    except (OSError, TypeError):
        return ""
    return f": {lines[-1][:300]}" if lines else ""


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_end(pids: list[int], seconds: float) -> bool:
    """True when none of the processes is left within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
