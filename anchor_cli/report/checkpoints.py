"""The checkpoints of a run: steps, sizes, scores, and what is wrong with them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anchor_cli.base.checkpoints import best_checkpoint, checkpoint_step, list_checkpoints, scores_of, verify_checkpoint
from anchor_cli.base.errors import InputError
from anchor_cli.base.runs import last_run


@dataclass(frozen=True)
class CheckpointState:
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
        """For JSON."""
        return asdict(self) | {"path": str(self.path), "whole": not self.problems}


def run_of(folder: Path | None) -> Path:
    """A run's folder: the one given, the parent of a checkpoint given, or the last run. Raises InputError."""
    if folder is None:
        return last_run()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", hint="give the folder of a run, or nothing for the last run")
    return folder if checkpoint_step(folder) is None else folder.absolute().parent


def states_of(run: Path, *, hashes: bool) -> list[CheckpointState]:
    """The checkpoints of a run, oldest first. `hashes`: read every byte; else only compare sizes."""
    scores, best = scores_of(run), best_checkpoint(run)
    states = []
    for path in list_checkpoints(run):
        step = checkpoint_step(path) or 0
        num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        problems = verify_checkpoint(path, hashes=hashes)
        states.append(CheckpointState(path, step, num_bytes, scores.get(step), path == best, problems))
    return states
