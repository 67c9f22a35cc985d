"""Copies what a rank writes into its log and on to the terminal, as a process of its own (standard library only).

It is what `tee -a` would be, and two things more. What a rank wrote just before it died at once (SIGSEGV, an abort by
NCCL) is still in a pipe, and is copied. And what the rank did not get to print above its live view, because it died or
hangs, is printed from here: BACK and OUT are a pair of sockets, which hold a line until the rank has printed it.

    pump.py LOG TERMINAL             standard input -> LOG (appended) and file descriptor TERMINAL
    pump.py LOG TERMINAL BACK OUT    standard input -> LOG (appended) and socket OUT; the rank reads BACK
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import termios
import time
from array import array

_HANGS_S = 5.0  # after so long without room in the sockets, the rank is taken for hung
_ENDS_S = 0.5  # how long a living rank may take to print the rest when it has closed its output


def pump(log_path: str, terminal: int, back: int | None = None, out: int | None = None) -> None:
    """Copy until every writer has ended. A full disk costs lines of the log, nothing else."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    to_rank = None if out is None else socket.socket(fileno=out)
    if to_rank:
        to_rank.settimeout(_HANGS_S)
    while chunk := os.read(0, 1 << 16):
        _write(log, chunk)
        while to_rank and back is not None and chunk:
            try:
                chunk = chunk[to_rank.send(chunk) :]
            except TimeoutError:
                _print_unread(back, terminal)
                to_rank = None
        _write(terminal, chunk)
    if to_rank and back is not None:
        end = time.monotonic() + _ENDS_S
        while num_unread(back) and time.monotonic() < end:
            time.sleep(0.01)
        _print_unread(back, terminal)


def num_unread(file: int) -> int:
    """Bytes that wait to be read from a pipe or socket."""
    num = array("i", [0])
    fcntl.ioctl(file, termios.FIONREAD, num)
    return num[0]


def _print_unread(file: int, terminal: int) -> None:
    while num := num_unread(file):
        _write(terminal, os.read(file, num))


def _write(file: int, chunk: bytes) -> None:
    try:
        while chunk:
            chunk = chunk[os.write(file, chunk) :]
    except OSError:
        return


if __name__ == "__main__":
    # Forked, and so no child of the rank: a process that kills its children on its way out does not kill the pump.
    if os.fork() == 0:
        os.setsid()
        pump(sys.argv[1], *map(int, sys.argv[2:]))
