"""A hang becomes a message: every rank writes down where it is; one that stays there too long ends the run.

logs/where/rank-N.json     what rank N is doing, and that it is alive
logs/where/failed-N.json   why rank N failed: the launcher finds the root cause among them
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from anchor_cli.base.errors import RunError

DEFAULT_TIMEOUT_S = 1800.0  # assumption: no single step, save or evaluation batch takes half an hour
TIMEOUT_VARIABLE = "ANCHOR_HANG_TIMEOUT_S"
WRITE_EVERY_S = 2.0


def hang_timeout_s() -> float:
    """Seconds without progress after which a run is ended: $ANCHOR_HANG_TIMEOUT_S, default 1800."""
    return float(os.environ.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT_S)


class Watchdog:
    """`phase(name, step)` is a heartbeat. What ranks do is kept in `{folder}/rank-N.json` for everyone to read."""

    def __init__(self, folder: Path, rank: int, timeout_s: float | None = None) -> None:
        self._folder = folder
        self._rank = rank
        self.timeout_s = timeout_s or hang_timeout_s()
        self._where: tuple[str, int | None] = ("start-up", None)
        self._since = time.monotonic()
        self._stopped = False

    def start(self) -> None:
        """From now on a phase that takes longer than `timeout_s` ends this process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """No more deadlines: the run is over."""
        self._stopped = True

    def phase(self, name: str, step: int | None) -> None:
        """This rank is alive and now does `name` (start-up, step, evaluation, saving) of `step`."""
        self._where, self._since = (name, step), time.monotonic()

    def alive(self) -> None:
        """Progress within the same phase."""
        self._since = time.monotonic()

    def __str__(self) -> str:
        return phase_name(*self._where)

    def _watch(self) -> None:
        while not self._stopped:
            time.sleep(min(WRITE_EVERY_S, self.timeout_s / 4))
            self._write()
            if time.monotonic() - self._since > self.timeout_s and not self._stopped:
                self._end()

    def _write(self) -> None:
        name, step = self._where
        now = time.time()
        state = {"rank": self._rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": name, "step": step,
                 "since": now - (time.monotonic() - self._since), "alive": now}  # fmt: skip
        path = self._folder / f"rank-{self._rank}.json"
        try:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(state))
            os.replace(partial, path)
        except OSError:
            pass  # a full disk must not end the run; a message then lacks this rank

    def _end(self) -> None:
        message = (
            f"no progress for {self.timeout_s:.0f} s: rank {self._rank} on {socket.gethostname()} is in {self};"
            f" all ranks: {where_ranks_are(self._folder)}"
        )
        sys.stderr.write(f"anchor: {message}. Python stacks follow.\n")
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        hint = f"{TIMEOUT_VARIABLE} sets the limit; the stacks are in logs/ of the run"
        Failure(message, hint, reported=self._rank == 0).write(self._folder, self._rank)
        from anchor_cli.processes.signals import leave

        leave(1)


def phase_name(phase: str, step: int | None) -> str:
    return phase if step is None else f"step {step}" if phase == "step" else f"{phase} at step {step}"


def where_ranks_are(folder: Path) -> str:
    """A phrase a rank, `rank 0 in step 12 for 3 s`, from the heartbeat files; one that stopped beating is named so."""
    phrases = []
    for path in sorted(folder.glob("rank-*.json"), key=lambda p: int(p.stem.split("-")[1])):
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        now = time.time()
        silent = now - state["alive"]
        who = f"rank {state['rank']} on {state['host']} (pid {state['pid']})"
        where = f"{who} in {phase_name(state['phase'], state['step'])}"
        late = f", NOT RESPONDING for {silent:.0f} s" if silent > 3 * WRITE_EVERY_S else ""
        phrases.append(f"{where} for {max(0.0, now - state['since']):.0f} s{late}")
    return "; ".join(phrases) or "unknown"


@dataclass(frozen=True)
class Failure:
    """Why a rank failed, as it is kept for the launcher and the other ranks."""

    message: str
    hint: str | None = None
    consequence: bool = False
    """Not the root cause: the rank lost touch with another, or ends with an error that rank 0 reports."""
    reported: bool = False
    """The rank has printed the message for the user."""
    by_all: bool = False
    """All ranks end with this error."""
    time: float = field(default_factory=time.time)

    def write(self, folder: Path, rank: int) -> None:
        """Keep it; a disk that cannot take it costs the launcher this message."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(asdict(self), ensure_ascii=False)
            (folder / f"failed-{rank}.json").write_text(text, encoding="utf-8")
        except OSError:
            return

    @classmethod
    def read(cls, folder: Path, rank: int) -> Failure | None:
        """What a rank wrote before it ended, if anything."""
        try:
            return cls(**json.loads((folder / f"failed-{rank}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class LostPeer(RunError):
    """A collective failed because another rank ended or did not come: a consequence, not the root cause."""


def clear_heartbeats(folder: Path) -> None:
    """Remove heartbeats and failures of earlier starts."""
    for path in (*folder.glob("failed-*.json"), *folder.glob("rank-*.json")):
        path.unlink(missing_ok=True)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another rank is gone or late (gloo, NCCL, the store)."""
    text = f"{type(error).__name__}: {error}".lower()
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe", "socket timeout",
             "timed out waiting", "diststoreerror", "distnetworkerror", "distbackenderror", "tcpstore")  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
