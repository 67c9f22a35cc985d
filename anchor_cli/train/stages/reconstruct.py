"""Stage I's step: bidirectional reconstruction, each micro-batch a share of the step's loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from anchor_cli.base import metric_names as names
from anchor_cli.data.batches import BatchPlan, make_plan
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.model.backbone import refuse_dropout
from anchor_cli.model.packed import PairBatch
from anchor_cli.model.reconstruction import ReconstructionModel, target_scales
from anchor_cli.plan.flops import ModelShape, objective_flops
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed import begin_update, finish_update
from anchor_cli.train.stages.feed import Feed, StepBatches


@dataclass(frozen=True)
class StepResult:
    """Sums over this rank's share of a step, on the device, not waited for."""

    d2q_sum: torch.Tensor
    q2d_sum: torch.Tensor


class Reconstruction:
    """`Objective` of Stage I."""

    def __init__(self, spec: RunSpec, pairs: PreparedPairs, ranks: Ranks) -> None:
        self._spec, self._pairs, self._ranks = spec, pairs, ranks
        self._row_lengths = pairs.query_lengths + pairs.document_lengths
        self.longest = int(self._row_lengths.max())

    def loss_bytes(self, global_batch_size: int, dimension: int) -> float:
        return 0.0

    def plan(self, **keys: int) -> BatchPlan:
        return make_plan(self._row_lengths, **keys)

    def module(self, language_model: PreTrainedModel, kernel: str, pooling_mode: str) -> ReconstructionModel:
        refuse_dropout(language_model.config, self._spec.model_name_or_path)
        return ReconstructionModel(language_model, kernel=kernel, pooling_mode=pooling_mode)

    def feed(self, plan: BatchPlan) -> Feed:
        return Feed(self._pairs, plan, self._ranks.rank, self._spec.reconstruction_targets, self._ranks.device)

    def smallest_step(self, plan: BatchPlan) -> StepBatches:
        feed = self.feed(plan)
        batch = feed.pack(np.array([int(np.argmin(self._row_lengths))]))
        return replace(feed.step(0), micro_batches=[batch] * plan.num_micro_batches)

    def scales(self, step: StepBatches) -> tuple[float, float]:
        """Weight of one D2Q and one Q2D target in the step's loss."""
        spec = self._spec
        return target_scales(spec.d2q_weight, spec.q2d_weight, step.query_targets, step.document_targets)

    def update(self, engine: Any, step: StepBatches, learning_rate: float) -> StepResult:
        d2q_scale, q2d_scale = self.scales(step)
        micro_batches = (batch.to(self._ranks.device) for batch in step.micro_batches)
        return train_step(engine, micro_batches, d2q_scale=d2q_scale, q2d_scale=q2d_scale, learning_rate=learning_rate)

    def metrics(self, result: StepResult, step: StepBatches) -> dict[str, float]:
        sums = torch.stack([result.d2q_sum, result.q2d_sum]).double().cpu()
        if self._ranks.cpu_group is not None:
            dist.all_reduce(sums, group=self._ranks.cpu_group)
        d2q, q2d = sums[0].item() / max(1, step.query_targets), sums[1].item() / max(1, step.document_targets)
        loss = self._spec.d2q_weight * d2q + self._spec.q2d_weight * q2d
        return {names.LOSS: loss, names.D2Q_LOSS: d2q, names.Q2D_LOSS: q2d}

    def flops(self, shape: ModelShape, step: StepBatches) -> int:
        lengths = self._pairs.query_lengths[step.rows], self._pairs.document_lengths[step.rows]
        return objective_flops(shape, *lengths, step.query_targets + step.document_targets)


def train_step(
    engine: Any, micro_batches: Iterable[PairBatch], *, d2q_scale: float, q2d_scale: float, learning_rate: float
) -> StepResult:
    """One optimizer step over this rank's micro-batches: exactly `gradient_accumulation_steps` of them.

    Args:
        d2q_scale: weight of one D2Q target in the step's loss: d2q_weight / (D2Q targets of the whole step).
        q2d_scale: the same for Q2D.
    Raises:
        NonFiniteGradient: before any weight has changed.
    """
    undo = begin_update(engine, learning_rate)
    d2q_sum = q2d_sum = torch.zeros((), device=engine.device)
    for batch in micro_batches:
        out = engine(batch, d2q_scale, q2d_scale)
        engine.backward(out.loss * undo)
        engine.step()
        d2q_sum, q2d_sum = d2q_sum + out.d2q_sum, q2d_sum + out.q2d_sum
    finish_update(engine)
    return StepResult(d2q_sum, q2d_sum)
