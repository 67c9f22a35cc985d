"""Checkpoints of a run: found by name, listed, verified, removed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from anchor_cli.base.console import say, warn
from anchor_cli.base.errors import InputError, nearest
from anchor_cli.base.files import sha256_file
from anchor_cli.base.metric_names import EVAL_AVG_NDCG_10, HEALTH_KEYS, STEP, collapse, eval_key
from anchor_cli.base.runs import RunFolder, last_run, read_json_lines, remembered_runs

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state.json"
OPTIMIZER_BYTES = 12
"""Of one weight in a checkpoint's optimizer state: the fp32 weight and two fp32 moments."""
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


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
    folders = [path for path in Path(run).glob("checkpoint-*") if checkpoint_step(path) is not None and path.is_dir()]
    return sorted(folders, key=lambda path: checkpoint_step(path) or 0)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint of the highest step; None when there is none."""
    return next(reversed(list_checkpoints(run)), None)


def scores_of(run: str | Path, metric: str = EVAL_AVG_NDCG_10) -> dict[int, float]:
    """A metric by step, from `metrics.jsonl`; a step evaluated twice has its last score."""
    lines = read_json_lines(RunFolder(Path(run)).metrics)
    return {line[STEP]: line[metric] for line in lines if isinstance(line.get(metric), int | float)}


def best_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint whose step has the highest `eval/avg/ndcg@10`; None when none was evaluated."""
    scores = scores_of(run)
    evaluated = [path for path in list_checkpoints(run) if checkpoint_step(path) in scores]
    return max(evaluated, key=lambda path: scores[checkpoint_step(path) or 0], default=None)


def default_checkpoint(doing: str, command: str) -> Path:
    """The checkpoint that a command takes without a name: the best of the last run that has one, else its newest.

    Says which, with the scores of both and the command for the other, and warns where the best is hardly trained or has
    collapsed. `doing` and `command`: `exporting`, `anchor export`.

    Raises:
        InputError: there is no run, or none has a checkpoint.
    """
    return checkpoint_of(last_run(list_checkpoints, "checkpoint"), "the last run", doing, command)


def checkpoint_of(run: Path, called: str, doing: str, command: str) -> Path:
    """The best checkpoint of a run that has some, else its newest; `called`: the run in the line that says which."""
    best, newest, scores = best_checkpoint(run), list_checkpoints(run)[-1], scores_of(run)
    if best is None:
        say(f"{doing} {newest}: the newest of {called}, none of which was evaluated")
        return newest
    step, newest_score = checkpoint_step(best) or 0, scores.get(checkpoint_step(newest) or 0)
    line = f"{doing} {best}: the best of {called} by {EVAL_AVG_NDCG_10}, {scores[step]:.4f}"
    if newest == best:
        say(f"{line}, and the newest")
    else:
        has = "was not evaluated" if newest_score is None else f"has {newest_score:.4f}"
        say(f"{line}; the newest, {newest.name}, {has}: {command} {newest}")
    for problem in _doubts(run, step, scores, is_newest=newest == best):
        warn(f"{best.name}: {problem}")
    return best


def _doubts(run: Path, step: int, scores: dict[int, float], *, is_newest: bool) -> list[str]:
    """Why the best checkpoint may be the wrong one to take."""
    doubts = []
    trained = [other for other in scores if other > 0]
    untrained = scores.get(0)
    if untrained is not None and untrained >= scores[step]:
        doubts.append(f"the untrained model scored {untrained:.4f}, no less")
    if step == min(trained, default=step) and len(trained) > 1 and not is_newest:
        doubts.append("the first evaluation is the best one, so it is hardly trained")
    if doubts:
        doubts[-1] += "; before Stage II this score need not be what counts (docs/evaluation.md)"
    health = {key: scores_of(run, eval_key("avg", key)).get(step, 0.0) for key in HEALTH_KEYS}
    return [*doubts, *filter(None, [collapse(health)])]


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
    folders = list(dict.fromkeys(run.parent for run in runs))
    if path.is_absolute():
        raise _not_found(str(name_or_path), runs, folders)
    if runs and (runs[0] / path).is_dir():
        return runs[0] / path
    candidates = [place for folder in folders for place in (folder / path, *sorted(folder.glob(f"*/{path}")))]
    places = [place for place in dict.fromkeys(candidates) if place.is_dir()]
    if len(places) > 1:
        listed = ", ".join(map(str, places))
        raise InputError(f"{name_or_path}: several runs have one: {listed}", "name one of them by its path")
    if not places:
        raise _not_found(str(name_or_path), runs, folders)
    return places[0]


