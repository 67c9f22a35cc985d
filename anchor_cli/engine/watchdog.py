"""A hang becomes a message: every rank writes down where it is; one that stays there too long ends the run."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

DEFAULT_TIMEOUT_S = 1800.0  # assumption: no single step, save or evaluation batch takes half an hour
TIMEOUT_VARIABLE = "ANCHOR_HANG_TIMEOUT_S"
_WRITE_EVERY_S = 1.0


class Watchdog:
    """`phase(name, step)` is a heartbeat. Where ranks are is kept in `{folder}/rank-N.json` for everyone to read."""

    def __init__(self, folder: Path, rank: int, timeout_s: float | None = None) -> None:
        self._folder = folder
        self._rank = rank
        self.timeout_s = timeout_s or float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S))
        self._where: tuple[str, int] = ("start-up", 0)
        self._since = time.monotonic()
        self._dirty = True
        self._stopped = False

    def start(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """No more deadlines: the run is over."""
        self._stopped = True

    def phase(self, name: str, step: int) -> None:
        """This rank is alive and now does `name` (start-up, data, step, evaluation, saving) of `step`."""
        self._where, self._since, self._dirty = (name, step), time.monotonic(), True

    def _watch(self) -> None:
        while not self._stopped:
            time.sleep(min(_WRITE_EVERY_S, self.timeout_s / 4))
            if self._dirty:
                self._dirty = False
                self._write()
            if time.monotonic() - self._since > self.timeout_s:
                self._end()

    def _write(self) -> None:
        name, step = self._where
        state = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": name, "step": step,
                 "time": time.time()}  # fmt: skip
        path = self._folder / f"rank-{self._rank}.json"
        try:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(state))
            os.replace(partial, path)
        except OSError:
            pass  # a full disk must not end the run; the message then lacks this rank

    def _end(self) -> None:
        name, step = self._where
        sys.stderr.write(
            f"anchor: rank {self._rank} on {socket.gethostname()} made no progress for {self.timeout_s:.0f} s"
            f" in {name} of step {step}; all ranks: {where_ranks_are(self._folder)}. Python stacks follow.\n"
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)


def where_ranks_are(folder: Path) -> str:
    """One phrase a rank: `rank 0 step 12 (0 s ago)`, from the heartbeat files."""
    phrases = []
    for path in sorted(folder.glob("rank-*.json"), key=lambda p: int(p.stem.split("-")[1])):
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        age = max(0.0, time.time() - state["time"])
        phrases.append(f"rank {state['rank']} in {state['phase']} of step {state['step']} since {age:.0f} s")
    return ", ".join(phrases) or "unknown"
