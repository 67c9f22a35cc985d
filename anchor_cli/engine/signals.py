"""Signals and agreement: a stop wished by one process becomes one decision of all ranks at the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: SLURM's warning before the time limit


class StopFlag:
    """Remembers that a stop was asked for. The first signal is polite; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Take over SIGTERM, SIGINT and SIGUSR1 of this process (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            os._exit(130)
        self.signal_name = signal.Signals(number).name

    @property
    def raised(self) -> bool:
        return self.signal_name is not None


def stop_agreed(flag: StopFlag, group: dist.ProcessGroup | None) -> bool:
    """True on every rank if any rank has been asked to stop by now: one tiny all-reduce over gloo.

    It never touches the device, so no GPU work is waited for; `group` is None for a single process.
    """
    if group is None:
        return flag.raised
    votes = torch.tensor([int(flag.raised)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
    return bool(votes.item())


def die_with_parent() -> None:
    """End this worker within a second when the process that started it is gone: no orphans, whatever killed it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        sys.stderr.write("anchor: the launcher is gone; this worker ends\n")
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()
