"""One process of a training run: joins the others, trains, leaves with the right exit code."""

from __future__ import annotations

import faulthandler
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import AnchorError, InputError, RunError, Stopped, first_line
from anchor_cli.base.files import write_json
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent
from anchor_cli.base.runs import RunFolder, lock_run, remember_run
from anchor_cli.processes.launch import LAUNCHED, prepare_run_folder
from anchor_cli.processes.logs import rank_log
from anchor_cli.processes.ranks import environment_ranks
from anchor_cli.processes.signals import StopFlag, die_with_parent, stop_with_launcher
from anchor_cli.processes.watchdog import (
    LostPeer,
    Watchdog,
    failure_of,
    forget_failures,
    lost_peer,
    note_failure,
    where_ranks_are,
)
from anchor_cli.spec.hub_names import needs_hub
from anchor_cli.spec.spec import RunSpec

FOREIGN_LAUNCHERS = {"TORCHELASTIC_RUN_ID": 1, "CROSS_RANK": 2}
"""What torchrun and DeepSpeed set for their workers, and how many processes above a worker are the launcher."""
_RANK_0_SPEAKS_S = 0.5


def work(spec: RunSpec, spec_path: Path, skip_steps: tuple[int, ...] = (), flag: StopFlag | None = None) -> None:
    """Train as the process that the environment says this is (alone, if it says nothing).

    Args:
        flag: one that hears signals already; else one of its own does while it works.
    Raises:
        Stopped: a signal came and everything is saved.
        InputError: the run is being trained already; nothing of it was touched.
    """
    if flag is None:
        flag = StopFlag()
        flag.install()
    launcher, (rank, _, world_size) = os.environ.get(LAUNCHED), environment_ranks() or (0, 0, 1)
    if launcher:
        die_with_parent(int(launcher))
    elif watched := [generations for name, generations in FOREIGN_LAUNCHERS.items() if name in os.environ]:
        stop_with_launcher(max(watched))
    prepare_run_folder(spec.run_folder)
    if rank == 0 and not launcher:
        make_way(spec.run_folder, alone=world_size == 1)
    with quiet_if_said(spec, rank), rank_log(RunFolder(spec.run_folder).logs, rank, redirected=bool(launcher)):
        _work(spec, spec_path, skip_steps, flag, rank)
    flag.uninstall()


def make_way(run_folder: Path, *, alone: bool) -> None:
    """Take the run for this process, then forget what earlier starts of it wrote; what a living one writes stays.

    Raises:
        InputError: the run is being trained already, and nobody else waits to hear it; several ranks hear it together,
            from `run.settle`.
    """
    try:
        lock_run(run_folder)
    except InputError:
        if alone:
            raise
        return
    except OSError:  # `settle` says it in words
        return
    forget_failures(RunFolder(run_folder).heartbeats)


def _work(spec: RunSpec, spec_path: Path, skip_steps: tuple[int, ...], flag: StopFlag, rank: int) -> None:
    from anchor_cli.processes.extension_locks import clear_stale_locks

    if needs_hub(spec):
        go_offline_if_the_hub_is_silent()
    faulthandler.enable()  # a crash (SIGSEGV, SIGBUS of a file that shrank) leaves its stack in the log
    clear_stale_locks()
    from anchor_cli.train.deepspeed import leave_processes, start_processes
    from anchor_cli.train.run import open_run

    watchdog = Watchdog(RunFolder(spec.run_folder).heartbeats, rank)
    watchdog.start()
    with told_apart(spec, rank, watchdog):
        ranks = start_processes(2 * watchdog.timeout_s)
        more = "more GPUs share out the optimizer, deepspeed: zero3_bf16 the weights, too; zero2_offload_bf16 takes RAM"
        with enough_memory(rank, "before the first step", more):
            run = open_run(spec, ranks, spec_path.parent, skip_steps, watchdog)
        from anchor_cli.train.loop import Training

        if ranks.rank == 0:
            remember(run.spec, run.folder, run.raw_ds_config, run.kernel, run.liger)
        smaller = "lower max_tokens_per_micro_batch, or gradient_checkpointing: true; the same command then goes on"
        with enough_memory(rank, f"with micro-batches of up to {run.token_budget:,} tokens", smaller):
            Training(run, flag, watchdog).train()
    leave_processes()


@contextmanager
def quiet_if_said(spec: RunSpec, rank: int) -> Iterator[None]:
    """Rank 0 alone talks to the terminal: what it says of an end, the others do not repeat (it is in their logs)."""
    try:
        yield
    except AnchorError as error:
        if rank == 0 or LAUNCHED in os.environ:
            raise
        time.sleep(_RANK_0_SPEAKS_S)
        first = failure_of(RunFolder(spec.run_folder).heartbeats, 0)
        said = isinstance(error, Stopped | LostPeer) or (first is not None and first.message == error.message)
        if said:
            raise SystemExit(error.exit_code) from None
        if not error.message.startswith("rank "):
            error.message = f"rank {rank} on {socket.gethostname()}: {error.message}"
        raise


class OutOfMemory(RunError):
    """The memory of one rank's GPU ran out: its own failure, which the others know nothing of."""


@contextmanager
def enough_memory(rank: int, when: str, hint: str) -> Iterator[None]:
    """CUDA's error in the person's words. Told by its name, so that torch need not be there."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        reason = first_line(error, 200)
        message = f"rank {rank} on {socket.gethostname()}: out of GPU memory {when} ({reason})"
        raise OutOfMemory(message, hint=hint) from error


@contextmanager
def told_apart(spec: RunSpec, rank: int, watchdog: Watchdog) -> Iterator[None]:
    """Leaves word for the launcher of what failed here, and whether it failed here or only followed from elsewhere."""
    folder = RunFolder(spec.run_folder).heartbeats
    try:
        yield
    except Stopped:
        raise
    except OutOfMemory as error:
        note_failure(folder, rank, error.message, error.hint, said=rank == 0)
        raise
    except AnchorError as error:  # most are agreed on by all ranks; rank 0 tells the person
        note_failure(folder, rank, error.message, error.hint, followed=rank != 0, said=rank == 0, agreed=True)
        raise
    except Exception as error:
        reason = first_line(error)
        if not lost_peer(error):
            note_failure(folder, rank, f"{type(error).__name__}: {reason}", None, said=rank == 0)
            raise
        message = (
            f"rank {rank} on {socket.gethostname()} lost touch with the others in {watchdog}"
            f" ({reason}); all ranks: {where_ranks_are(folder)}"
        )
        note_failure(folder, rank, message, None, followed=True, said=False)
        if os.environ.get(LAUNCHED):
            raise SystemExit(LostPeer.exit_code) from error  # the launcher tells the first cause
        raise LostPeer(message, hint="the first error of the rank that is missing is the cause") from error
    finally:
        watchdog.stop()


def remember(spec: RunSpec, folder: Path, ds_config: dict[str, Any], kernel: str, liger: bool) -> None:
    """spec.json, ds_config.json and environment.json of the run, and the run itself for `anchor eval checkpoint-N`."""
    from anchor_cli.train.environment import environment

    files = RunFolder(folder)
    write_json(files.spec, spec.model_dump())
    write_json(files.ds_config, ds_config)
    write_json(files.environment, environment() | {"attention_kernel": kernel, "liger": liger})
    remember_run(folder)
