"""A training run, put together: what the loop holds, and what a checkpoint keeps of it besides tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from anchor_cli.base.console import warn
from anchor_cli.base.contract import TextContract
from anchor_cli.base.runs import RunFolder
from anchor_cli.data.batches import BatchPlan
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.model.encoder import PackedEncoder
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec import schedule
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.stages.objective import Objective


@dataclass
class Run:
    """A run of one rank, fresh or resumed; `train/start.py` builds it."""

    spec: RunSpec
    ranks: Ranks
    contract: TextContract
    pairs: PreparedPairs
    plan: BatchPlan
    engine: Any
    optimizer: torch.optim.Optimizer
    objective: Objective
    feed: Any
    """Packs the objective's steps."""
    kernel: str
    liger: bool
    raw_ds_config: dict[str, Any]
    token_budget: int
    checkpoint: Path | None = None
    """What it continues from."""
    start_model: str = ""
    """`model_digest` of the model that the run began with."""
    state: dict[str, Any] = field(default_factory=dict)
    """The `training_state.json` it continues from; empty for a fresh run."""

    def __post_init__(self) -> None:
        self.best: dict[str, Any] | None = self.state.get("best")
        self.evaluated_step: int | None = self.state.get("evaluated_step")
        self.skipped_steps: set[int] = set(self.state.get("skipped_steps", ()))
        self.wandb_run_id: str | None = self.state.get("wandb_run_id")

    @property
    def folder(self) -> Path:
        return self.spec.run_folder

    @property
    def files(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs, prints and writes files."""
        return self.ranks.rank == 0

    @property
    def model(self) -> PackedEncoder:
        module: PackedEncoder = self.engine.module
        return module

    @property
    def first_step(self) -> int:
        """Steps done when this start began."""
        return int(self.state.get("step", 0))

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    @property
    def last_step(self) -> int:
        """Updates after which this run ends."""
        return min(self.total_steps, self.spec.stop_after_n_steps or self.total_steps)

    def updates_before(self, step: int) -> int:
        """Optimizer updates made before `step`: all steps but the skipped ones."""
        return step - sum(skipped < step for skipped in self.skipped_steps)

    def skip(self, steps: tuple[int, ...]) -> None:
        """Make no update at these steps; a warning for one that lies before the checkpoint."""
        for step in sorted(set(steps) - self.skipped_steps):
            if step >= self.first_step:
                self.skipped_steps.add(step)
            elif self.is_first:
                warn(f"--skip-step {step}: nothing to skip, the run continues at step {self.first_step}")

    def update(self, ready: Any) -> Any:
        """One optimizer step: its rows, its learning rate. Raises NonFiniteGradient before any weight has changed."""
        return self.objective.update(self.engine, ready, self.learning_rate(ready.step))

    def learning_rate(self, step: int) -> float:
        spec = self.spec
        warmup = schedule.warmup_steps_of(self.total_steps, spec.warmup_steps, spec.warmup_ratio)
        return schedule.learning_rate(
            step, peak=spec.learning_rate, warmup=warmup, total=self.total_steps, kind=spec.lr_scheduler_type
        )

    def epoch(self, step: int) -> float:
        return step / self.plan.steps_per_epoch

    def training_state(self, step: int, metrics_bytes: int) -> dict[str, Any]:
        """`training_state.json` at `step`: everything besides tensors that the same command needs to continue."""
        return {
            "step": step,
            "epoch": self.epoch(step),
            "total_steps": self.total_steps,
            "global_batch_size": self.plan.global_batch_size,
            "world_size": self.ranks.world_size,
            "num_micro_batches": self.plan.num_micro_batches,
            "token_budget": self.token_budget,
            "start_model": self.start_model,
            "spec": self.spec.model_dump(),
            "spec_fingerprint": self.spec.fingerprint,
            "data_fingerprint": self.pairs.fingerprint,
            "metrics_bytes": metrics_bytes,
            "best": self.best,
            "evaluated_step": self.evaluated_step,
            "skipped_steps": sorted(self.skipped_steps),
            "wandb_run_id": self.wandb_run_id,
        }
