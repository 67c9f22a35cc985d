"""Copies what a process writes into its log and on to the terminal. A program of its own (standard library only): the
last words of a process that dies at once (SIGSEGV, NCCL's abort) are still in the pipe, and must not be lost.

    pump.py LOG OUT FALLBACK    standard input -> LOG (appended) and file descriptor OUT; FALLBACK once OUT is closed
"""

from __future__ import annotations

import os
import signal
import sys


def pump(log_path: str, out: int, fallback: int) -> None:
    """Copy until every writer has gone. A full disk costs lines of the log, nothing else."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    while chunk := os.read(0, 1 << 16):
        _write(log, chunk)
        if not _write(out, chunk) and out != fallback:
            out = fallback
            _write(out, chunk)


def _write(file: int, chunk: bytes) -> bool:
    try:
        while chunk:
            chunk = chunk[os.write(file, chunk) :]
    except OSError:
        return False
    return True


if __name__ == "__main__":
    # Twice forked: nobody's child, so that a process that ends its children does not end its own last words.
    if os.fork() == 0:
        os.setsid()
        pump(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