def _not_found(name: str, runs: list[Path], folders: list[Path]) -> InputError:
    if not runs:
        return InputError(f"{name}: no such folder, and no run is remembered", "name a folder by its path")
    names = [path.name for path in list_checkpoints(runs[0])]
    message = f"{name}: no such folder, nor a checkpoint of that name below {', '.join(map(str, folders))}"
    if near := nearest(name, names):
        return InputError(message, f"did you mean {near}? the last run has {', '.join(names)}")
    return InputError(message, f"the last run, {runs[0]}, has {', '.join(names) or 'no checkpoint yet'}")


def verify_checkpoint(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; empty: it is whole. `hashes=False` compares sizes only."""
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the GIL; the disk is the limit
        problems = pool.map(lambda item: _problem(folder / item[0], item[1], hashes), manifest.items())
        return [problem for problem in problems if problem]


def require_whole(folder: Path) -> None:
    """Refuse a checkpoint of ours that lacks a file or has one cut short, by sizes. Raises InputError."""
    if is_ours(folder) and (problems := verify_checkpoint(folder, hashes=False)):
        others = [path.name for path in list_checkpoints(folder.parent) if path != folder]
        hint = f"choose another checkpoint: {', '.join(others)}" if others else "it cannot be used"
        raise InputError(f"{folder}: not a whole checkpoint: {problems[0]}", hint)


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


def newest_whole(run_folder: Path, up_to: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint (of step `up_to` at most) that verifies, and a line for each newer one that does not."""
    damaged: list[str] = []
    for folder in reversed(list_checkpoints(run_folder)):
        if up_to is not None and (checkpoint_step(folder) or 0) > up_to:
            continue
        problems = verify_checkpoint(folder)
        if not problems:
            return folder, damaged
        damaged.append(f"{folder}: damaged: {'; '.join(problems)}")
    return None, damaged


def prune(run_folder: Path, limit: int | None, *, hashes: bool = False, saved: Path | None = None) -> list[Path]:
    """Remove the oldest checkpoints beyond `limit`. Returns what went.

    Never the best by `eval/avg/ndcg@10` (of those that were evaluated), nor the newest whole one (`hashes=False`: whole
    by size), nor the one just written, `saved`. Damaged ones go first; with them what is newer than `saved`, which a
    run leaves behind when its newest checkpoint does not verify and it goes on from an older one.
    """
    gone = removable(run_folder, list_checkpoints(run_folder), limit, hashes=hashes, saved=saved)
    for path in gone:
        trash = path.with_name(f".{path.name}.removed")
        os.rename(path, trash)  # gone at once under its name, then emptied
        shutil.rmtree(trash, ignore_errors=True)
    return gone


def removable(
    run_folder: Path, checkpoints: list[Path], limit: int | None, *, hashes: bool, saved: Path | None = None
) -> list[Path]:
    """What `prune` removes of `checkpoints` (oldest first)."""
    if limit is None or len(checkpoints) <= limit:
        return []
    newest = None if saved is None else checkpoint_step(saved)
    usable = [path for path in checkpoints if newest is None or (checkpoint_step(path) or 0) <= newest]
    whole = [path for path in usable if not verify_checkpoint(path, hashes=hashes)]
    protected = {best_checkpoint(run_folder), *whole[-1:]}
    damaged_first = sorted(checkpoints, key=lambda path: path in whole)
    return [path for path in damaged_first if path not in protected][: len(checkpoints) - limit]


def model_digest(model: str | Path) -> str:
    """Tells one model from another without reading all of it: SHA-256 over config.json and over names, sizes and 16
    pieces of 64 KiB of its safetensors files; of a model that is no folder its name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(model)
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for piece in range(16):
                file.seek(size * piece // 16)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state.json` of a checkpoint. Raises InputError."""
    try:
        state: dict[str, Any] = json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8"))
        return state
    except (OSError, ValueError) as error:
        message = f"{folder / TRAINING_STATE}: cannot be read ({error})"
        raise InputError(message, hint="is this a checkpoint of anchor train?") from None
