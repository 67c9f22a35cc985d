"""`anchor train`: a spec becomes a trained model."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from anchor_cli.commands.options import Device, Overrides, Processes, SpecFile


def train(
    spec: SpecFile,
    overrides: Overrides = None,
    nproc_per_node: Processes = None,
    device: Device = None,
    skip_step: Annotated[
        list[int] | None,
        typer.Option("--skip-step", min=0, metavar="N", help="Make no update at step N, after an incident."),
    ] = None,
) -> None:
    """Train Stage I or II, as the spec says: by DeepSpeed, on all local GPUs or the CPU.

    Run again, the same command continues from the newest whole checkpoint. Under torchrun, deepspeed or srun it is a
    worker; where RANK and WORLD_SIZE count nodes (Kubernetes) it starts the workers of its node. SIGTERM, Ctrl-C,
    SIGUSR1 and a closed terminal (SIGHUP) finish the step, save and exit with 75; a second Ctrl-C ends at once.
    """
    import os

    from anchor_cli.processes.signals import StopFlag

    flag = StopFlag()
    flag.install()  # first of all: signals are handled from here on
    from anchor_cli.base.console import say
    from anchor_cli.processes.launch import LAUNCHED, launch, run_folder_of
    from anchor_cli.processes.ranks import as_node, environment_ranks
    from anchor_cli.spec.load import load_spec
    from anchor_cli.train.worker import run_rank

    ranks, node = environment_ranks(), as_node()
    resolved = load_spec(spec, overrides, announce=LAUNCHED not in os.environ and (ranks is None or ranks[0] == 0))
    train_here = partial(run_rank, resolved, spec.absolute(), tuple(skip_step or ()), flag)
    if ranks is not None and node is None:  # a worker of a launcher
        train_here()
        return
    from anchor_cli.data.training_set import prepare_raw
    from anchor_cli.processes.gpus import local_gpus, require_usable_gpus

    require_usable_gpus()
    processes = nproc_per_node or max(1, len(local_gpus()))  # none: the CPU
    with run_folder_of(resolved.run_folder):
        if node is None or node[0] == 0:  # the other nodes' ranks wait for this node's
            prepare_raw(resolved)
            say(f"{resolved.run_folder}: starting {processes} process{'es' if processes > 1 else ''}")
        if processes > 1:
            launch(sys.argv[1:], processes, resolved.run_folder, node or (0, 1))
        else:
            train_here()
