"""From hidden states to one embedding a text (docs/method.md): pure functions on packed rows.

Legend: N texts, T tokens, D hidden size. Content tokens of text i are tokens content_start_i … n_i - 2 of it; the last
token is [EOS].
"""

from __future__ import annotations

import torch

POOLING_MODES = ("eos_token", "mean", "weighted_mean", "last_token")


def pool(
    hidden: torch.Tensor, cu_seqlens: torch.Tensor, content_starts: torch.Tensor | None, mode: str
) -> torch.Tensor:
    """(T, D) -> (N, D).

    `eos_token`: the closing [EOS]. The others pool content tokens only: `mean`; `weighted_mean` with weights 1, 2, 3 …
    over the content (SGPT, arXiv 2202.08904, as in LLM2Vec); `last_token`, the last content token. The mean of no
    content (a blank document of a benchmark) is all zeros.
    """
    ends = cu_seqlens[1:].to(torch.int64)  # one past [EOS]
    if mode == "eos_token":
        return hidden[ends - 1]
    if mode == "last_token":
        return hidden[ends - 2]
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
