"""Where things are: the files of a run, its checkpoints, and the runs this user has started.

The runs are remembered in `$ANCHOR_HOME/runs.jsonl` (default `~/.cache/anchor`), one line a start, append-only.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError

if TYPE_CHECKING:
    from filelock import BaseFileLock


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, `{output_dir}/{experiment_id}`."""

    path: Path

    @property
    def spec(self) -> Path:
        """The resolved spec."""
        return self.path / "spec.json"

    @property
    def ds_config(self) -> Path:
        """The DeepSpeed config as it was written: `anchor replay` takes it."""
        return self.path / "ds_config.json"

    @property
    def environment(self) -> Path:
        """Versions, hardware, git commit."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every logged step and every evaluation, append-only."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object a line: start, resume, stop, checkpoint, evaluation, incident, end."""
        return self.path / "events.jsonl"

    @property
    def logs(self) -> Path:
        """Folder of `rank-N.log`."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The run as a page."""
        return self.path / "report.html"

    def log(self, rank: int) -> Path:
        """What a rank wrote."""
        return self.logs / f"rank-{rank}.log"

    @property
    def heartbeats(self) -> Path:
        """Folder of `rank-N.json`, what rank N is doing, and `failed-N.json`, why it failed."""
        return self.logs / "where"

    def incident(self, step: int) -> Path:
        """What was found at a step that was refused."""
        return self.path / f"incident-step-{step}.json"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` optimizer updates."""
        return self.path / f"checkpoint-{step}"


LOCK_TIMEOUT_S = 10.0  # how long the processes of a run that was just killed may need to go
_held: dict[Path, BaseFileLock] = {}


def lock_run(run: Path, timeout_s: float | None = None) -> None:
    """Make this process the only one that trains in the folder `run` until it ends: the kernel frees the lock.

    On a file system without locks nothing is locked.

    Raises:
        InputError: another process trains in it; the lock's file names that process.
        OSError: the lock's file cannot be written.
    """
    from filelock import FileLock, Timeout

    if run.absolute() in _held:
        return
    path = run / ".lock"
    lock = FileLock(path, timeout=LOCK_TIMEOUT_S if timeout_s is None else timeout_s, fallback_to_soft=False)
    path.touch()
    try:
        lock.acquire()
    except Timeout:
        message = f"{run}: is being trained already by {path.read_text().strip() or 'another process'}"
        raise InputError(message, hint="wait for it, end it, or give this run its own experiment_id") from None
    except OSError:
        return
    path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    _held[run.absolute()] = lock


def remove_if_refused(run: Path, above: Path) -> None:
    """Remove the folder of a refused start, and empty parents below `above`, where nothing but logs came of it."""
    if not run.is_dir() or {path.name for path in run.iterdir()} - {"logs", ".lock"}:
        return
    try:
        lock_run(run, timeout_s=0)
    except (InputError, OSError):  # another process starts there
        return
    shutil.rmtree(run, ignore_errors=True)
    unlock_run(run)
    for parent in run.parents:
        if parent == above or any(parent.iterdir()):
            return
        parent.rmdir()


def unlock_run(run: Path) -> None:
    """Give the lock back, where this process holds it."""
    if lock := _held.pop(run.absolute(), None):
        lock.release()


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a `.jsonl` file, empty when it is absent; a last line cut short by a crash is left out."""
    lines: list[dict[str, Any]] = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return lines
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def anchor_home() -> Path:
    """`$ANCHOR_HOME`, default `~/.cache/anchor`."""
    return Path(os.environ.get("ANCHOR_HOME") or Path.home() / ".cache" / "anchor")


def remember_run(run: str | Path) -> None:
    """Make `run` the last run. A home that cannot be written is no reason to fail: the run is then not remembered."""
    run = Path(run).absolute()
    line = json.dumps({"time": round(time.time(), 3), "run": str(run)}, ensure_ascii=False) + "\n"
    try:
        anchor_home().mkdir(parents=True, exist_ok=True)
        with open(anchor_home() / "runs.jsonl", "a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        return


def remembered_runs() -> list[Path]:
    """Runs that are still there, each once: first those of this project (`is_here`), and last started first."""
    try:
        lines = read_json_lines(anchor_home() / "runs.jsonl")
    except OSError:  # a home that cannot be read is one without runs
        return []
    runs = [Path(line["run"]) for line in lines if "run" in line]
    present = [run for run in dict.fromkeys(reversed(runs)) if run.is_dir()]
    return sorted(present, key=lambda run: not is_here(run))  # sorted is stable


def is_here(place: Path) -> bool:
    """Whether a place is the current directory, below it, or a folder that the current directory lies in."""
    try:
        here = Path.cwd().resolve()
    except OSError:  # the current directory was removed
        return False
    return place.resolve().is_relative_to(here) or here.is_relative_to(place.resolve())


def last_run(having: Callable[[Path], object] | None = None, what: str = "") -> Path:
    """The run of this project that was started last; where it has none, the one started last anywhere.

    `having`: only runs for which it is true count; `what` names it for the message, such as `a checkpoint`.

    Raises:
        InputError: none is remembered, or none of them has it.
    """
    runs = remembered_runs()
    if not runs:
        raise InputError(f"no run is remembered in {anchor_home()}", "name a folder, or start one with anchor train")
    run = next((run for run in runs if having is None or having(run)), None)
    if run is None:
        others = f", nor has any of the {len(runs) - 1} before it" if len(runs) > 1 else ""
        raise InputError(f"{runs[0]}: the last run has no {what} yet{others}", "name a folder by its path")
    if run != runs[0]:
        say(f"{runs[0]}, the last run, has no {what} yet; the last one that has one is {run}")
    return run


def confirm_outside(place: Path, command: str) -> None:
    """Ask before writing at or removing a `place` that the user has not named and that is not of this project.

    `command`: what to type to name it.

    Raises:
        InputError: the answer is no, or there is no terminal to ask on.
    """
    if is_here(place):
        return
    say(f"{place} is outside the current directory, {Path.cwd()}")
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError(f"{place}: outside the current directory, and not named: left as it is", f"name it: {command}")
    sys.stderr.write("go on there? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InputError(f"{place}: left as it is", f"to name it: {command}")
