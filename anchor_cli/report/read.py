"""Reads a run folder for `anchor report`: metrics, events, spec, environment, counts of the data.

Files read: `metrics.jsonl`, `events.jsonl`, `spec.json`, `environment.json`, and the data's `prepare.json`.
A run may be alive or may have died in the middle of a line: a torn last line of `metrics.jsonl`, and every torn line of
`events.jsonl`, is left out. Anything else that cannot be read is an error that names the file and the line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_cli.base import metric_names as names
from anchor_cli.base.checkpoints import TRAINING_STATE, newest_checkpoint
from anchor_cli.base.errors import InputError
from anchor_cli.base.runs import RunFolder, read_json_lines

NDCG = "ndcg@10"
MRR = "mrr@10"
MARKED_EVENTS = ("resume", "stop", "incident", "checkpoint_failed")
"""Events that are drawn on the step axis; `checkpoint` and `evaluation` would be too many."""


@dataclass(frozen=True)
class Series:
    """One metric over steps: `steps[i]` optimizer updates were done when `values[i]` was logged."""

    key: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def best(self) -> tuple[int, float]:
        """(step, value) of the highest value, the earliest of equals."""
        index = max(range(len(self.values)), key=lambda i: (self.values[i], -self.steps[i]))
        return self.steps[index], self.values[index]


@dataclass(frozen=True)
class Event:
    """One line of `events.jsonl`."""

    time: float
    step: int
    kind: str
    details: dict[str, Any]


@dataclass
class RunRecord:
    """Everything the page shows of one run."""

    path: Path
    name: str
    lines: list[dict[str, Any]]
    events: list[Event]
    spec: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any] | None
    superseded: int = 0
    """Logged lines left out because a resume went back before them and trained those steps again."""
    benchmarks: list[str] = field(default_factory=list)
    """Evaluation sets in the order in which they first appear, without `avg`."""

    @property
    def stage(self) -> str:
        """I or II."""
        return str(self.spec.get("stage", "I"))

    def series(self, key: str) -> Series:
        """The finite values of one metric, by step."""
        steps: list[int] = []
        values: list[float] = []
        for line in self.lines:
            value = line.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                steps.append(int(line[names.STEP]))
                values.append(float(value))
        return Series(key, tuple(steps), tuple(values))

    def evaluation(self, benchmark: str, metric: str = NDCG) -> Series:
        """`benchmark` is "ko/NanoNQ", or "avg"."""
        return self.series(names.eval_key(benchmark, metric))

    @property
    def last_step(self) -> int:
        return max((int(line[names.STEP]) for line in self.lines), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps the schedule or `stop_after_n_steps` ends at, as the start event says, else None."""
        for event in reversed(self.events):
            for key in ("last_step", "total_steps"):
                value = event.details.get(key)
                if event.kind in ("start", "resume") and isinstance(value, int):
                    return value
        total = newest_state(self.path).get("total_steps")
        stop = self.spec.get("stop_after_n_steps")
        known = [value for value in (total, stop) if isinstance(value, int)]
        return min(known) if isinstance(total, int) else None

    @property
    def state(self) -> str:
        """One of finished, stopped, failed (the last event is an incident), open (running, or died at once)."""
        if self.events and self.events[-1].kind == "incident":
            return "failed"
        for event in reversed(self.events):
            if event.kind == "end":
                return "finished"
            if event.kind == "stop":
                return "stopped"
            if event.kind in ("start", "resume"):
                break
        return "open"

    def marked_events(self) -> list[Event]:
        return [event for event in self.events if event.kind in MARKED_EVENTS]

    def start_time(self) -> float | None:
        """Unix time of the first event, or of the first logged line."""
        stamps = [event.time for event in self.events if event.time] + [
            float(line[names.TIME]) for line in self.lines if isinstance(line.get(names.TIME), int | float)
        ]
        return min(stamps, default=None)

    def clock(self, start: float) -> Series:
        """Steps done (values) at whole seconds since `start` (in the place of steps), pauses included."""
        stamps = [line for line in self.lines if isinstance(line.get(names.TIME), int | float)]
        seconds = tuple(round(float(line[names.TIME]) - start) for line in stamps)
        return Series("clock", seconds, tuple(float(line[names.STEP]) for line in stamps))

    def trained_seconds(self) -> float:
        """Seconds between first and last logged line, pauses between a stop and its resume taken out."""
        stamps = sorted(
            [float(line[names.TIME]) for line in self.lines if isinstance(line.get(names.TIME), int | float)]
            + [event.time for event in self.events]
        )
        if not stamps:
            return 0.0
        resumes = [event.time for event in self.events if event.kind == "resume"]
        paused = 0.0
        for moment in resumes:
            before = [stamp for stamp in stamps if stamp < moment]
            if before:
                paused += moment - before[-1]
        return stamps[-1] - stamps[0] - paused


