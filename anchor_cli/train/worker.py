"""One rank of a training run: joins the others, builds the run, trains, ends with the right exit code.

What a rank records of its failure (`processes/watchdog.py`) tells the launcher which one is the root cause.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from anchor_cli.base.errors import AnchorError, InputError, RunError, Stopped, first_line
from anchor_cli.base.files import write_json
from anchor_cli.base.runs import RunFolder, lock_run, remember_run
from anchor_cli.processes.extension_locks import clear_stale_locks
from anchor_cli.processes.launch import LAUNCHED, prepare_run_folder
from anchor_cli.processes.logs import rank_log
from anchor_cli.processes.ranks import environment_ranks
from anchor_cli.processes.signals import StopFlag, die_with_parent, stop_with_launcher
from anchor_cli.processes.watchdog import Failure, LostPeer, Watchdog, clear_heartbeats, is_lost_peer, where_ranks_are
from anchor_cli.spec.spec import RunSpec

if TYPE_CHECKING:
    from anchor_cli.train.run import Run

FOREIGN_LAUNCHERS = {"TORCHELASTIC_RUN_ID": 1, "CROSS_RANK": 2}
"""What torchrun and DeepSpeed set for their workers, and how many processes above a worker are the launcher."""
_RANK_0_REPORTS_S = 0.5


def run_rank(spec: RunSpec, spec_path: Path, skip_steps: tuple[int, ...], flag: StopFlag) -> None:
    """Train as the rank that the environment says this process is (alone, if it says nothing).

    Args:
        flag: one that handles signals already.
    Raises:
        Stopped: a signal came and everything is saved.
        InputError: the run is being trained already; nothing of it was touched.
    """
    launcher, (rank, _, world_size) = os.environ.get(LAUNCHED), environment_ranks() or (0, 0, 1)
    if launcher:
        die_with_parent(int(launcher))
    elif watched := [generations for name, generations in FOREIGN_LAUNCHERS.items() if name in os.environ]:
        stop_with_launcher(max(watched))
    files = RunFolder(spec.run_folder)
    prepare_run_folder(files.path)
    if rank == 0 and not launcher:
        claim_run(files, alone=world_size == 1)
    with only_rank_0_reports(files, rank), rank_log(files.logs, rank, redirected=bool(launcher)):
        faulthandler.enable()  # a crash (SIGSEGV, SIGBUS of a file that shrank) leaves its stack in the log
        clear_stale_locks()
        watchdog = Watchdog(files.heartbeats, rank)
        watchdog.start()
        with failure_recorded(files, rank, watchdog):
            train(spec, spec_path.parent, skip_steps, flag, watchdog)
    flag.uninstall()


def train(spec: RunSpec, spec_folder: Path, skip_steps: tuple[int, ...], flag: StopFlag, watchdog: Watchdog) -> None:
    """Join the other ranks, build the run, train it."""
    from anchor_cli.train.deepspeed import leave_processes, start_processes
    from anchor_cli.train.loop import Training
    from anchor_cli.train.start import start_run

    ranks = start_processes(2 * watchdog.timeout_s)
    more = "more GPUs share out the optimizer, deepspeed: zero3_bf16 the weights, too; zero2_offload_bf16 takes RAM"
    with enough_memory(ranks.rank, "before the first step", more):
        run = start_run(spec, ranks, spec_folder, watchdog)
    run.skip(skip_steps)
    smaller = "lower max_tokens_per_micro_batch, or gradient_checkpointing: true; the same command then goes on"
    with enough_memory(ranks.rank, f"with micro-batches of up to {run.token_budget:,} tokens", smaller):
        training = Training(run, flag, watchdog)
        if run.is_first:
            write_records(run)
        training.train()
    leave_processes()


def write_records(run: Run) -> None:
    """spec.json, ds_config.json and environment.json of the run; and the run becomes the last one of this user."""
    from anchor_cli.base.environment import environment

    write_json(run.files.spec, run.spec.model_dump())
    write_json(run.files.ds_config, run.raw_ds_config)
    write_json(run.files.environment, environment() | {"attention_kernel": run.kernel, "liger": run.liger})
    remember_run(run.folder)


def claim_run(files: RunFolder, *, alone: bool) -> None:
    """Lock the run for this process, then remove heartbeats and failures of earlier starts.

    Raises:
        InputError: the run is being trained already, by itself; of several ranks all refuse together (`start_run`).
    """
    try:
        lock_run(files.path)
    except InputError:
        if alone:
            raise
    except OSError:  # `start_run` says it in words
        return
    else:
        clear_heartbeats(files.heartbeats)


@contextmanager
def only_rank_0_reports(files: RunFolder, rank: int) -> Iterator[None]:
    """Under another's launcher, a rank prints its error only where rank 0 does not print the same (logs have all)."""
    try:
        yield
    except AnchorError as error:
        if rank == 0 or LAUNCHED in os.environ:
            raise
        time.sleep(_RANK_0_REPORTS_S)
        first = Failure.read(files.heartbeats, 0)
        if isinstance(error, Stopped | LostPeer) or (first is not None and first.message == error.message):
            raise SystemExit(error.exit_code) from None
        if not error.message.startswith("rank "):
            error.message = f"rank {rank} on {socket.gethostname()}: {error.message}"
        raise


class OutOfMemory(RunError):
    """The memory of one rank's GPU ran out: its own failure, which the others know nothing of."""


@contextmanager
def enough_memory(rank: int, when: str, hint: str) -> Iterator[None]:
    """CUDA's error with a remedy. Recognised by its name, so that torch need not be there."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        message = f"rank {rank} on {socket.gethostname()}: out of GPU memory {when} ({first_line(error, 200)})"
        raise OutOfMemory(message, hint=hint) from error


@contextmanager
def failure_recorded(files: RunFolder, rank: int, watchdog: Watchdog) -> Iterator[None]:
    """Records why this rank fails, and whether that is the root cause or a consequence of another rank's end."""

    def record(message: str, hint: str | None = None, *, consequence: bool = False, by_all: bool = False) -> None:
        Failure(message, hint, consequence, reported=rank == 0, by_all=by_all).write(files.heartbeats, rank)

    try:
        yield
    except Stopped:
        raise
    except OutOfMemory as error:
        record(error.message, error.hint)
        raise
    except AnchorError as error:  # all ranks raise the same; rank 0 reports it
        record(error.message, error.hint, consequence=rank != 0, by_all=True)
        raise
    except Exception as error:
        if not is_lost_peer(error):
            record(f"{type(error).__name__}: {first_line(error)}")
            raise
        message = (
            f"rank {rank} on {socket.gethostname()} lost touch with the others in {watchdog}"
            f" ({first_line(error)}); all ranks: {where_ranks_are(files.heartbeats)}"
        )
        Failure(message, consequence=True).write(files.heartbeats, rank)
        if os.environ.get(LAUNCHED):
            raise SystemExit(LostPeer.exit_code) from error  # the launcher reports the root cause
        raise LostPeer(message, hint="the first error of the rank that is missing is the cause") from error
    finally:
        watchdog.stop()
