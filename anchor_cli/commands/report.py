"""`anchor report`: runs as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.commands.options import AsJson


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Run folders, OUTPUT_DIR/EXPERIMENT_ID. [default: the last run]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write. [default: report.html in the run]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's curves, scores and incidents as one HTML page; several runs are overlaid."""
    from anchor_cli.base.runs import RunFolder, confirm_outside, last_run, read_json_lines
    from anchor_cli.report.report import find_run, write_report

    if runs:
        folders = [find_run(run) for run in runs]
    else:
        folders = [last_run(lambda run: read_json_lines(RunFolder(run).metrics), "logged step")]
        if out is None:
            confirm_outside(folders[0], f"anchor report {folders[0]}")
    page = write_report(folders, out)
    if as_json:
        print_json({"report": str(page), "runs": [str(folder) for folder in folders]})
    else:
        say(f"{page} ({page.stat().st_size / 1e3:,.0f} kB): open it in a browser")
