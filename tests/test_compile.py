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
from anchor_cli.model.backbone import compile_layers
from anchor_cli.model.output_layer import OutputLayer, softmax_gradient
from anchor_cli.model.packed import PairBatch, pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
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
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def batch(num_pairs: int, seed: int) -> PairBatch:
    chance = np.random.default_rng(seed)
    sides = [[chance.integers(3, 300, n).astype(np.int32) for n in chance.integers(4, 40, num_pairs)] for _ in range(2)]
    starts = np.zeros(num_pairs, dtype=np.int32)
    return pack_pairs(*sides, starts, starts, eos_token_id=2, targets="text")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_share_their_graphs_whatever_the_lengths(checkpointing: bool) -> None:
    plain, traced = (ReconstructionModel(model(checkpointing), kernel="sdpa") for _ in range(2))
    compile_layers(traced.language_model, backend="eager")
    graphs = []
    for seed in range(4):
        packed = batch(2 + seed, seed)
        losses = [m(packed, 0.1, 0.2).loss for m in (plain, traced)]
        for loss in losses:
            loss.backward()
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-6)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= 12  # a few, not one for each of three layers and two passes
    assert len(set(graphs)) == 1, f"graphs after each batch: {graphs}"
    for (name, want), got in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert want.grad is not None and got.grad is not None
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_softmax_gradient_equals_autograd() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50, requires_grad=True)
    targets, weights = torch.randint(50, (7,)), torch.rand(7)
    want = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (want * weights).sum().backward()
    losses, gradient = softmax_gradient(logits.detach(), targets, weights)
    torch.testing.assert_close(losses, want.detach())
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_output_layer_equals_the_plain_one_with_one_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 16, dtype=dtype))
    for num_targets in (10, 17, 23):  # chunks of 4 and a rest of 2, 1, 3
        hidden, targets = torch.randn(num_targets, 16, dtype=dtype), torch.randint(300, (num_targets,))
        token_weights, found = torch.rand(num_targets), []
        for fuse in (False, True):
            layer = OutputLayer(weight, chunk_targets=4)
            if fuse:
                layer.compile_softmax(backend="eager")
            states = hidden.clone().requires_grad_()
            weight.grad = None
            loss, each = layer(states, targets, token_weights)
            loss.backward()
            assert states.grad is not None and weight.grad is not None
            found.append((loss.detach(), each, states.grad.float(), weight.grad.float()))
        loose = 1e-5 if dtype == torch.float32 else 2e-2
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=loose, atol=loose)
    assert counters["stats"]["unique_graphs"] <= 4
