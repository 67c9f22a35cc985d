"""Arguments and options that several commands share, so that they read alike in every `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The run spec, a JSON file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the spec; repeatable.")
]
Processes = Annotated[
    int | None, typer.Option("--nproc-per-node", min=1, help="Processes here. [default: all GPUs, or 1 on a CPU]")
]
DEFAULT_CHECKPOINT = "the best of the last run by eval/avg/ndcg@10, else its newest"
"""Of every command that takes one checkpoint; `base.checkpoints.default_checkpoint` is the rule."""
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
