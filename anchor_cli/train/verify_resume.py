"""Proof on the user's own host: 2N steps at one go against N steps, a new start, and N more.

Both are real commands in processes of their own, with the user's spec, data, schedule and number of processes; only
length, evaluation, tracking and place are changed. What is compared: every logged number of training, and every tensor
of the last checkpoint (weights, fp32 weights, both moments), bit by bit.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import safe_open

from anchor_cli.base.console import progress, say
from anchor_cli.base.errors import InputError, RunError
from anchor_cli.base.metric_names import LOSS, STEP, TRAIN_PREFIX
from anchor_cli.base.runs import RunFolder, read_json_lines
from anchor_cli.data.training_set import prepare_raw
from anchor_cli.spec.spec import RunSpec


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart."""

    numbers_compared: int
    numbers_different: int
    largest_number: float
    """Largest relative difference of a logged number."""
    first_step: int | None
    """First step at which a logged number differs."""
    tensors_compared: int
    tensors_different: int
    largest_weight: float
    """Largest difference of a weight, relative to the largest weight of its tensor."""

    @property
    def none(self) -> bool:
        """Bit for bit the same."""
        return self.numbers_different == 0 and self.tensors_different == 0


@dataclass(frozen=True)
class Verdict:
    """What `verify_resume` found; `noise`: two uninterrupted runs against each other, measured only when needed."""

    steps: int
    processes: int | None
    resumed: Difference
    noise: Difference | None

    @property
    def exact(self) -> bool:
        """The resumed run is the uninterrupted one, bit for bit."""
        return self.resumed.none

    @property
    def passed(self) -> bool:
        """Exact, or no further off than this host's own kernels make two uninterrupted runs."""
        if self.exact or self.noise is None:
            return self.exact
        noise, resumed = self.noise, self.resumed
        return (
            not noise.none
            and resumed.largest_number <= 2 * noise.largest_number
            and resumed.largest_weight <= 2 * noise.largest_weight
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON can say it."""
        return asdict(self) | {"exact": self.exact, "passed": self.passed}


def verify_resume(
    spec: RunSpec, spec_path: Path, overrides: list[str], num_steps: int, processes: int | None
) -> Verdict:
    """Run the three (or, when they differ, four) trainings and compare. Needs disk for three checkpoints.

    Raises:
        InputError: the spec cannot be trained, or has fewer than 2N steps.
        RunError: a training failed.
    """
    data = prepare_raw(spec)
    output = Path(spec.output_dir).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix=".verify-resume-", dir=output))

    def train(name: str, stop: int) -> None:
        changes = {
            "output_dir": folder, "experiment_id": name, "dataset_file_path": data.absolute(),
            "stop_after_n_steps": stop, "save_steps": 0, "eval_steps": 0, "eval_on_start": "false",
            "logging_steps": 1, "report_to": "none",
        }  # fmt: skip
        settings = [*overrides, *(f"{key}={value}" for key, value in changes.items())]
        sets = [argument for setting in settings for argument in ("--set", setting)]
        count = ["--nproc-per-node", str(processes)] if processes else []
        _train([str(spec_path), *sets, *count], RunFolder(folder / name), stop, folder)

    say(f"{2 * num_steps} steps, then {num_steps} + {num_steps}, in a folder of {output} that is removed at the end")
    try:
        train("uninterrupted", 2 * num_steps)
        if not RunFolder(folder / "uninterrupted").checkpoint(2 * num_steps).is_dir():
            message = f"{spec_path}: the run has fewer than {2 * num_steps} steps"
            raise InputError(message, hint="give a smaller --steps")
        train("resumed", num_steps)
        train("resumed", 2 * num_steps)
        resumed = difference(folder / "uninterrupted", folder / "resumed", 2 * num_steps)
        noise = None
        if not resumed.none:
            train("again", 2 * num_steps)
            noise = difference(folder / "uninterrupted", folder / "again", 2 * num_steps)
        return Verdict(num_steps, processes, resumed, noise)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _train(arguments: list[str], run: RunFolder, stop: int, folder: Path) -> None:
    """One training as a real command. What it prints names files that are removed: it is shown when it fails."""
    log = folder / f"{run.path.name}.log"
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "anchor_cli", "train", *arguments],
            env={**os.environ, "ANCHOR_HOME": str(folder / "home")}, stdout=out, stderr=out,
        )  # fmt: skip
    done = len(read_json_lines(run.metrics))
    try:
        with progress(f"training {run.path.name} to step {stop}", stop - done, "steps") as bar:
            while child.poll() is None:
                time.sleep(0.2)
                now = len(read_json_lines(run.metrics))
                bar.advance(now - done)
                done = now
    finally:
        if child.poll() is None:  # Ctrl-C
            child.terminate()
            child.wait()
    if child.returncode:
        printed = log.read_text(encoding="utf-8", errors="replace")
        sys.stderr.write(printed[max(0, printed.rfind("\nanchor: ")) :].strip() + "\n")
        raise (InputError if child.returncode == 2 else RunError)(
            f"training {run.path.name} ended with exit code {child.returncode}", hint="its own message is above"
        )


def difference(one: Path, other: Path, last_step: int) -> Difference:
    """Compare the logs of two runs and their checkpoints of `last_step`."""
    ours, theirs = ([line for line in read_json_lines(RunFolder(run).metrics) if LOSS in line] for run in (one, other))
    if [line[STEP] for line in ours] != list(range(1, last_step + 1)) or len(ours) != len(theirs):
        raise RunError(f"{other}: metrics.jsonl has {len(theirs)} training lines, {one} has {len(ours)}")
    compared = different = 0
    largest, first_step = 0.0, None
    for a, b in zip(ours, theirs, strict=True):
        for key in [key for key in a if key == STEP or key.startswith(TRAIN_PREFIX)]:  # of either stage
            compared += 1
            if a[key] != b[key]:
                different += 1
                first_step = first_step if first_step is not None else a[STEP]
                largest = max(largest, abs(a[key] - b[key]) / max(abs(a[key]), 1e-30))
    tensors, unequal, weight = compare_tensors(
        RunFolder(one).checkpoint(last_step), RunFolder(other).checkpoint(last_step)
    )
    return Difference(compared, different, largest, first_step, tensors, unequal, weight)


def compare_tensors(one: Path, other: Path) -> tuple[int, int, float]:
    """(tensors, how many differ, largest difference relative to the tensor's largest value) of two checkpoints."""
    compared = different = 0
    largest = 0.0
    for path in sorted(one.glob("*.safetensors")):
        with safe_open(path, framework="pt") as ours, safe_open(other / path.name, framework="pt") as theirs:
            for name in ours.keys():  # noqa: SIM118 - not a dict
                a, b = ours.get_tensor(name), theirs.get_tensor(name)
                compared += 1
                if not torch.equal(a, b):
                    different += 1
                    apart = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)
                    largest = max(largest, float(apart))
    return compared, different, largest
