"""`torch_compile`: the same loss and gradients, and no graph per batch or per layer (traced; no code is generated)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from transformers import Qwen3Config, Qwen3ForCausalLM

from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.backbone import checkpoint_activations, compile_layers
from anchor_cli.model.packed import PairBatch, pack_pairs
from anchor_cli.model.pooling import prune_last_layer
from anchor_cli.model.reconstruction import ReconstructionModel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # beyond it, layers would run uncompiled
        yield
    torch._dynamo.reset()


def model(checkpointing: bool) -> Qwen3ForCausalLM:
    register()
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=300, tie_word_embeddings=True, use_cache=False, initializer_range=0.2,
        attn_implementation=PACKED_ATTENTION,
    )  # fmt: skip
    made = Qwen3ForCausalLM(config).train()
    if checkpointing:
        checkpoint_activations(made)
    return made


def batch(num_pairs: int, seed: int) -> PairBatch:
    chance = np.random.default_rng(seed)
    sides = [[chance.integers(3, 300, n).astype(np.int32) for n in chance.integers(4, 40, num_pairs)] for _ in range(2)]
    starts = np.zeros(num_pairs, dtype=np.int32)
    return pack_pairs(*sides, starts, starts, eos_token_id=2, targets="text")


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_share_their_graphs_whatever_the_lengths(checkpointing: bool, pruned: bool) -> None:
    """A pruned last layer has graphs of its own; the second batch makes their number of texts dynamic."""
    plain, traced = (ReconstructionModel(model(checkpointing).double(), kernel="sdpa") for _ in range(2))
    if pruned:
        assert prune_last_layer(traced.language_model)
    compile_layers(traced.language_model, backend="eager")
    graphs = []
    for seed in range(4):
        packed = batch(2 + seed, seed)
        losses = [m(packed, 0.1, 0.2).loss for m in (plain, traced)]
        for loss in losses:
            loss.backward()
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    # a few, not one for each of three layers and two passes
    assert 0 < graphs[0] <= (16 if pruned else 12) and graphs[-1] <= (21 if pruned else 12)
    assert len(set(graphs[pruned:])) == 1, f"graphs after each batch: {graphs}"
    for (name, want), got in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert want.grad is not None and got.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-7, msg=name)
