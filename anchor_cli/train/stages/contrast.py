"""Stage II's step: contrastive training whose loss does not depend on how a step is cut or on the number of ranks.

The loss is a function of all embeddings of a step in the step's order, so (GradCache, arXiv 2101.06983):

    encode     every different text of the step once, micro-batch by micro-batch; the first keeps its graph
    gather     all embeddings on every rank, in the step's order
    loss       every rank computes the whole loss and dL/de of every text, in float32
    train      micro-batch by micro-batch: encode again with gradient, backward of sum_t <e_t, dL/de_t>

The first micro-batch of a rank has its graph already: memory holds one graph at a time in either phase. So with one
micro-batch a rank nothing is encoded twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from anchor_cli.base import metric_names as names
from anchor_cli.base.console import say, warn
from anchor_cli.base.contract import TextContract
from anchor_cli.base.errors import InputError
from anchor_cli.data.batches import BatchPlan
from anchor_cli.data.contrast_rows import ContrastData, StepTexts
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.text_batches import make_text_plan
from anchor_cli.model.backbone import refuse_dropout
from anchor_cli.model.contrast import ContrastCounts, ContrastRows, ContrastSettings, contrastive_loss
from anchor_cli.model.encoder import PackedEncoder
from anchor_cli.plan.contrast import loss_bytes
from anchor_cli.plan.flops import BACKWARD, ModelShape, forward_flops
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed import begin_update, finish_update
from anchor_cli.train.stages.contrast_feed import ContrastBatches, ContrastFeed
from anchor_cli.train.stages.guide import Guide, gather_texts

NEARLY_ALL = 0.9
"""Share of dropped candidates from which a margin is doubted (assumption)."""


def settings_of(spec: RunSpec) -> ContrastSettings:
    """The keys that the loss depends on."""
    return ContrastSettings(**{field.name: getattr(spec, field.name) for field in fields(ContrastSettings)})


def refuse_wide_dims(settings: ContrastSettings, dimensions: int) -> None:
    """Raises InputError: an embedding has fewer dimensions than `matryoshka_dims` names."""
    wide = [m for m in settings.matryoshka_dims or [] if m > dimensions]
    if wide:
        raise InputError(f"matryoshka_dims {wide[0]}: an embedding of this model has {dimensions} dimensions")


class Contrast:
    """`Objective` of Stage II."""

    def __init__(self, spec: RunSpec, contract: TextContract, pairs: PreparedPairs, ranks: Ranks) -> None:
        self._spec, self._contract, self._ranks = spec, contract, ranks
        self._data = ContrastData(pairs, spec.num_hard_negatives)
        self.settings = settings_of(spec)
        if spec.kd_weight and not self._data.scores_from:
            raise InputError(
                f"kd_weight {spec.kd_weight:g}: {pairs.folder} has no teacher scores to learn from",
                "prepare rows with a column scores, or mined ones, or set kd_weight to 0",
            )
        if spec.kd_weight and ranks.rank == 0:
            say(f"distilling from {', '.join(self._data.scores_from)}")
        self.longest = self._data.longest_text
        self._guide: Guide | None = None
        self._warned: set[str] = set()

    def loss_bytes(self, global_batch_size: int, dimension: int) -> float:
        return loss_bytes(round(global_batch_size * (2 + float(self._data.counts.mean()))), dimension)

    def plan(self, **keys: int) -> BatchPlan:
        return make_text_plan(self._data, **keys)

    def module(self, language_model: PreTrainedModel, kernel: str, pooling_mode: str) -> PackedEncoder:
        refuse_dropout(language_model.config, self._spec.model_name_or_path)
        refuse_wide_dims(self.settings, int(language_model.config.hidden_size))
        if self._spec.guide_model_name_or_path:
            self._guide = Guide(self._spec.guide_model_name_or_path, self._data, self._ranks)
        return PackedEncoder(language_model, kernel=kernel, pooling_mode=pooling_mode)

    def feed(self, plan: BatchPlan) -> ContrastFeed:
        return ContrastFeed(self._data, plan, self._ranks)

    def smallest_step(self, plan: BatchPlan) -> ContrastBatches:
        row = np.array([int(np.argmin(self._data.row_lengths))])
        return self.feed(plan).cut(0, row, plan.world_size, plan.num_micro_batches)

    def update(self, engine: Any, step: ContrastBatches, learning_rate: float) -> ContrastResult:
        return contrast_step(
            engine, step, self.settings, ranks=self._ranks, learning_rate=learning_rate, guide=self._guide
        )

    def loss(self, embeddings: torch.Tensor, texts: StepTexts) -> tuple[torch.Tensor, torch.Tensor, ContrastCounts]:
        """(loss, its gradient by every text's embedding, counts) of (U, D) embeddings in the step's order."""
        guide = self._guide.encode(texts) if self._guide else None
        return loss_of_texts(embeddings, texts, self.settings, guide)

    def metrics(self, result: ContrastResult, step: ContrastBatches) -> dict[str, float]:
        values = result.counts.metrics()
        if self._ranks.rank == 0 and self.settings.margin_strategy is not None:
            self._warn_of_margin(values["dropped_by_margin_share"])
        named = {f"{names.TRAIN_PREFIX}{key}": value for key, value in values.items()}
        return {names.LOSS: float(result.loss), **named, names.TEMPERATURE: self.settings.temperature}

    def _warn_of_margin(self, share: float) -> None:
        """Once for each: a margin that leaves hardly any negative, and one that changes nothing."""
        says = "nearly every" if share > NEARLY_ALL else "no" if share == 0 else None
        if says and says not in self._warned:
            self._warned.add(says)
            margin = f"margin_strategy {self.settings.margin_strategy}, margin {self.settings.margin:g}"
            warn(f"{margin}: {says} candidate of this step was dropped ({100 * share:.1f} %)")

    def flops(self, shape: ModelShape, step: ContrastBatches) -> int:
        """Of one forward and one backward pass; the first encoding is work, but not useful work."""
        return (1 + BACKWARD) * forward_flops(shape, step.texts.lengths)


@dataclass(frozen=True)
class ContrastResult:
    """The loss of a whole step and its counts, the same on every rank; on the device, not waited for."""

    loss: torch.Tensor
    counts: ContrastCounts


def contrast_rows(texts: StepTexts) -> ContrastRows:
    """The step's rows as the loss reads them."""
    return ContrastRows(
        texts.first.tolist(),
        torch.from_numpy(texts.known_positives),
        torch.from_numpy(texts.languages),
        None if texts.scores is None else torch.from_numpy(texts.scores),
    )


def contrast_step(
    engine: Any,
    ready: ContrastBatches,
    settings: ContrastSettings,
    *,
    ranks: Ranks,
    learning_rate: float,
    guide: Guide | None = None,
) -> ContrastResult:
    """One optimizer step over this rank's micro-batches: exactly `gradient_accumulation_steps` of them.

    Raises:
        NonFiniteGradient: before any weight has changed.
    """
    undo = begin_update(engine, learning_rate)
    batches = [batch.to(ranks.device) for batch in ready.micro_batches]
    with_graph = engine(batches[0])
    with torch.no_grad():
        encodings = [with_graph.detach(), *(engine.module(batch) for batch in batches[1:])]
    own = torch.cat([e[: len(m)] for e, m in zip(encodings, ready.members, strict=True)])
    embeddings = gather_texts(own, ready.shares, ranks)
    guided = guide.encode(ready.texts) if guide else None
    loss, gradients, counts = loss_of_texts(embeddings, ready.texts, settings, guided)
    for index, members in enumerate(ready.members):
        if index > 0:
            with_graph = engine(batches[index])
        weights = gradients[torch.from_numpy(members).to(ranks.device)]
        engine.backward((with_graph[: len(members)].to(weights.dtype) * weights).sum() * undo)
        engine.step()
    finish_update(engine)
    return ContrastResult(loss, counts)


def loss_of_texts(
    embeddings: torch.Tensor,
    texts: StepTexts,
    settings: ContrastSettings,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, ContrastCounts]:
    """(loss, (U, D) its gradient by every text's embedding, counts) of (U, D) embeddings in the step's order."""
    queries = torch.from_numpy(texts.queries).to(embeddings.device)
    documents = torch.from_numpy(texts.documents).to(embeddings.device)
    out = contrastive_loss(embeddings[queries], embeddings[documents], contrast_rows(texts), settings, guide)
    gradients = torch.zeros_like(embeddings)
    gradients.index_put_((queries,), out.query_gradients, accumulate=True)  # sorts first: deterministic on CUDA, too
    gradients.index_put_((documents,), out.document_gradients, accumulate=True)
    return out.loss, gradients, out.counts
