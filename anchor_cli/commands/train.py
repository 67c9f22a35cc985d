"""`anchor train`: a spec becomes a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def train(
    spec: Annotated[Path, typer.Argument(help="The run spec, a JSON file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the spec; repeatable.")
    ] = None,
    nproc_per_node: Annotated[
        int | None, typer.Option("--nproc-per-node", min=1, help="Processes here. Default: all GPUs, or 1 on a CPU.")
    ] = None,
    skip_step: Annotated[
        list[int] | None,
        typer.Option("--skip-step", min=0, metavar="N", help="Make no update at step N, after an incident."),
    ] = None,
) -> None:
    """Train: validated spec -> DeepSpeed ZeRO-2 bf16 on all local GPUs (or the CPU).

    Run again, the same command continues from the newest whole checkpoint. Under torchrun, deepspeed or SLURM it is a
    worker. SIGTERM, Ctrl-C and SIGUSR1 finish the step, save and exit with 75; a second Ctrl-C ends at once.
    """
    import os

    from anchor_cli.engine.signals import StopFlag

    flag = StopFlag()
    flag.install()  # first of all: a signal is heard from here on
    from anchor_cli.words.spec import load_spec

    quiet = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0" or "ANCHOR_LAUNCHED" in os.environ
    resolved = load_spec(spec, overrides, announce=not quiet)
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) < 2:
        processes = nproc_per_node or local_gpus()
        if processes > 1:
            from anchor_cli.engine.launch import launch

            launch(sys.argv[1:], processes, resolved.run_folder)
            return
    from anchor_cli.engine.worker import work

    work(resolved, spec.absolute(), tuple(skip_step or ()), flag)


def local_gpus() -> int:
    """GPUs of this host that may be used, at least 1 (the CPU): asked of the driver, without importing torch."""
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    from anchor_cli.engine.hardware import local_gpus as driver_gpus

    return max(1, len(driver_gpus()))
