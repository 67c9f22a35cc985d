"""`anchor doctor`: is this host fit to train."""

from __future__ import annotations

from typing import Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import RunError
from anchor_cli.commands.options import AsJson


def doctor(
    spec: Annotated[
        str | None,
        typer.Argument(metavar="SPEC", help="Look with this run's eyes: its output_dir, kernel, DeepSpeed config."),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Also compare DeepSpeed's accumulated gradients with plain autograd (30 s)."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this host: Python, packages, GPUs, kernels, limits, disk, network. Exit code 1 when a check fails."""
    from anchor_cli.doctor import doctor as examination
    from anchor_cli.doctor.needs import Wishes, wishes_of

    wishes = Wishes()
    if spec is not None:
        from anchor_cli.spec.load import load_spec

        wishes = wishes_of(load_spec(spec, []))
    checks = []
    for check in examination.examine(wishes, gradients=gradients):
        checks.append(check)
        if not as_json:
            _print(examination.lines_of(check), check.status)
    summary = examination.summary(checks)
    if as_json:
        print_json(summary)
    counts = summary["counts"]
    said = f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures"
    if counts["fail"]:
        raise RunError(f"this host is not fit to train: {said}", "do what the arrows say, then run it again")
    if not as_json:
        say(said)


def _print(lines: list[str], status: str) -> None:
    """The lines on stdout (they are the result), the verdict coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    first = Text(lines[0])
    first.stylize({"ok": "green", "warn": "yellow", "fail": "bold red"}[status], 0, len(status))
    out.print(first)
    for line in lines[1:]:
        out.print(line, style="dim")
