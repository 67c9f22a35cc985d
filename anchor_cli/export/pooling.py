"""Pooling of an anchor export with `mean` or `weighted_mean`: content tokens only, as in training.

This file stands alone: it is copied into exports as `anchor_pooling.py`, where sentence-transformers loads it
(`SentenceTransformer(folder, trust_remote_code=True)`). Content is what follows the prompt, without [EOS], which the
tokenizer of such an export does not append.

Legend: B texts, T tokens padded, D embedding size.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    from sentence_transformers.base.modules.module import Module
except ImportError:  # before 5.4
    from sentence_transformers.models import Module  # type: ignore[no-redef]


class ContentPooling(Module):
    """The (weighted) mean of a text's states from the end of its prompt on.

    A prompt ends in "; ". A tokenizer either joins that blank to the first word, which is then content, or leaves it
    alone, and it is not: hence `space_token_ids`.
    """

    config_keys = ["embedding_dimension", "pooling_mode", "space_token_ids"]

    def __init__(self, embedding_dimension: int, pooling_mode: str, space_token_ids: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.embedding_dimension = embedding_dimension
        self.pooling_mode = pooling_mode
        self.space_token_ids = space_token_ids

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`, (B, D), to the features."""
        states, mask, ids = features["token_embeddings"], features["attention_mask"], features["input_ids"]
        place = mask.cumsum(dim=1) - 1  # (B, T), 0 at the first token of a text, on either padding side
        start = torch.full((len(ids), 1), self._prompt_length(features), device=ids.device)  # (B, 1)
        spaces = torch.tensor(self.space_token_ids, device=ids.device)
        at_start = (place == start) & mask.bool()
        blank_first = (at_start & torch.isin(ids, spaces)).any(dim=1, keepdim=True)
        more = mask.sum(dim=1, keepdim=True) > start + 1
        place = place - start - (blank_first & more).long()
        is_content = (place >= 0) & mask.bool()
        weights = (place + 1 if self.pooling_mode == "weighted_mean" else torch.ones_like(place)) * is_content
        weights = weights.to(torch.float32)
        totals = weights.sum(dim=1, keepdim=True).clamp_min(1)  # no content: zeros
        pooled = (states.to(torch.float32) * weights[..., None]).sum(dim=1) / totals
        features["sentence_embedding"] = pooled.to(states.dtype)
        return features

    @staticmethod
    def _prompt_length(features: dict[str, Any]) -> int:
        length = features.get("prompt_length", 0)
        return int(length.reshape(-1)[0]) if isinstance(length, torch.Tensor) else int(length)

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def get_sentence_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        self.save_config(output_path)
