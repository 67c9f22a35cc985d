"""`logs/rank-N.log`: everything that a rank writes, under every launcher. Rank 0's output goes on to the terminal.

    rank 0 on a terminal    fd 1, 2 -> pump -> rank-0.log and back to this process -> printed above the live view
    rank 0 elsewhere        fd 1, 2 -> pump -> rank-0.log and the stderr that this process was started with
    the other ranks         fd 1, 2 -> rank-N.log

The pump is a process of its own, so that the last output of a rank that dies at once reaches log and terminal.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anchor_cli.base.console import draw_on, screen
from anchor_cli.base.errors import AnchorError
from anchor_cli.processes.pump import num_unread

_PEEK_BYTES = 1 << 13
_DRAIN_S = 2.0  # how long `close` waits for output on its way to log and terminal

_open_log: RankLog | None = None
screen_lock = threading.RLock()
"""Held while a line is printed above the live view, and while the view is taken away."""
_on_restore: list[Callable[[], None]] = []


class RankLog:
    """Sends file descriptors 1 and 2 of this process into `path`, until `close`."""

    def __init__(self, path: Path, *, shown: bool) -> None:
        self.path = path
        _on_restore.clear()
        self._saved = os.dup(1), os.dup(2)
        self._reader: threading.Thread | None = None
        self._back: socket.socket | None = None
        self._pump_ended: int | None = None  # read end of a pipe that the pump closes when it has written everything
        self._closed = threading.Lock()
        sys.stdout.flush()
        sys.stderr.flush()
        target = self._start_pump() if shown else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)

    def close(self) -> None:
        """Restore stdout and stderr once everything written so far has arrived."""
        if not self._closed.acquire(blocking=False):
            return
        for work in _on_restore:
            work()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(self._saved[0], 1)
        os.dup2(self._saved[1], 2)
        if self._pump_ended is not None:
            select.select([self._pump_ended], [], [], _DRAIN_S)
        if self._reader:
            self._reader.join(_DRAIN_S)
        draw_on(None)

    def _start_pump(self) -> int:
        """Start the pump; returns the file descriptor to write into."""
        read, write = os.pipe()
        self._pump_ended, pump_ends = os.pipe()
        passed = [self._saved[1]]
        if os.isatty(self._saved[1]):
            draw_on(open(os.dup(self._saved[1]), "w", encoding=sys.stderr.encoding, errors="replace"))  # noqa: SIM115
            self._back, out = socket.socketpair()
            self._reader = threading.Thread(target=_print_lines, args=(self._back,), name="rank-log", daemon=True)
            self._reader.start()
            passed += [self._back.fileno(), out.detach()]
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("pump.py")), str(self.path)]
        subprocess.run([*command, *map(str, passed)], stdin=read, pass_fds=(*passed, pump_ends), check=True)
        for used in (read, pump_ends, *passed[2:]):
            os.close(used)
        return write


def _print_lines(source: socket.socket) -> None:
    """Print the lines that come through `source` on the terminal, above the live view if there is one.

    They are taken out of it when they are printed: if this process does not get that far, the pump prints them.
    """
    from rich.text import Text

    while waiting := source.recv(_PEEK_BYTES, socket.MSG_PEEK):
        size = waiting.rfind(b"\n") + 1 or (len(waiting) if len(waiting) == _PEEK_BYTES else 0)
        if not size:  # of a line that is being written
            time.sleep(0.05)
            continue
        with screen_lock, contextlib.suppress(OSError):  # a terminal that is gone (SIGHUP)
            for line in waiting[:size].decode(errors="replace").removesuffix("\n").split("\n"):
                text = Text.from_ansi(line.rstrip("\r").rpartition("\r")[2])
                if text.plain.startswith(("warning: ", "anchor: ")):
                    text.stylize("yellow")
                screen().print(text, soft_wrap=True)
        source.recv(size)


@contextmanager
def rank_log(folder: Path, rank: int, *, redirected: bool) -> Iterator[None]:
    """Keep what this process writes inside the block in `{folder}/rank-N.log`.

    `redirected`: the launcher has redirected the output of ranks above 0 already.
    """
    global _open_log
    if redirected and rank:
        yield
        return
    _open_log = RankLog(folder / f"rank-{rank}.log", shown=rank == 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    log_only(f"--- {started}, rank {rank} on {socket.gethostname()}, process {os.getpid()}")
    try:
        yield
    except BaseException as error:  # printed on the terminal by the command line, after this block
        restore_output()
        log_only(in_log(error))
        raise
    finally:
        restore_output()


def in_log(error: BaseException) -> str:
    """An error as the log keeps it: its message, or the traceback of one that is not ours."""
    if isinstance(error, AnchorError):
        return f"anchor: {error.message}" + (f"\n  {error.hint}" if error.hint else "")
    return "".join(traceback.format_exception(error)).rstrip()


def log_only(line: str) -> None:
    """Write a line to the log and not to the terminal."""
    if _open_log is None:
        return
    try:
        with open(_open_log.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        return  # a full disk costs lines of the log, nothing else


def on_restore(work: Callable[[], None]) -> None:
    """Call `work` before stdout and stderr are restored, however the run ends: it stops drawing on the terminal."""
    _on_restore.append(work)


def wait_until_shown() -> None:
    """Wait until what was written so far is on the terminal, as far as can be known; 0.5 s at most."""
    if _open_log is None or _open_log._back is None:
        return
    sys.stderr.flush()
    end = time.monotonic() + 0.5
    while num_unread(2) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.01)  # from one to the other, through the pump
    while num_unread(_open_log._back.fileno()) and time.monotonic() < end:
        time.sleep(0.01)


def restore_output() -> None:
    """Before the process ends in any way: print what is left, then stdout and stderr as they were."""
    if _open_log is not None:
        _open_log.close()
