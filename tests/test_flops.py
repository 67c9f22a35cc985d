"""FLOP formulas against hand arithmetic and against torch's own counter."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from anchor_cli.plan import flops
from anchor_cli.plan.flops import ModelShape

padded_flops = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks/padded_flops.py"))["padded_flops"]
QWEN3_0_6B = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


def test_parameters_of_qwen3_0_6b() -> None:
    assert ModelShape.from_config(QWEN3_0_6B).num_parameters == 596_049_920


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_those_of_transformers(tied: bool) -> None:
    config = TINY | {"tie_word_embeddings": tied}
    theirs = sum(p.numel() for p in Qwen3ForCausalLM(Qwen3Config(**_kwargs(config))).parameters())
    assert ModelShape.from_config(config).num_parameters == theirs


def test_forward_flops_by_hand() -> None:
    # one layer, h 2, f 3, one head of size 2, no grouped heads; a text of 3 tokens, another of 1
    shape = ModelShape(2, 3, 1, 1, 1, 2, 5, True, True, False)
    matrices = 2 * 2 + 2 * 2 + 2 * 2 + 2 * 2 + 3 * 2 * 3  # q, k, v, o, MLP
    pairs = (1 + 2 + 3) + 1
    want = 2 * matrices * 4 + pairs * 2 * 2 * 2  # a score and a weighted sum: 2 products of size 2 each, 2 FLOP
    assert flops.forward_flops(shape, [3, 1]) == want


def test_trunk_and_output_equal_torch_flop_counter() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**_kwargs(TINY), attn_implementation="eager"))
    ids = torch.arange(11)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    shape = ModelShape.from_config(TINY)
    forward = flops.trunk_flops(shape, 11) + flops.output_flops(shape, 11) + flops.attention_flops(shape, 11 * 11)
    # the first layer's input needs a gradient too, as the embedding is trained
    assert counter.get_total_flops() == 3 * forward


def test_objective_of_one_pair_by_hand() -> None:
    shape = ModelShape.from_config(TINY)
    forward = sum(flops.forward_flops(shape, [n]) for n in (4, 9, 3, 8))  # encode 4 and 9, reconstruct 3 and 8
    want = 3 * (forward + 2 * (3 + 8) * 300 * 32)
    assert flops.objective_flops(shape, [4], [9]) == want
    assert flops.objective_flops(shape, [4], [9], num_targets=5) == 3 * (forward + 2 * 5 * 300 * 32)


def test_padded_equals_objective_when_nothing_is_padded_or_recomputed() -> None:
    shape = ModelShape.from_config(TINY)
    rows = [7] * 6
    got = padded_flops(shape, rows, rows, 3, checkpointing=False, square_attention=False)
    assert got == flops.objective_flops(shape, rows, rows)


def test_padded_counts_pads_per_batch_and_side() -> None:
    shape = ModelShape.from_config(TINY)
    got = padded_flops(shape, [2, 5, 3], [4, 4, 9], 2, checkpointing=False, square_attention=False)
    columns = [(5, 2), (4, 2), (3, 1), (9, 1)]  # longest text and rows of each rectangle
    trunk = sum(b * (n + n - 1) for n, b in columns)
    pairs = flops.causal_pairs(np.array([2, 5, 3, 4, 4, 9])) + flops.causal_pairs(np.array([1, 4, 2, 3, 3, 8]))
    forward = flops.trunk_flops(shape, trunk) + flops.attention_flops(shape, pairs)
    forward += flops.output_flops(shape, sum(b * (n - 1) for n, b in columns))
    assert got == 3 * forward


def test_checkpointing_adds_one_forward_of_the_layers() -> None:
    shape = ModelShape.from_config(TINY)
    with_it, without = (padded_flops(shape, [6], [8], 1, checkpointing=c, square_attention=True) for c in (True, False))
    pairs = 36 + 25 + 64 + 49
    assert with_it - without == flops.trunk_flops(shape, 6 + 5 + 8 + 7) + flops.attention_flops(shape, pairs)


def test_a_config_without_a_size_names_it() -> None:
    with pytest.raises(KeyError, match="intermediate_size"):
        ModelShape.from_config({"hidden_size": 8, "num_attention_heads": 2})


def test_the_shipped_shape_is_the_one_of_the_shared_config(shared_data: Path) -> None:
    config = json.loads((shared_data / "configs/Qwen3-0.6B.config.json").read_text())
    assert ModelShape.from_config(config) == ModelShape.from_config(QWEN3_0_6B)


def _kwargs(config: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if key != "model_type"}
