"""Start the local workers of a run, pass signals on, and end with the exit code of the root cause.

No torch here: workers start at once, and signals are handled from the first moment. Each worker leads a session of its
own, so that Ctrl-C reaches it once (from here) and everything it started can be ended with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError, RunError, Stopped
from anchor_cli.base.runs import RunFolder, lock_run, remove_if_refused, unlock_run
from anchor_cli.processes.ranks import complete_rendezvous, free_port, threads_each
from anchor_cli.processes.signals import AT_ONCE, SAME_KEY_S, STOP_SIGNALS, kill
from anchor_cli.processes.watchdog import Failure, clear_heartbeats

LAUNCHED = "ANCHOR_LAUNCHED"  # process id of the launcher, for the workers it starts
CLOSE_S = 60.0  # how long a tracker may take to send the rest
_POLL_S = 0.05
_CAUSE_S = 3.0  # how long the root cause may take to show after a rank has lost touch with another
_BY_ALL_S = CLOSE_S + 15.0  # how long an end of all ranks may take: rank 0 finishes its trackers


@dataclass(frozen=True)
class Ended:
    """A worker that ended."""

    rank: int
    pid: int
    code: int  # negative: the signal that killed it
    failure: Failure | None  # what it wrote before


class Workers:
    """The local processes of a run."""

    def __init__(self, arguments: list[str], num_processes: int, run_folder: Path, node: tuple[int, int]) -> None:
        self.run_folder = run_folder
        self.signals: list[int] = []
        self._first_signal_s = 0.0
        self._logs: list[IO[bytes]] = []
        self._arguments = arguments
        self._num = num_processes
        self._node, self._num_nodes = node
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)
        signal.set_wakeup_fd(-1)  # this class handles signals now

    def start(self) -> None:
        """Rank 0 prints to this terminal, the others into `logs/rank-N.log`."""
        common = {"WORLD_SIZE": str(self._num_nodes * self._num), "LOCAL_WORLD_SIZE": str(self._num),
                  LAUNCHED: str(os.getpid())}  # fmt: skip
        if self._num_nodes == 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        else:
            complete_rendezvous()
        common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads_each(self._num))
        for local_rank in range(self._num):
            rank, out = self._node * self._num + local_rank, None
            if rank:
                out = open(RunFolder(self.run_folder).log(rank), "ab")  # noqa: SIM115 - open as long as it runs
                self._logs.append(out)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "anchor_cli", *self._arguments],
                    env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(local_rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT if out else None,
                    start_new_session=True,
                )
            )
            if self.signals:  # one that came while they were being started
                kill(self._processes[-1].pid, self.signals[0])

    def ended(self) -> list[Ended]:
        """Those that have ended by now."""
        ended = []
        for rank, process in enumerate(self._processes, start=self._node * self._num):
            code = process.poll()
            if code is not None:
                ended.append(Ended(rank, process.pid, code, Failure.read(RunFolder(self.run_folder).heartbeats, rank)))
        return ended

    def wait(self) -> list[Ended]:
        """All, once all have ended; else those that had ended when the root cause of a failure was known."""
        deadline = None
        while True:
            ended = self.ended()
            failed = [end for end in ended if end.code]
            if len(ended) == self._num:
                return ended
            if any(is_root_cause(end) and not self._by_our_signal(end) for end in failed):
                return ended
            if failed:
                by_all = any(end.code == Stopped.exit_code or (end.failure and end.failure.by_all) for end in failed)
                deadline = deadline or time.monotonic() + (_BY_ALL_S if by_all or self.signals else _CAUSE_S)
                if time.monotonic() > deadline:
                    return ended
            time.sleep(_POLL_S)

    def end(self) -> None:
        """Nothing stays: workers and what they started are killed."""
        self._kill()
        for process in self._processes:
            process.wait()
        for log in self._logs:
            log.close()

    def _kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _by_our_signal(self, end: Ended) -> bool:
        return bool(self.signals) and -end.code in STOP_SIGNALS

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Every stop signal that comes here goes to every worker; a second Ctrl-C ends everything."""
        now = time.monotonic()
        if self.signals and number == signal.SIGINT and now - self._first_signal_s > SAME_KEY_S:
            self._kill()  # and no wait(): the main thread may hold Popen's lock, in poll()
            os._exit(AT_ONCE)
        if not self.signals:
            self._first_signal_s = now
        self.signals.append(number)
        for process in self._processes:
            if process.poll() is None:
                kill(process.pid, number)


