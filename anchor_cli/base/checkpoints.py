"""Checkpoints of a run: found by name, listed, verified."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import InputError, nearest
from anchor_cli.base.files import sha256_file
from anchor_cli.base.metric_names import EVAL_AVG_NDCG_10, STEP
from anchor_cli.base.runs import RunFolder, last_run, read_json_lines, remembered_runs

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


TRAINING_STATE = "training_state.json"
OPTIMIZER_BYTES = 12
"""Of one weight in a checkpoint's optimizer state: the fp32 weight and two fp32 moments."""


def checkpoint_step(path: str | Path) -> int | None:
    """Optimizer steps of a checkpoint by its name, `checkpoint-N`; None for another name."""
    match = _CHECKPOINT_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def checkpoint_bytes(num_parameters: int, bytes_per_weight: int, rest: int) -> int:
    """Bytes of a checkpoint: weights, the optimizer's state, and `rest` (tokenizer, configs, manifest)."""
    return num_parameters * (bytes_per_weight + OPTIMIZER_BYTES) + rest


def is_ours(folder: str | Path) -> bool:
    """Whether a folder was written by `anchor train`, so that it must be whole; by its files, not by its name alone.

    Other trainers name theirs `checkpoint-N` too. One of ours that lost its training state still has its contract.
    """
    from anchor_cli.base.contract import FILE_NAME

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


MANIFEST = "manifest.json"


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; empty: it is whole. `hashes=False` compares sizes only."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the GIL; the disk is the limit
        found = pool.map(lambda item: _problem(folder / item[0], item[1], hashes), manifest.items())
        return [problem for problem in found if problem]


def _problem(path: Path, known: dict[str, Any], hashes: bool) -> str | None:
    """What is wrong with one file of a checkpoint."""
    try:
        size = path.stat().st_size
        if size != known["size"]:
            return f"{path.name} has {size:,} bytes instead of {known['size']:,}"
        if hashes and sha256_file(path) != known["sha256"]:
            return f"{path.name} was changed after it was written (checksum differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(run_folder)):
        problems = verify_checkpoint(folder)
        if not problems:
            return folder, damaged
        damaged.append(f"{folder}: damaged: {'; '.join(problems)}")
    return None, damaged


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state.json` of a checkpoint. Raises InputError."""
    try:
        state: dict[str, Any] = json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8"))
        return state
    except (OSError, ValueError) as error:
        message = f"{folder / TRAINING_STATE}: cannot be read ({error})"
        raise InputError(message, hint="is this a checkpoint of anchor train?") from None
