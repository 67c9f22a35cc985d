"""Where things are: the files of a run, its checkpoints, and the runs this user has started.

The runs are remembered in `$ANCHOR_HOME/runs.jsonl` (default `~/.cache/anchor`), one line a start, append-only.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from anchor_cli.words.errors import InputError, nearest
from anchor_cli.words.metric_names import EVAL_AVG_NDCG_10, STEP

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
TRAINING_STATE = "training_state.json"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, `{output_dir}/{experiment_id}`."""

    path: Path

    @property
    def spec(self) -> Path:
        """The resolved spec."""
        return self.path / "spec.json"

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

    def incident(self, step: int) -> Path:
        """What was found at a step that was refused."""
        return self.path / f"incident-step-{step}.json"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` optimizer updates."""
        return self.path / f"checkpoint-{step}"


def open_lock(run: Path) -> IO[str]:
    """The file whose lock says that a process trains in the folder `run`; it names that process."""
    return open(run / ".lock", "a+", encoding="utf-8")


def take_lock(file: IO[str], run: Path, patience_s: float) -> None:
    """Lock `open_lock`'s file until it is closed.

    `patience_s`: the processes of a run that was just killed may need a moment to go.

    Raises:
        InputError: another process trains in `run`.
        OSError: a file system without locks.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                file.seek(0)
                message = f"{run}: is being trained already by {file.read().strip() or 'another process'}"
                raise InputError(message, hint="wait for it, end it, or give this run its own experiment_id") from None
            time.sleep(0.2)


def checkpoint_step(path: str | Path) -> int | None:
    """Optimizer steps of a checkpoint by its name, `checkpoint-N`; None for another name."""
    match = _CHECKPOINT_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def is_ours(folder: str | Path) -> bool:
    """Whether a folder was written by `anchor train`, so that it must be whole; by its files, not by its name alone.

    Other trainers name theirs `checkpoint-N` too. One of ours that lost its training state still has its contract.
    """
    from anchor_cli.words.contract import FILE_NAME

    if (Path(folder) / TRAINING_STATE).is_file():
        return True
    return checkpoint_step(folder) is not None and (Path(folder) / FILE_NAME).is_file()


def list_checkpoints(run: str | Path) -> list[Path]:
    """Checkpoints of a run, oldest step first. A folder has its name only once it is whole."""
    found = [path for path in Path(run).glob("checkpoint-*") if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: checkpoint_step(path) or 0)


def best_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint whose step has the highest `eval/avg/ndcg@10` in `metrics.jsonl`; None when none was evaluated."""
    scores: dict[int, float] = {}
    for line in read_json_lines(RunFolder(Path(run)).metrics):
        if isinstance(line.get(EVAL_AVG_NDCG_10), int | float):
            scores[line[STEP]] = line[EVAL_AVG_NDCG_10]
    scored = [path for path in list_checkpoints(run) if checkpoint_step(path) in scores]
    return max(scored, key=lambda path: scores[checkpoint_step(path) or 0], default=None)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint of the highest step; None when there is none."""
    found = list_checkpoints(run)
    return found[-1] if found else None


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
    """Runs that are still there, last started first, each once."""
    runs = [Path(line["run"]) for line in read_json_lines(anchor_home() / "runs.jsonl") if "run" in line]
    return [run for run in dict.fromkeys(reversed(runs)) if run.is_dir()]


def last_run() -> Path:
    """The run started last.

    Raises:
        InputError: none is remembered.
    """
    runs = remembered_runs()
    if not runs:
        raise InputError(f"no run is remembered in {anchor_home()}", "name a folder, or start one with anchor train")
    return runs[0]


def default_checkpoint() -> Path:
    """The best, else the newest, checkpoint of the last run.

    Raises:
        InputError: there is no run, or it has no checkpoint.
    """
    run = last_run()
    found = best_checkpoint(run) or newest_checkpoint(run)
    if found is None:
        raise InputError(f"{run}: the last run has no checkpoint yet", "name a checkpoint folder")
    return found


def find_checkpoint(name_or_path: str | Path) -> Path:
    """A model folder by path, or by a name such as `checkpoint-2000` or `experiment/checkpoint-2000`.

    A name is looked for in the last run, then in every run below the output folders seen.

    Raises:
        InputError: not found, with the nearest name; or several, which are listed and not guessed between.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}: is a file, expected a model folder")
    runs = remembered_runs()
    if runs and not path.is_absolute() and (runs[0] / path).is_dir():
        return runs[0] / path
    folders = list(dict.fromkeys(run.parent for run in runs))
    found = [] if path.is_absolute() else _below(folders, path)
    if len(found) > 1:
        listed = ", ".join(str(place) for place in found)
        raise InputError(f"{name_or_path}: several runs have one: {listed}", "name one of them by its path")
    if not found:
        raise _not_found(str(name_or_path), runs, folders)
    return found[0]


def _below(folders: list[Path], name: Path) -> list[Path]:
    places = [place for folder in folders for place in (folder / name, *sorted(folder.glob(f"*/{name}")))]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def _not_found(name: str, runs: list[Path], folders: list[Path]) -> InputError:
    if not runs:
        return InputError(f"{name}: no such folder, and no run is remembered", "name a folder by its path")
    names = [path.name for path in list_checkpoints(runs[0])]
    near = nearest(name, names)
    looked = f"{name}: no such folder, nor a checkpoint of that name below {', '.join(map(str, folders))}"
    if near:
        return InputError(looked, f"did you mean {near}? the last run has {', '.join(names)}")
    return InputError(looked, f"the last run, {runs[0]}, has {', '.join(names) or 'no checkpoint yet'}")