def read_run(path: str | Path) -> RunRecord:
    """Read one run folder.

    Raises:
        InputError: no such folder, no `metrics.jsonl` in it, or a line that is not JSON.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder", "give a folder that has metrics.jsonl in it")
    files = RunFolder(folder)
    metrics = files.metrics
    if not metrics.is_file():
        raise InputError(f"{metrics}: not found", "a run folder is {output_dir}/{experiment_id} of an anchor train")
    raw = _json_lines(metrics)
    for number, line in enumerate(raw, start=1):
        if not isinstance(line.get(names.STEP), int):
            raise InputError(f'{metrics}:{number}: no integer "step"', "was this file written by anchor train?")
    lines = effective_lines(raw)
    spec = _json_file(files.spec)
    run = RunRecord(
        path=folder,
        name=str(spec.get("experiment_id") or folder.resolve().name),
        lines=lines,
        events=_events(files.events),
        spec=spec,
        environment=_json_file(files.environment),
        data=_data_report(folder, spec),
        superseded=len(raw) - len(lines),
    )
    run.benchmarks = _benchmarks(lines)
    return run


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Read several runs; runs of the same name get their folder's parent in front so that legends can tell them."""
    runs = [read_run(path) for path in paths]
    count: dict[str, int] = {}
    for run in runs:
        count[run.name] = count.get(run.name, 0) + 1
    for run in runs:
        if count[run.name] > 1:
            run.name = f"{run.path.resolve().parent.name}/{run.path.resolve().name}"
    return runs


def effective_lines(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the run as it finally went.

    `metrics.jsonl` is append-only. After a crash at step 130 a run goes on from checkpoint 100 and logs steps 101… a
    second time; the first attempt at them is not part of the model's history: a line is dropped when a
    later one is at an earlier step, or at the same step and of the same kind (training or evaluation).
    """
    kept: list[dict[str, Any]] = []
    for line in lines:
        step, evaluation = line[names.STEP], _is_evaluation(line)
        while kept and kept[-1][names.STEP] > step:
            kept.pop()
        first = len(kept)
        while first and kept[first - 1][names.STEP] == step:
            first -= 1
        kept[first:] = [other for other in kept[first:] if _is_evaluation(other) != evaluation]
        kept.append(line)
    return kept


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(key.startswith(names.EVAL_PREFIX) for key in line)


def _benchmarks(lines: list[dict[str, Any]]) -> list[str]:
    known: dict[str, None] = {}
    for line in lines:
        for key in line:
            if key.startswith(names.EVAL_PREFIX) and key.endswith("/" + NDCG):
                known.setdefault(key[len(names.EVAL_PREFIX) : -len(NDCG) - 1])
    return [name for name in known if name != "avg"]


def _events(path: Path) -> list[Event]:
    events = []
    for line in read_json_lines(path):
        details = {key: value for key, value in line.items() if key not in ("time", "step", "event")}
        events.append(Event(float(line.get("time", 0.0)), int(line.get("step", 0)), str(line.get("event")), details))
    return events


def newest_state(folder: Path) -> dict[str, Any]:
    """`training_state.json` of the newest checkpoint, empty when there is none."""
    newest = newest_checkpoint(folder)
    return _json_file(newest / TRAINING_STATE) if newest else {}


def _data_report(folder: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """The data's `prepare.json`: a copy in the run folder, else where the spec's data are, else what `anchor train`
    prepared below `output_dir`. With a checkpoint it must have the fingerprint that was trained on; None: not found."""
    fingerprint = newest_state(folder).get("data_fingerprint")
    source = Path(str(spec.get("dataset_file_path", ""))).expanduser()
    prepared = Path(str(spec.get("output_dir", ""))).expanduser() / "prepared"
    made = [] if fingerprint is None else sorted(prepared.glob("*"))
    for place in (folder, source, *made):
        report = _json_file(place / "prepare.json")
        if report and fingerprint in (None, report.get("fingerprint")):
            return report
    return None


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = text.split("\n")
    lines: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            value = json.loads(row)
        except json.JSONDecodeError as error:
            if number == len(rows):  # no newline behind it: being written, or cut off by a crash
                break
            raise InputError(f"{path}:{number}: not JSON ({error.msg})", "remove that line") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, found {type(value).__name__}")
        lines.append(value)
    return lines