def launch(arguments: list[str], num_processes: int, run_folder: Path, node: tuple[int, int] = (0, 1)) -> None:
    """Run `anchor {arguments}` in `num_processes` local workers and wait for them.

    `node`: rank and count of nodes; every node runs this, with MASTER_ADDR and MASTER_PORT set.

    Raises:
        Stopped: the workers saved after a signal.
        InputError: the run is being trained already; nothing of it was touched.
        RunError: a worker failed; the root cause is named, not its consequences.
        SystemExit: the same exit code as rank 0, which has reported why.
    """
    workers = Workers(arguments, num_processes, run_folder, node)
    prepare_run_folder(run_folder)
    if node[0] == 0:
        try:
            refuse_if_trained(run_folder)
            clear_heartbeats(RunFolder(run_folder).heartbeats)
        except InputError:
            if node[1] == 1:
                raise  # with several nodes rank 0 refuses, and all ranks with it, when they have met
    try:
        workers.start()
        ended = workers.wait()
    finally:
        workers.end()
    judge(ended, workers.signals)


def judge(ended: list[Ended], signals: list[int]) -> None:
    """Raise as the root cause demands (see `launch`); nothing when all workers ended well."""
    failed = [end for end in ended if end.code]
    if not failed:
        return
    stopped = [end for end in failed if end.code == Stopped.exit_code or (signals and -end.code in STOP_SIGNALS)]
    causes = [end for end in failed if is_root_cause(end) and end not in stopped]
    if stopped and not causes:
        raise SystemExit(Stopped.exit_code)  # rank 0 has reported where
    first = min(causes or failed, key=lambda end: (end.code > 0, end.failure.time if end.failure else 0.0, end.rank))
    if first.code < 0:
        name = signal.Signals(-first.code).name
        say("the other workers were ended")
        raise RunError(f"rank {first.rank} (pid {first.pid}) was killed by {name}", hint=_WHY.get(name, _AGAIN))
    if first.rank == 0 and first.failure and first.failure.reported:
        raise SystemExit(first.code)
    unknown = f"failed with exit code {first.code}"
    what = first.failure.message if first.failure else unknown
    hint = first.failure.hint if first.failure else None
    if hint is None:  # starting again helps after a lost rank; a bug, a missing library or a full GPU stay
        hint = _AGAIN if first.failure and first.failure.consequence else f"see logs/rank-{first.rank}.log of the run"
    named = what if what.startswith("rank ") else f"rank {first.rank}: {what}"
    raise (InputError if first.code == 2 else RunError)(named, hint=hint)


_AGAIN = "run the same command again to continue"
_WHY = {
    "SIGKILL": f"by hand, or by the kernel when memory ran out (dmesg | tail); {_AGAIN}",
    "SIGBUS": f"a memory-mapped file became unreadable (truncated, or its disk failed), or /dev/shm is full; {_AGAIN}",
}


def is_root_cause(end: Ended) -> bool:
    """Whether a failed worker failed by itself, not because it lost touch with another or saved after a signal."""
    if end.code in (0, Stopped.exit_code):
        return False
    return end.failure is None or not end.failure.consequence


def prepare_run_folder(run_folder: Path) -> None:
    """The run's folder with its logs, which can be written. Raises InputError."""
    try:
        logs = RunFolder(run_folder).logs
        logs.mkdir(parents=True, exist_ok=True)
        probe = logs / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        message = f"output_dir: {error.filename or run_folder}: cannot be written ({error.strerror})"
        raise InputError(message, hint="set output_dir to a folder that can be written") from None


@contextlib.contextmanager
def run_folder_of(run_folder: Path) -> Iterator[None]:
    """The run's folder exists inside the block. A start that is refused there leaves no empty one behind."""
    above = run_folder
    while not above.exists():
        above = above.parent
    prepare_run_folder(run_folder)
    try:
        yield
    except (InputError, SystemExit) as error:
        if isinstance(error, InputError) or error.code == InputError.exit_code:  # a worker has reported it
            with contextlib.suppress(OSError):
                remove_if_refused(run_folder, above)
        raise


def refuse_if_trained(run_folder: Path) -> None:
    """Raises InputError when a process trains in this folder now, by the lock that its rank 0 holds."""
    with contextlib.suppress(OSError):  # a file of another user: rank 0 reports it
        lock_run(run_folder)
        unlock_run(run_folder)  # rank 0 takes it
