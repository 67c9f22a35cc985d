"""`anchor doctor`: is this host fit to train."""

from __future__ import annotations

from typing import Annotated

import typer

from anchor_cli.base.check import Check, lines_of
from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import RunError
from anchor_cli.commands.options import AsJson


def doctor(
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="SPEC", help="Also check what this spec needs: its output_dir, kernel, DeepSpeed config, tracker."
        ),
    ] = None,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Also compare DeepSpeed's accumulated gradients with plain autograd (30 s)."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this host: Python, packages, GPUs, kernels, limits, disk, network. Exit code 1 when a check fails."""
    from anchor_cli.doctor.doctor import check_host, summary
    from anchor_cli.doctor.needs import Needs
    from anchor_cli.spec.load import load_spec

    checks = []
    for check in check_host(Needs() if spec is None else Needs.of(load_spec(spec, [])), gradients=gradients):
        checks.append(check)
        if not as_json:
            _print(check)
    result = summary(checks)
    if as_json:
        print_json(result)
    counts = result["counts"]
    count_line = f"{counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures"
    if counts["fail"]:
        raise RunError(f"this host is not fit to train: {count_line}", "do what the arrows say, then run it again")
    if not as_json:
        say(count_line)


def _print(check: Check) -> None:
    """The lines on stdout (they are the result), the status coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    first, *rest = lines_of(check)
    coloured = Text(first)
    coloured.stylize({"ok": "green", "warn": "yellow", "fail": "bold red"}[check.status], 0, len(check.status))
    out.print(coloured)
    for line in rest:
        out.print(line, style="dim")
