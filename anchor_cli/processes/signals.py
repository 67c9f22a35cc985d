"""Stop signals: all ranks stop at the same step once any of them receives one.

A thread reads signals from the wake-up pipe that Python's C handler writes to, so that they work while the main thread
is importing, or waits in a collective for a rank that is gone. Torch is imported late: signals are handled before that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from anchor_cli.base.errors import Stopped

if TYPE_CHECKING:
    import torch.distributed as dist

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGUSR1: SLURM's warning before the time limit. SIGHUP, too (the terminal or ssh is gone), but not under nohup."""
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOP_SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
AT_ONCE = 130  # exit code after a second SIGINT, as a shell has it
SAME_KEY_S = 0.5  # torchrun passes on a Ctrl-C that the terminal has sent to its workers already: that is one Ctrl-C


class StopFlag:
    """Whether a stop signal has come. A second SIGINT ends the process at once.

    Until `poll_from_now_on` is called there is nothing to save (every file is whole or absent), so the first signal
    ends the process with 75; afterwards it sets the flag, and the loop saves and ends.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._starting = True
        self._received_s = 0.0

    def install(self) -> None:
        """Take over the stop signals of this process (main thread only). Forked children get them back."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, _handled_by_the_thread)
        os.register_at_fork(after_in_child=_give_signals_back)
        threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()

    def uninstall(self) -> None:
        """Signals do again what they do in any Python program (main thread only)."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def poll_from_now_on(self) -> None:
        """From here a signal only sets the flag: the loop looks at every step and in every phase."""
        self._starting = False

    @property
    def raised(self) -> bool:
        return self.signal_name is not None

    def _listen(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self.signal_name is None:
            self.signal_name, self._received_s = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._received_s > SAME_KEY_S:
            leave(AT_ONCE)
        if self._starting:
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                sys.stderr.write(f"anchor: stopped by {self.signal_name} before the first step; nothing to save\n")
            leave(Stopped.exit_code)


def _handled_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Python's handler: it only has to exist, since the C handler has written to the thread's pipe."""


def _give_signals_back() -> None:
    """In a forked child: signals do what they do by default, and do not reach the parent's pipe."""
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def leave(code: int) -> None:
    """End this process now, its children first; the terminal is given back."""
    from anchor_cli.processes.logs import restore_output

    with contextlib.suppress(OSError):
        restore_output()
        sys.stderr.flush()
    for pid in children(os.getpid()):
        kill(pid, signal.SIGKILL)
    os._exit(code)


def children(pid: int) -> list[int]:
    """Processes started by `pid`, of all its threads (Linux; empty elsewhere)."""
    children: list[int] = []
    for path in Path("/proc", str(pid), "task").glob("*/children"):
        try:
            children += [int(child) for child in path.read_text().split()]
        except OSError:
            continue
    return children


def kill(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def stop_agreed(flag: StopFlag, group: dist.ProcessGroup | None) -> bool:
    """True on every rank if any rank has received a stop signal by now: one small all-reduce over gloo.

    It never touches the device, so no GPU work is waited for; `group` is None for a single process.
    """
    if group is None:
        return flag.raised
    import torch
    import torch.distributed as dist

    votes = torch.tensor([int(flag.raised)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return bool(votes.item())


def stop_with_launcher(generations: int) -> None:
    """Stop as SIGTERM does (finish the step, save, leave with 75) when another's launcher is gone, whatever killed it.

    `generations`: 1 watches the parent; 2 the parent's parent, too (`deepspeed` starts a launcher of its own).
    """
    begun = ancestors(generations)

    def watch() -> None:
        while ancestors(generations) == begun:
            time.sleep(0.5)
        sys.stderr.write("anchor: the launcher is gone; this rank finishes its step, saves and ends\n")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop-with-launcher", daemon=True).start()


def ancestors(generations: int) -> list[int]:
    """Process ids of the parent, its parent, …: so many (Linux; the parent alone elsewhere)."""
    ancestors = [os.getppid()]
    while len(ancestors) < generations:
        try:
            stat = Path("/proc", str(ancestors[-1]), "stat").read_text()
        except OSError:
            break
        ancestors.append(int(stat.rpartition(")")[2].split()[1]))
    return ancestors


def die_with_parent(parent: int) -> None:
    """End this worker within a second when the launcher (process `parent`) is gone: no orphans, whatever killed it."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        sys.stderr.write("anchor: the launcher is gone; this worker ends\n")
        leave(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()
