"""What a run trains: the part in which the two stages differ. The loop, checkpoints, signals and logs are the same."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import PreTrainedModel

from anchor_cli.base.contract import TextContract
from anchor_cli.data.batches import BatchPlan
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.model.encoder import PackedEncoder
from anchor_cli.plan.flops import ModelShape
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec.spec import RunSpec


class Objective(Protocol):
    """Stage I or Stage II of one run. A *step* is one rank's part of an optimizer step, packed by the feed."""

    longest: int
    """Tokens of the longest piece that cannot be divided: a row in Stage I, a text in Stage II."""

    def loss_bytes(self, global_batch_size: int, dimension: int) -> float:
        """Device memory of a step's loss beside the activations and the output layer of a micro-batch."""

    def plan(self, **keys: int) -> BatchPlan:
        """Which rows make a step, and of how many micro-batches; the keywords of `data.batches.make_plan`."""

    def module(self, language_model: PreTrainedModel, kernel: str, pooling_mode: str) -> PackedEncoder:
        """The model that DeepSpeed trains."""

    def feed(self, plan: BatchPlan) -> Any:
        """`steps(first, last)` yields steps in order; `step(i)` is one of them."""

    def smallest_step(self, plan: BatchPlan) -> Any:
        """A step of the run's number of micro-batches, as small as can be: makes the optimizer's state exist."""

    def update(self, engine: Any, step: Any, learning_rate: float) -> Any:
        """One optimizer step. Raises NonFiniteGradient before any weight has changed."""

    def metrics(self, result: Any, step: Any) -> dict[str, float]:
        """What `update` gave, over all ranks, under the names of metrics.jsonl; every rank calls it."""

    def flops(self, shape: ModelShape, step: Any) -> int:
        """Useful FLOPs of the whole step."""


def objective_of(spec: RunSpec, contract: TextContract, pairs: PreparedPairs, ranks: Ranks) -> Objective:
    """The objective of the spec's stage."""
    if spec.stage == "I":
        from anchor_cli.train.stages.reconstruct import Reconstruction

        return Reconstruction(spec, pairs, ranks)
    from anchor_cli.train.stages.contrast import Contrast

    return Contrast(spec, contract, pairs, ranks)
