"""One process of a training run: joins the others, trains, leaves with the right exit code."""

from __future__ import annotations

import os
from pathlib import Path

from anchor_cli.engine.signals import StopFlag, die_with_parent
from anchor_cli.words.files import write_json
from anchor_cli.words.spec import RunSpec

LAUNCHED = "ANCHOR_LAUNCHED"  # set by `anchor train` for the workers it starts


def work(spec: RunSpec, spec_path: Path, skip_steps: tuple[int, ...] = ()) -> None:
    """Train as the process that the environment says this is (alone, if it says nothing).

    Raises:
        Stopped: a signal came and everything is saved.
    """
    flag = StopFlag()
    flag.install()
    if os.environ.get(LAUNCHED):
        die_with_parent()
    from anchor_cli.engine.extension_locks import clear_stale_locks
    from anchor_cli.engine.watchdog import Watchdog

    clear_stale_locks()
    from anchor_cli.engine.deepspeed_engine import start_processes
    from anchor_cli.engine.run import open_run

    ranks = start_processes()
    watchdog = Watchdog(spec.run_folder / "logs" / "where", ranks.rank)
    watchdog.start()
    try:
        run = open_run(spec, ranks, spec_path.parent)
        from anchor_cli.engine.train import Training

        run.skipped_steps |= set(skip_steps)
        if ranks.rank == 0:
            remember(run.spec, run.folder, run.kernel, run.liger)
        Training(run, flag, watchdog).train()
    finally:
        watchdog.stop()
    import torch.distributed as dist

    dist.destroy_process_group()


def remember(spec: RunSpec, folder: Path, kernel: str, liger: bool) -> None:
    """spec.json and environment.json of the run, and the run itself for `anchor eval checkpoint-N`."""
    from anchor_cli.engine.environment import environment
    from anchor_cli.words.run_folder import RunFolder, remember_run

    files = RunFolder(folder)
    write_json(files.spec, spec.model_dump())
    write_json(files.environment, environment() | {"attention_kernel": kernel, "liger": liger})
    remember_run(folder)
