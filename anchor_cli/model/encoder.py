"""A causal language model that turns packed texts into embeddings: what both stages train.

Legend: N texts, T tokens of the packed row, D hidden.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from anchor_cli.model.attention import Packing
from anchor_cli.model.packed import PackedTexts, TextBatch
from anchor_cli.model.pooling import PRUNED, pool, pooled_rows


def packed_hidden_states(
    language_model: PreTrainedModel,
    inputs: torch.Tensor,
    texts: PackedTexts,
    kernel: str,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """(T, D) input embeddings of a packed row -> (T, D) hidden states after the final norm.

    `rows`: of a model whose last layer is pruned, (N,) the rows to return.
    """
    out = language_model.get_decoder()(
        inputs_embeds=inputs[None],
        position_ids=texts.position_ids[None],
        use_cache=False,
        packing=Packing(texts.cu_seqlens, texts.lengths, kernel, rows),
    )
    hidden: torch.Tensor = out.last_hidden_state[0]
    return hidden


class PackedEncoder(nn.Module):
    """Encodes packed texts; Stage II trains it as it is."""

    def __init__(self, language_model: PreTrainedModel, *, kernel: str, pooling_mode: str = "eos_token") -> None:
        super().__init__()
        self.language_model = language_model
        self.kernel = kernel
        self.pooling_mode = pooling_mode

    def hidden_states(self, inputs: torch.Tensor, packing: PackedTexts) -> torch.Tensor:
        """(T, D) input embeddings of a packed row -> (T, D) hidden states after the final norm."""
        return packed_hidden_states(self.language_model, inputs, packing, self.kernel)

    def encode(self, texts: PackedTexts, content_starts: torch.Tensor | None = None) -> torch.Tensor:
        """(N, D) embeddings, not normalised: one causal pass per text, positions from 0."""
        embed = self.language_model.get_input_embeddings()
        inputs = embed(texts.input_ids)
        if getattr(self.language_model, PRUNED, False):
            rows = pooled_rows(texts.cu_seqlens, self.pooling_mode)
            if rows is not None:
                return packed_hidden_states(self.language_model, inputs, texts, self.kernel, rows)
        hidden = self.hidden_states(inputs, texts)
        return pool(hidden, texts.cu_seqlens, content_starts, self.pooling_mode)

    def forward(self, batch: TextBatch) -> torch.Tensor:
        """(N, D) embeddings of a micro-batch."""
        return self.encode(batch.texts, batch.content_starts)
