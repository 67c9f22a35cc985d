"""A stock transformers model run one text at a time, and small random models of any kind, to compare ours with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from anchor_cli.model.packed import pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel

Pair = tuple[Sequence[int], Sequence[int]]
PAIRS: list[Pair] = [([7, 3, 11, 5, 1], [2, 13, 9, 4, 6, 20, 1]), ([8, 12, 1], [30, 31, 9, 9, 2, 1])]
EOS = 1


def save_random_model(folder: Path, config: Any) -> Path:
    """A model of `config` whose every parameter, biases too, is random and large enough to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else parameter + 0.1 * noise)
    model.save_pretrained(folder)
    return folder


def stock_results(folder: Path) -> tuple[torch.Tensor, float]:
    """((4, D) embeddings of queries then documents, loss of the step with weights 0.8 / 0.2), by a naive loop."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    embed, decoder = model.get_input_embeddings(), model.get_decoder()
    sums, counts = [0.0, 0.0], [0, 0]
    with torch.no_grad():
        texts = [[torch.tensor(pair[side]) for pair in PAIRS] for side in (0, 1)]
        states = [
            [decoder(input_ids=text[None], use_cache=False).last_hidden_state[0, -1] for text in side] for side in texts
        ]
        for side in (0, 1):
            for text, other in zip(texts[side], states[1 - side], strict=True):
                inputs = torch.cat([other[None], embed(text[:-2])])
                logits = model(inputs_embeds=inputs[None].clone(), use_cache=False).logits[0]
                sums[side] += float(F.cross_entropy(logits.float(), text[:-1], reduction="sum"))
                counts[side] += len(text) - 1
    return torch.stack(states[0] + states[1]), 0.8 * sums[0] / counts[0] + 0.2 * sums[1] / counts[1]


def our_results(model: Any) -> tuple[torch.Tensor, float]:
    """The same two by packed passes."""
    ours = ReconstructionModel(model, kernel="sdpa").eval()
    queries, documents = ([np.array(pair[side], dtype=np.int32) for pair in PAIRS] for side in (0, 1))
    starts = np.zeros(len(PAIRS), dtype=np.int32)
    batch = pack_pairs(queries, documents, starts, starts, eos_token_id=EOS, targets="text")
    num_query = sum(len(text) - 1 for text in queries)
    num_document = sum(len(text) - 1 for text in documents)
    with torch.no_grad():
        loss = ours(batch, 0.8 / num_query, 0.2 / num_document).loss
        return ours.encode(batch.texts, batch.content_starts), float(loss)
