"""Floating-point operations of a training step: what the objective needs. Pure arithmetic.

Legend: n = tokens of one text incl. [EOS], h = hidden size, H = query heads, K = key/value heads, d = head size,
f = MLP width, V = vocabulary rows. One multiply-add is 2 FLOP; only matrix products are counted (norms, softmax,
rotary and the embedding look-up are below 1% at the shape of Qwen3-0.6B). The backward pass costs twice the forward one
(PaLM, arXiv 2204.02311, appendix B, whose MFU this follows; attention as there, but causal, so half the square).

    forward, one layer, one token      2 (h H d + 2 h K d + H d h + 3 h f)
    forward, one layer, one text       4 H d n (n + 1) / 2              scores and weighted sum, causal
    forward, output layer, one target  2 h V
    a text in the objective            encode n tokens, reconstruct n - 1 tokens, n - 1 targets (fewer: see num_targets)

*Model FLOPs* (the numerator of MFU) are those of useful tokens only: no padding, no logits without a target, no
recompute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Lengths = Sequence[int] | NDArray[np.int32] | NDArray[np.int64]

BACKWARD = 2  # times the forward FLOPs of the same products


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only model that its FLOPs and memory follow from."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> ModelShape:
        """Read the shape from a Hugging Face `config.json`. Raises KeyError naming the first missing size."""

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key, default)
            if not isinstance(value, int):
                raise KeyError(key)
            return value

        hidden, heads, family = size("hidden_size"), size("num_attention_heads"), str(config.get("model_type", ""))
        return cls(
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            vocab_size=size("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=family.startswith("qwen3"),
            qkv_bias=bool(config.get("attention_bias", family == "qwen2")),
        )

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def embedding_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All weights; 596,049,920 for Qwen3-0.6B (its output layer is tied to the embedding)."""
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        bias = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) if self.qkv_bias else 0
        layers = self.num_layers * (self.layer_matrix_parameters + norms + bias)
        tables = self.embedding_parameters * (1 if self.tied_embeddings else 2)
        return layers + self.hidden_size + tables


def trunk_flops(shape: ModelShape, num_tokens: int) -> int:
    """Forward FLOPs of all layers' matrix products for `num_tokens` tokens, attention scores left out."""
    return 2 * num_tokens * shape.num_layers * shape.layer_matrix_parameters


def attention_flops(shape: ModelShape, num_token_pairs: int) -> int:
    """Forward FLOPs of scores and weighted sums in all layers for `num_token_pairs` (query token, key token) pairs."""
    return 4 * num_token_pairs * shape.num_layers * shape.num_heads * shape.head_dim


def output_flops(shape: ModelShape, num_positions: int) -> int:
    """Forward FLOPs of the output layer at `num_positions` positions."""
    return 2 * num_positions * shape.embedding_parameters


def causal_pairs(lengths: Lengths) -> int:
    """(query token, key token) pairs of causal attention inside texts of these lengths: the sum of n (n + 1) / 2."""
    n = np.asarray(lengths, dtype=np.int64)
    return int((n * (n + 1) // 2).sum())


def forward_flops(shape: ModelShape, lengths: Lengths) -> int:
    """Forward FLOPs of one packed, causal pass over texts of these lengths, without an output layer."""
    num_tokens = int(np.asarray(lengths, dtype=np.int64).sum())
    return trunk_flops(shape, num_tokens) + attention_flops(shape, causal_pairs(lengths))


def objective_flops(
    shape: ModelShape, query_lengths: Lengths, document_lengths: Lengths, num_targets: int | None = None
) -> int:
    """Model FLOPs, forward and backward, that the reconstruction objective needs for these pairs.

    `num_targets` counts target positions of both sides; None means every text's n - 1 (`reconstruction_targets: text`
    where no content holds an [EOS]). Every layer is counted for every token, as is usual for MFU; that on CUDA
    the last layer of the encode pass is computed at pooled states only (model/pooling.py) is not taken off.
    """
    lengths = np.concatenate([np.asarray(query_lengths, np.int64), np.asarray(document_lengths, np.int64)])
    targets = int((lengths - 1).sum()) if num_targets is None else num_targets
    forward = forward_flops(shape, lengths) + forward_flops(shape, lengths - 1) + output_flops(shape, targets)
    return (1 + BACKWARD) * forward


def recompute_factor(
    shape: ModelShape, query_lengths: Lengths, document_lengths: Lengths, num_targets: int | None = None
) -> float:
    """FLOPs with gradient checkpointing (every layer's forward pass once more) over FLOPs without, at least 1."""
    lengths = np.concatenate([np.asarray(query_lengths, np.int64), np.asarray(document_lengths, np.int64)])
    again = forward_flops(shape, lengths) + forward_flops(shape, lengths - 1)
    return 1 + again / objective_flops(shape, query_lengths, document_lengths, num_targets)


def mfu(flops: float, seconds: float, peak_flops_per_s: float) -> float:
    """Model FLOP utilisation: useful FLOPs over what the device could have done in `seconds`."""
    return flops / (seconds * peak_flops_per_s)
