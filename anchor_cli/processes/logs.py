"""`logs/rank-N.log`: everything a rank writes, whoever started it. Rank 0 alone talks to the terminal, too.

Rank 0 on a terminal:    fd 1, 2 -> pump -> rank-0.log and a pipe back here -> printed above the panel
Rank 0 elsewhere:        fd 1, 2 -> pump -> rank-0.log and the old stderr
The other ranks:         fd 1, 2 -> rank-N.log
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import subprocess
import sys
import termios
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anchor_cli.base.console import draw_on, screen
from anchor_cli.base.errors import AnchorError

_DRAIN_S = 2.0  # how long the end waits for last words on their way to the terminal

_open_log: RankLog | None = None
printing = threading.RLock()
"""Held while a line is printed above the panel; who takes the panel away holds it, too."""
_before_giving_back: list[Callable[[], None]] = []


class RankLog:
    """File descriptors 1 and 2 of this process lead into `path` from now on, until `close`."""

    def __init__(self, path: Path, *, talks: bool) -> None:
        self.path = path
        _before_giving_back.clear()
        self._saved = os.dup(1), os.dup(2)
        self._reader: threading.Thread | None = None
        self._pump_ended: int | None = None  # read end of a pipe that the pump closes when it has written everything
        self._closed = threading.Lock()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if talks:
            target = self._start_pump()
        else:
            target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)

    def close(self) -> None:
        """Give stdout and stderr back, after all that was written has come through."""
        if not self._closed.acquire(blocking=False):
            return
        for work in _before_giving_back:
            work()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(self._saved[0], 1)
        os.dup2(self._saved[1], 2)
        if self._pump_ended is not None:
            select.select([self._pump_ended], [], [], _DRAIN_S)
        if self._reader:
            self._reader.join(_DRAIN_S)
        draw_on(None)

    def _start_pump(self) -> int:
        """Start the pump; the file descriptor to write into."""
        read, write = os.pipe()
        self._pump_ended, pump_ends = os.pipe()
        out = terminal = self._saved[1]
        on_terminal = os.isatty(terminal)
        if on_terminal:
            back, out = os.pipe()
            draw_on(open(os.dup(terminal), "w", encoding=sys.stderr.encoding, errors="replace"))  # noqa: SIM115
            self._reader = threading.Thread(target=self._print, args=(back,), name="rank-log", daemon=True)
            self._reader.start()
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("pump.py")), str(self.path)]
        subprocess.run([*command, str(out), str(terminal)], stdin=read, pass_fds=(out, terminal, pump_ends), check=True)
        os.close(read)
        os.close(pump_ends)
        if on_terminal:
            os.close(out)
        return write

    @staticmethod
    def _print(pipe: int) -> None:
        """Lines on their way to the terminal; the panel, if there is one, makes room."""
        from rich.text import Text

        with open(pipe, encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in lines:
                text = Text.from_ansi(line.rstrip("\r\n").rpartition("\r")[2])
                if text.plain.startswith(("warning: ", "anchor: ")):
                    text.stylize("yellow")
                with printing:
                    screen().print(text, soft_wrap=True)


@contextmanager
def rank_log(folder: Path, rank: int, *, redirected: bool) -> Iterator[None]:
    """Keep what this process writes in `{folder}/rank-N.log` inside the block.

    `redirected`: a launcher has sent the output of ranks above 0 there already.
    """
    global _open_log
    path = folder / f"rank-{rank}.log"
    if redirected and rank:
        yield
        return
    _open_log = RankLog(path, talks=rank == 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    log_only(f"--- {started}, rank {rank} on {socket.gethostname()}, process {os.getpid()}")
    try:
        yield
    except BaseException as error:  # said on the terminal by the command line, after this block
        give_back()
        log_only(in_log(error))
        raise
    finally:
        give_back()


def in_log(error: BaseException) -> str:
    """An error as the log keeps it: the person's words, or where it came from."""
    if isinstance(error, AnchorError):
        return f"anchor: {error.message}" + (f"\n  {error.hint}" if error.hint else "")
    return "".join(traceback.format_exception(error)).rstrip()


def log_only(line: str) -> None:
    """A line for the log and not for the terminal."""
    if _open_log is None:
        return
    try:
        with open(_open_log.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        return  # a full disk costs lines of the log, nothing else


def before_giving_back(work: Callable[[], None]) -> None:
    """Call `work` when the terminal is given back, however that comes: whoever draws on it stops then."""
    _before_giving_back.append(work)


def let_through() -> None:
    """Let what was written so far come through to the terminal, as well as can be known; 0.5 s at most."""
    if _open_log is None:
        return
    sys.stderr.flush()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        waiting = array("i", [0])
        fcntl.ioctl(2, termios.FIONREAD, waiting)
        time.sleep(0.02)  # on its way through the pump and the thread
        if not waiting[0]:
            return


def give_back() -> None:
    """Before the process leaves by whatever way: last words out, stdout and stderr as they were."""
    if _open_log is not None:
        _open_log.close()
