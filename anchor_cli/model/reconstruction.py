"""Stage I of Anchor Embedding (arXiv 2509.03020): bidirectional reconstruction, the objective and nothing else.

Legend: R pairs, N = 2R texts, T tokens of the encode pass, T - N slots of the reconstruct pass, K targets, D hidden.

    e_i = pooled hidden state of text i                                  (encode pass)
    inputs of the reconstruct pass, text i: [e_other, E(t_1), …, E(t_{n-2})], slot k-1 predicts t_k
    loss of a step = d2q_weight · mean CE(query targets) + q2d_weight · mean CE(document targets)

The means run over all target tokens of the whole step, on every rank and micro-batch: callers pass the weight that one
target has in the step's loss, so a micro-batch's loss is its exact share and shares add up however the step is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from anchor_cli.model.encoder import PackedEncoder
from anchor_cli.model.output_layer import OutputLayer
from anchor_cli.model.packed import PairBatch


def target_scales(
    d2q_weight: float, q2d_weight: float, query_targets: int, document_targets: int
) -> tuple[float, float]:
    """(d2q_scale, q2d_scale): weight of one D2Q and one Q2D target in the loss of a step that has so many of them."""
    return d2q_weight / max(1, query_targets), q2d_weight / max(1, document_targets)


LOGIT_SCALE = "anchor_logit_scale"
"""Attribute of a loaded language model: what its logits are a multiple of hidden states times output matrix by."""


class MicroBatchLoss(NamedTuple):
    """`loss` carries the gradient; the two sums (nats, detached) over D2Q and Q2D targets are for the log."""

    loss: torch.Tensor
    d2q_sum: torch.Tensor
    q2d_sum: torch.Tensor


class ReconstructionModel(PackedEncoder):
    """A causal language model that encodes texts and reconstructs each side of a pair from the other's embedding."""

    def __init__(
        self,
        language_model: PreTrainedModel,
        *,
        kernel: str,
        pooling_mode: str = "eos_token",
        chunk_targets: int | None = None,
    ) -> None:
        super().__init__(language_model, kernel=kernel, pooling_mode=pooling_mode)
        self.output_layer = OutputLayer(language_model.get_output_embeddings().weight, chunk_targets)
        self.logit_scale = float(getattr(language_model, LOGIT_SCALE, 1.0))

    def reconstruct(self, batch: PairBatch, embeddings: torch.Tensor) -> torch.Tensor:
        """(N, D) embeddings -> (K, D) hidden states at the target slots, each text read from its other side's e."""
        embed = self.language_model.get_input_embeddings()
        others = embeddings.roll(len(embeddings) // 2, dims=0)  # text i's other side is text (i + R) mod 2R
        inputs = embed(batch.recon.input_ids).index_copy(0, batch.first_slots, others)
        return self.hidden_states(inputs, batch.recon)[batch.target_slots]

    def forward(  # type: ignore[override]
        self, batch: PairBatch, d2q_scale: float, q2d_scale: float
    ) -> MicroBatchLoss:
        """A micro-batch's share of the step's loss.

        Args:
            d2q_scale: weight of one query target in the loss, d2q_weight / (query targets of the whole step).
            q2d_scale: the same for document targets.
        """
        hidden = self.reconstruct(batch, self.encode(batch.texts, batch.content_starts))
        if self.logit_scale != 1.0:  # Granite, HyperCLOVA X, Cohere: logits are a multiple of hidden · Wᵀ
            hidden = hidden * self.logit_scale
        count = batch.num_query_targets
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        weights = torch.empty(len(hidden), dtype=precise, device=hidden.device)  # filled there: nothing is copied
        weights[:count], weights[count:] = d2q_scale, q2d_scale
        loss, losses = self.output_layer(hidden, batch.target_ids, weights)
        return MicroBatchLoss(loss, losses[:count].sum(), losses[count:].sum())
