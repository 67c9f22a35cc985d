"""`anchor checkpoints`: list, verify and prune what a run has saved."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.commands.options import AsJson

if TYPE_CHECKING:
    from anchor_cli.report.checkpoints import CheckpointState


class Action(StrEnum):
    """What to do with a run's checkpoints."""

    list = "list"
    verify = "verify"
    prune = "prune"


def checkpoints(
    action: Annotated[
        Action,
        typer.Argument(
            metavar="ACTION", help="list: compares sizes; verify: reads every byte; prune: removes old ones."
        ),
    ],
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A run's folder. [default: the last run]", show_default=False)
    ] = None,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, help="prune: how many stay. [default: the run's save_total_limit]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="prune: only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """List, verify or prune the checkpoints of a run.

    prune removes damaged ones first, then the oldest; never the best by eval/avg/ndcg@10 nor the newest whole one.
    """
    from anchor_cli.base.checkpoints import list_checkpoints, prune, removable
    from anchor_cli.base.console import print_json, say
    from anchor_cli.base.runs import confirm_outside
    from anchor_cli.report.checkpoints import run_of, states_of

    folder = run_of(run)
    if action == Action.prune:
        if run is None and not dry_run:
            confirm_outside(folder, f"anchor checkpoints prune {folder}")
        limit = keep or _save_total_limit(folder)
        present = list_checkpoints(folder)
        gone = removable(folder, present, limit, hashes=True) if dry_run else prune(folder, limit, hashes=True)
        if as_json:
            print_json({"run": str(folder), "keep": limit, "dry_run": dry_run, "removed": [str(path) for path in gone]})
        for path in gone:
            say(f"{'would remove' if dry_run else 'removed'} {path}")
        say(f"{folder}: {len(present) - len(gone)} of {len(present)} checkpoints {'would stay' if dry_run else 'stay'}")
        return
    states = states_of(folder, hashes=action == Action.verify)
    if as_json:
        print_json({"run": str(folder), "checkpoints": [state.as_dict() for state in states]})
    else:
        _print_table(folder, states)
    damaged = [state.path.name for state in states if state.problems]
    if damaged and action == Action.verify:
        raise RunError(
            f"{folder}: damaged: {', '.join(damaged)}",
            hint="training continues from the newest whole one; `anchor checkpoints prune` removes damaged ones first",
        )


def _save_total_limit(run: Path) -> int:
    """`save_total_limit` of a run's spec. Raises InputError: it has none."""
    import json

    from anchor_cli.base.runs import RunFolder

    try:
        limit = json.loads(RunFolder(run).spec.read_text(encoding="utf-8")).get("save_total_limit")
    except (OSError, ValueError):
        limit = None
    if limit is None:
        raise InputError(f"{run}: its spec has no save_total_limit", hint="say how many stay: --keep N")
    return int(limit)


def _print_table(folder: Path, states: list[CheckpointState]) -> None:
    from rich.table import Table

    from anchor_cli.base.console import console, say
    from anchor_cli.base.files import in_units

    if not states:
        say(f"{folder}: no checkpoint yet")
        return
    table = Table(title=str(folder), title_justify="left")
    for name in ("checkpoint", "size", "eval/avg/ndcg@10", "state"):
        table.add_column(name, justify="right" if name in ("size", "eval/avg/ndcg@10") else "left")
    for state in states:
        score = "" if state.ndcg is None else f"{state.ndcg:.4f}{' best' if state.best else ''}"
        problems = "; ".join(state.problems) or "whole"
        table.add_row(state.path.name, in_units(state.num_bytes), score, problems)
    console().print(table)
