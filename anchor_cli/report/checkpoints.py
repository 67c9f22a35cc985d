"""The checkpoints of a run as a table: steps, sizes, scores, and what is wrong with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchor_cli.base.checkpoints import best_checkpoint, checkpoint_step, list_checkpoints, verify_checkpoint
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import in_units
from anchor_cli.base.metric_names import EVAL_AVG_NDCG_10, STEP
from anchor_cli.base.runs import RunFolder, last_run, read_json_lines


@dataclass(frozen=True)
class Listed:
    """One checkpoint of a run."""

    path: Path
    step: int
    num_bytes: int
    ndcg: float | None
    """`eval/avg/ndcg@10` at its step, if it was evaluated."""
    best: bool
    problems: list[str]
    """What is wrong with it; empty: whole."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return asdict(self) | {"path": str(self.path), "whole": not self.problems}


def run_of(folder: Path | None) -> Path:
    """A run's folder: the one given, the parent of a checkpoint given, or the last run. Raises InputError."""
    if folder is None:
        return last_run()
    if checkpoint_step(folder) is not None and folder.is_dir():
        return folder.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="give the folder of a run, or nothing for the last run")
    return folder


def list_run(run: Path, *, hashes: bool) -> list[Listed]:
    """The checkpoints of a run, oldest first. `hashes`: read every byte; else only compare sizes."""
    lines = read_json_lines(RunFolder(run).metrics)
    scores = {line[STEP]: line[EVAL_AVG_NDCG_10] for line in lines if EVAL_AVG_NDCG_10 in line}
    best = best_checkpoint(run)
    found = []
    for path in list_checkpoints(run):
        step = checkpoint_step(path) or 0
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        problems = verify_checkpoint(path, hashes=hashes)
        found.append(Listed(path, step, num_bytes, scores.get(step), path == best, problems))
    return found


def rows_of(listed: list[Listed]) -> list[tuple[str, ...]]:
    """Cells of a table: name, size, score, state."""
    return [
        (
            one.path.name,
            in_units(one.num_bytes),
            "" if one.ndcg is None else f"{one.ndcg:.4f}{' best' if one.best else ''}",
            "; ".join(one.problems) or "whole",
        )
        for one in listed
    ]
