"""`anchor replay`: one step of a run again, to see which rows are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anchor_cli.commands.options import AsJson, Device

if TYPE_CHECKING:
    from anchor_cli.train.replay import Replay


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.", show_default=False)],
    step: Annotated[int, typer.Option("--step", min=0, metavar="N", help="As the incident's message has it.")],
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Run one step of a run again, from the nearest checkpoint before it, and name the rows that are not finite.

    Nothing is written. The steps between checkpoint and step are trained again, in one process.
    """
    from anchor_cli.base.console import print_json, say
    from anchor_cli.base.errors import InputError
    from anchor_cli.base.runs import RunFolder

    files = RunFolder(run)
    if not files.spec.is_file():
        message = f"{run}: not the folder of a run: {files.spec.name} is missing"
        raise InputError(message, hint="give {output_dir}/{experiment_id}")
    from anchor_cli.train import replay as engine

    replayed = engine.replay(run, step)
    if as_json:
        print_json(replayed.as_dict())
        return
    _table(replayed)
    bad = [row for micro in replayed.micro_batches for row in micro.non_finite_rows]
    for row in bad:
        if row.grad_norm is None:
            say(f"row {row.row}: the embedding of one of its texts, or the gradient by it, is not finite")
        else:
            say(f"row {row.row}: d2q {row.d2q_loss:.4g}, q2d {row.q2d_loss:.4g}, gradient norm {row.grad_norm:.4g}")
        say(f"  query: {row.query}")
        say(f"  document: {row.document}")
    if replayed.finite:
        say(f"step {step}: every micro-batch is finite here")
    elif not bad:
        say(f"step {step}: not finite, though each row alone is: the sum overflows; a lower learning rate may help")


def _table(replayed: Replay) -> None:
    from rich.table import Table

    from anchor_cli.base.console import console

    start = replayed.checkpoint or "the beginning"
    title = f"{replayed.run}: step {replayed.step}, from {start}, loss {replayed.loss:.4g}"
    table = Table(title=title, title_justify="left")
    shares = ["loss share"] if replayed.micro_batches[0].loss is not None else []  # Stage II's loss has none
    for name in ("rank", "micro-batch", "rows", *shares, "gradient norm", "rows not finite"):
        table.add_column(name, justify="right")
    for one in replayed.micro_batches:
        names = ", ".join(str(row.row) for row in one.non_finite_rows)
        state = "" if one.finite else names or "all together"
        numbers = [f"{number:.4g}" for number in (one.loss, one.grad_norm) if number is not None]
        table.add_row(str(one.rank), str(one.index), str(len(one.rows)), *numbers, state)
    console().print(table)
