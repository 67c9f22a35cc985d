"""metrics.jsonl, events.jsonl and the trackers. The file is the truth; a tracker that fails costs a warning."""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anchor_cli.base import metric_names as names
from anchor_cli.base.console import say, warn
from anchor_cli.base.runs import RunFolder
from anchor_cli.processes.launch import CLOSE_S
from anchor_cli.spec.spec import RunSpec


class MetricsLog:
    """Rank 0's log. A resumed run cuts the file back to where its checkpoint was: no line twice, none missing."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self.path = RunFolder(folder).metrics
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < keep_bytes:
            warn(f"{self.path}: {keep_bytes - size:,} bytes of earlier steps are gone; going on without them")
        with open(self.path, "ab") as file:
            file.truncate(min(size, keep_bytes))
            os.fsync(file.fileno())
        self._file = Appender(self.path)
        self._events = Appender(RunFolder(folder).events)
        self._trackers: list[Any] = []

    def flushed_bytes(self) -> int:
        """Size of the file, flushed to the disk: what a checkpoint records. Raises OSError: it cannot be written."""
        return self._file.flushed_bytes()

    def track(self, trackers: list[Any]) -> None:
        self._trackers = trackers

    def write(self, record: dict[str, Any]) -> None:
        """One line, and the same numbers under the same names to every tracker."""
        line = json.dumps({**record, names.TIME: round(time.time(), 3)}, ensure_ascii=False)
        self._file.append(line)
        for tracker in list(self._trackers):
            try:
                tracker.log(record)
            except Exception as error:  # a tracker may raise anything; the run goes on
                reason = f"{type(error).__name__}: {error}"
                warn(f"{tracker.name} stopped taking metrics ({reason}); {self.path} has them all")
                self._trackers.remove(tracker)

    def event(self, event: str, step: int, **details: Any) -> None:
        """One line of events.jsonl: what happened to the run, and when."""
        line = json.dumps({"time": round(time.time(), 3), "step": step, "event": event, **details}, ensure_ascii=False)
        self._events.append(line)

    def close(self) -> None:
        self._file.close()
        self._events.close()
        end = time.monotonic() + CLOSE_S  # for all of them: the launcher waits for so long
        for tracker in self._trackers:
            _close_within(tracker, max(1.0, end - time.monotonic()))


class Appender:
    """Lines at the end of a file. What a full disk does not take is kept, and written when it takes it again.

    A line that a kill has cut short stays cut short, and the next one begins behind it, on a line of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._waiting = b"" if _ends_in_a_line(path) else b"\n"
        self._warned = False

    def append(self, line: str) -> None:
        self._waiting += line.encode() + b"\n"
        try:
            self._drain()
            self._warned = False
        except OSError as error:
            if not self._warned:
                warn(f"{self.path} could not be written ({error.strerror}); lines are kept in memory and tried again")
            self._warned = True

    def flushed_bytes(self) -> int:
        """Size of the file with all lines on the disk. Raises OSError."""
        self._drain()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._drain()
        self._file.close()

    def _drain(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]


def _ends_in_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _close_within(tracker: Any, seconds: float) -> None:
    """Close a tracker; one that raises or hangs costs a warning."""
    problem: list[str] = ["it did not answer"]

    def close() -> None:
        try:
            tracker.close()
            problem.clear()
        except Exception as error:
            problem[0] = f"{type(error).__name__}: {error}"

    thread = threading.Thread(target=close, name=f"close-{tracker.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if problem:
        warn(f"{tracker.name} did not end cleanly ({problem[0]})")


def has_wandb_key() -> bool:
    """Whether wandb finds a key: WANDB_API_KEY, or one in netrc for its server (WANDB_BASE_URL, else api.wandb.ai)."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker:
    """Weights & Biases; offline, said once, when there is no key or no network."""

    name = "wandb"

    def __init__(self, spec: RunSpec, folder: Path, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        if mode == "offline" and "WANDB_MODE" not in os.environ:
            say("wandb: no API key, so the run is logged offline (WANDB_API_KEY or `wandb login`; `wandb sync` later)")
        settings = wandb.Settings(init_timeout=30, console="off")
        options: dict[str, Any] = {"project": os.environ.get("WANDB_PROJECT", "anchor"), "dir": str(folder)}
        options |= {"name": spec.run_name or spec.experiment, "id": run_id, "resume": "allow"}
        options |= {"config": spec.model_dump(), "settings": settings}
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode == "offline":
                raise
            say(f"wandb: not reached ({type(error).__name__}), so the run is logged offline; `wandb sync` later")
            self._run = wandb.init(mode="offline", **options)
        self.run_id = str(self._run.id)

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in record.items() if k != names.STEP}, step=record[names.STEP])

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files in `{run}/tensorboard`."""

    name = "tensorboard"
    run_id: str | None = None

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = first_step + 1 if first_step else None  # steps behind the checkpoint are trained, and logged, again
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if "/" in key and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record[names.STEP])

    def close(self) -> None:
        self._writer.close()


def start_trackers(spec: RunSpec, folder: Path, wandb_run_id: str | None, first_step: int) -> list[Any]:
    """The trackers of `report_to` that start; one that does not is named in a warning. WANDB_DISABLED is honoured."""
    trackers: list[Any] = []
    for name in spec.reporters:
        try:
            if name == "wandb":
                disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
                if not disabled and os.environ.get("WANDB_MODE") != "disabled":
                    trackers.append(WandbTracker(spec, folder, wandb_run_id))
            else:
                trackers.append(TensorboardTracker(folder, first_step))
        except Exception as error:
            warn(
                f"{name} could not start ({type(error).__name__}: {error}); metrics are in {RunFolder(folder).metrics}"
            )
    return trackers
