"""metrics.jsonl, events.jsonl and the trackers. The file is the truth; a tracker that fails costs a warning."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from anchor_cli.words import metric_names as names
from anchor_cli.words.console import say, warn
from anchor_cli.words.spec import RunSpec

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


class MetricsLog:
    """Rank 0's log. A resumed run cuts the file back to where its checkpoint was: no line twice, none missing."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self.path = folder / METRICS
        self._events = folder / EVENTS
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < keep_bytes:
            warn(f"{self.path}: {keep_bytes - size:,} bytes of earlier steps are gone; going on without them")
        with open(self.path, "ab") as file:
            file.truncate(min(size, keep_bytes))
        self._file = open(self.path, "ab")  # noqa: SIM115 - open as long as the run
        self._trackers: list[Any] = []

    @property
    def num_bytes(self) -> int:
        """Size of the file, flushed to the disk: what a checkpoint records."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def track(self, trackers: list[Any]) -> None:
        self._trackers = trackers

    def write(self, record: dict[str, Any]) -> None:
        """One line, and the same numbers under the same names to every tracker."""
        line = json.dumps({**record, names.TIME: round(time.time(), 3)}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
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
        with open(self._events, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:
                warn(f"{tracker.name} did not end cleanly ({type(error).__name__}: {error})")


class WandbTracker:
    """Weights & Biases; offline, said once, when there is no key or no network."""

    name = "wandb"

    def __init__(self, spec: RunSpec, folder: Path, run_id: str | None) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if self._has_key() else "offline")
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

    @staticmethod
    def _has_key() -> bool:
        if os.environ.get("WANDB_API_KEY"):
            return True
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        try:
            return "wandb" in netrc.read_text(encoding="utf-8")
        except OSError:
            return False

    def log(self, record: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in record.items() if k != names.STEP}, step=record[names.STEP])

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files in `{run}/tensorboard`."""

    name = "tensorboard"
    run_id: str | None = None

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if "/" in key and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record[names.STEP])

    def close(self) -> None:
        self._writer.close()


def start_trackers(spec: RunSpec, folder: Path, wandb_run_id: str | None) -> list[Any]:
    """The trackers of `report_to` that start; one that does not is named in a warning. WANDB_DISABLED is honoured."""
    trackers: list[Any] = []
    for name in spec.reporters:
        try:
            if name == "wandb":
                disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
                if not disabled and os.environ.get("WANDB_MODE") != "disabled":
                    trackers.append(WandbTracker(spec, folder, wandb_run_id))
            else:
                trackers.append(TensorboardTracker(folder))
        except Exception as error:
            warn(f"{name} could not start ({type(error).__name__}: {error}); metrics are in {folder / METRICS}")
    return trackers
