"""Arguments and options that several commands share, so that they read alike in every `--help`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anchor_cli.base.errors import InputError


class Place(StrEnum):
    """Where a command computes."""

    cpu = "cpu"
    cuda = "cuda"


def _choose_device(device: Place | None) -> Place | None:
    """Hide the GPUs from this process and those that it starts, or insist on one."""
    if device == Place.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device == Place.cuda:
        from anchor_cli.processes.gpus import local_gpus, require_usable_gpus

        require_usable_gpus()
        if not local_gpus():
            raise InputError("--device cuda: there is no NVIDIA GPU here, or CUDA_VISIBLE_DEVICES hides it")
    return device


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The run spec, a JSON file.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the spec; repeatable.")
]
Processes = Annotated[
    int | None, typer.Option("--nproc-per-node", min=1, help="Processes here. [default: all GPUs, or 1 on a CPU]")
]
DEFAULT_CHECKPOINT = "the best of the last run by eval/avg/ndcg@10, else its newest"
"""Of every command that takes one checkpoint; `base.checkpoints.default_checkpoint` is the rule."""
Device = Annotated[
    Place | None,
    typer.Option("--device", callback=_choose_device, help="[default: the GPUs; the CPU where there are none]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
