"""From hidden states to one embedding a text (docs/method.md), and the last layer computed only where one is pooled.

Legend: N texts, T tokens, D hidden size. Content tokens of text i are tokens content_start_i … n_i - 2 of it; the last
token is [EOS].
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
from torch import nn

POOLING_MODES = ("eos_token", "mean", "weighted_mean", "last_token")
PRUNED = "anchor_pruned_last_layer"
"""Attribute of a language model whose last layer can be computed in some rows only."""


def pooled_rows(cu_seqlens: torch.Tensor, mode: str) -> torch.Tensor | None:
    """(N,) the one row of each text that its embedding is; None: its embedding is made of several."""
    ends = cu_seqlens[1:].to(torch.int64)
    if mode == "eos_token":
        return ends - 1
    return torch.maximum(ends - 2, cu_seqlens[:-1]) if mode == "last_token" else None


def pool(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, content_starts: torch.Tensor | None, mode: str
) -> torch.Tensor:
    """(T, D) -> (N, D).

    `eos_token`: the closing [EOS]. The others pool content tokens only: `mean`; `weighted_mean` with weights 1, 2, 3 …
    over the content (SGPT, arXiv 2202.08904, as in LLM2Vec); `last_token`, the last content token, of [EOS] alone that.
    The mean of no content (a blank document of a benchmark) is all zeros.
    """
    rows = pooled_rows(cu_seqlens, mode)
    if rows is not None:
        return hidden[rows]
    ends = cu_seqlens[1:].to(torch.int64)  # one past [EOS]
    if mode not in POOLING_MODES or content_starts is None:
        raise ValueError(f"pooling_mode {mode!r} needs content starts and must be one of {POOLING_MODES}")
    starts = cu_seqlens[:-1].to(torch.int64)
    token = torch.arange(len(hidden), device=hidden.device)
    text = torch.searchsorted(ends, token, right=True)
    place = token - starts[text] - content_starts[text]  # 0 at the first content token
    is_content = (place >= 0) & (token < ends[text] - 1)
    precise = torch.float32 if hidden.dtype in (torch.bfloat16, torch.float16) else hidden.dtype
    weights = (place + 1 if mode == "weighted_mean" else torch.ones_like(place)).to(precise) * is_content
    sums = hidden.new_zeros((len(starts), hidden.shape[1]), dtype=precise)
    sums = sums.index_add(0, text, hidden.to(precise) * weights[:, None])
    totals = weights.new_zeros(len(starts)).index_add(0, text, weights)
    return (sums / totals[:, None].clamp_min(1)).to(hidden.dtype)


class PrunedLastLayer:
    """A decoder layer that, where `packing.rows` says so, computes what follows attention in those rows only.

    The layer's own forward runs on the selected rows, so whatever it norms, scales and adds is its own. Only its
    attention gets all rows, since the others are needed as keys and values, and selects before its output projection.
    """

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self._forward, self._norm = layer.forward, layer.input_layernorm
        self._attend, self._project = attention.forward, attention.o_proj
        same = copy.copy(attention)  # the same modules, but for the projection
        same._modules = attention._modules | {"o_proj": nn.Identity()}
        self._attend_unprojected = types.MethodType(attention.forward.__func__, same)
        layer.forward, attention.forward = self._layer, self._attention

    def _layer(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = kwargs["packing"].rows
        if rows is None:
            return self._forward(hidden_states, *args, **kwargs)
        return self._forward(hidden_states.index_select(1, rows), *args, all_rows=hidden_states, **kwargs)

    def _attention(
        self, hidden_states: torch.Tensor, *args: Any, all_rows: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if all_rows is None:
            return self._attend(hidden_states, *args, **kwargs)
        attended, *rest = self._attend_unprojected(self._norm(all_rows), *args, **kwargs)
        return self._project(attended.index_select(1, kwargs["packing"].rows)), *rest


def prune_last_layer(language_model: Any) -> bool:
    """Let the last layer be computed in pooled rows only. False: it has not the parts that this takes.

    Whether the result stays the same is for `model/exactness.py` to try.
    """
    layer = language_model.get_decoder().layers[-1]
    parts = layer, getattr(layer, "input_layernorm", None), getattr(getattr(layer, "self_attn", None), "o_proj", None)
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    PrunedLastLayer(layer)
    setattr(language_model, PRUNED, True)
    return True
