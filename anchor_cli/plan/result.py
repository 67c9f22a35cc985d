"""What a plan is made for, and what it says: the tables of `anchor plan`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from anchor_cli.plan.contrast import ContrastWork
from anchor_cli.plan.hardware import Gpu
from anchor_cli.plan.memory import Memory

ASSUMED_MFU = 0.35
"""Share of the card's peak spent on useful work; assumption. One H200 had 0.368 in the forward and backward pass of
Qwen3-0.6B (docs/benchmarks.md), without optimizer and network."""


@dataclass(frozen=True)
class Hardware:
    """What the run is planned for. `gpu` None: CPU processes, whose speed and memory are not modelled."""

    gpu: Gpu | None
    num_gpus: int
    memory_bytes: float | None


@dataclass(frozen=True)
class Throughput:
    """`tokens_per_s` of the whole run where measured, else the assumed share of peak."""

    mfu: float = ASSUMED_MFU
    tokens_per_s: float | None = None
    basis: str = "assumed"


@dataclass(frozen=True)
class Steps:
    num_rows: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    last_step: int
    warmup_steps: int
    rows_dropped_per_epoch: int


@dataclass(frozen=True)
class Tokens:
    """Texts' own tokens, each counted once."""

    mean_query: float
    mean_document: float
    longest_row: int
    per_step: float
    whole_run: float
    truncated_share: float | None
    source: str


@dataclass(frozen=True)
class MicroBatches:
    """How a step is divided on every rank."""

    token_budget: int
    budget_source: str
    micro_batches_per_step: int
    heaviest_tokens: int
    gradient_checkpointing: bool
    checkpointing_source: str
    selective: bool = False
    """Compiled layers recompute the MLP's normed input and its product."""


@dataclass(frozen=True)
class Time:
    """Seconds; `step_s` of computing, `communication_s` of it hidden or not, `total_s` from first step to last."""

    step_s: float
    communication_s: float
    communication_gb: float
    total_s: float
    model_tflop_per_step: float
    basis: str


@dataclass(frozen=True)
class Disk:
    checkpoint_bytes: int
    checkpoints_kept: int
    total_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What `anchor plan` prints; None where nothing is known."""

    parameters: int
    steps: Steps
    tokens: Tokens
    cut: MicroBatches
    memory: Memory | None
    device_bytes: float | None
    time: Time | None
    disk: Disk
    contrast: ContrastWork | None = None
    """Of Stage II."""

    def as_dict(self) -> dict[str, Any]:
        made = asdict(self)
        if self.memory is not None:
            made["memory"]["total"] = self.memory.total
        return made
