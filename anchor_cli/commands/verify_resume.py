"""`anchor verify-resume`: does a resumed run equal an uninterrupted one on this host?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from anchor_cli.base.errors import RunError
from anchor_cli.commands.options import AsJson, Device, Overrides, Processes, SpecFile

if TYPE_CHECKING:
    from anchor_cli.train.verify_resume import Verdict


def verify_resume(
    spec: SpecFile,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="2N steps against N + resume + N.")] = 5,
    overrides: Overrides = None,
    nproc_per_node: Processes = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prove on this host that a resumed run equals an uninterrupted one: 2N steps against N, a new start, and N more.

    Every logged number and every tensor of the last checkpoint is compared bit by bit. Where they differ, a second
    uninterrupted run tells what this host's kernels do by themselves (GPU kernels that add in any order). Exit 1 when
    resuming differs by more than that. Needs disk for three checkpoints, which are removed.
    """
    from anchor_cli.base.console import print_json
    from anchor_cli.spec.load import load_spec

    loaded = load_spec(spec, overrides)
    from anchor_cli.train import verify_resume as engine

    verdict = engine.verify_resume(loaded, spec.absolute(), overrides or [], steps, nproc_per_node)
    if as_json:
        print_json(verdict.as_dict())
    else:
        _table(verdict)
    if not verdict.passed:
        raise RunError(
            f"{spec}: the resumed run differs from the uninterrupted one from step {verdict.resumed.first_step} on",
            hint="please report this with the table above and environment.json of a run",
        )


def _table(verdict: Verdict) -> None:
    from rich.table import Table

    from anchor_cli.base.console import console, say

    table = Table(
        title=f"{2 * verdict.steps} steps against {verdict.steps} + resume + {verdict.steps}", title_justify="left"
    )
    for name in ("", "logged numbers", "differ", "largest", "tensors", "differ", "largest"):
        table.add_column(name, justify="right" if name else "left")
    for name, d in (("resumed", verdict.resumed), ("uninterrupted, again", verdict.noise)):
        if d is not None:
            table.add_row(
                name, f"{d.numbers_compared:,}", f"{d.numbers_different:,}", f"{d.largest_number:.1e}",
                f"{d.tensors_compared:,}", f"{d.tensors_different:,}", f"{d.largest_weight:.1e}",
            )  # fmt: skip
    console().print(table)
    if verdict.exact:
        say("exact: the resumed run is the uninterrupted one, bit for bit")
    elif verdict.passed:
        say("as exact as this host is: two uninterrupted runs differ by as much (its kernels add in any order)")
    else:
        say("different: see the first step above")
