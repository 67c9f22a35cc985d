"""The memory model against what autograd really keeps, and against hand arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_flops import QWEN3_0_6B, TINY
from transformers import Qwen3Config, Qwen3ForCausalLM

from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.backbone import checkpoint_activations
from anchor_cli.model.packed import pack_texts
from anchor_cli.model.reconstruction import ReconstructionModel
from anchor_cli.plan import memory as memory_model
from anchor_cli.plan import zero
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import LayerOptions
from anchor_cli.plan.zero import StateOptions

WIDE = TINY | {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "head_dim": 24}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_equal_what_autograd_saves(dtype: torch.dtype, checkpointing: bool) -> None:
    register()
    kwargs = {key: value for key, value in WIDE.items() if key != "model_type"}
    backbone = Qwen3ForCausalLM(Qwen3Config(**kwargs, attn_implementation=PACKED_ATTENTION, use_cache=False))
    backbone.to(dtype).train()
    if checkpointing:
        checkpoint_activations(backbone)
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    texts = pack_texts([np.arange(n, dtype=np.int32) % 300 for n in (400, 137, 663)])
    model = ReconstructionModel(backbone, kernel="sdpa")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embedded = backbone.get_input_embeddings()(texts.input_ids)
        hidden = model.hidden_states(embedded, texts)
    got = sum(storage.nbytes() for storage in kept.values()) / 1200
    if checkpointing:
        got += 2 * 24 * dtype.itemsize  # cos and sin are held by the closure that recomputes, not as saved tensors
    layers = LayerOptions(checkpointing, kernel="sdpa")
    want = memory_model.activation_bytes_per_token(ModelShape.from_config(WIDE), dtype.itemsize, layers)
    assert hidden.shape == (1200, 96)
    assert want == pytest.approx(got, rel=0.01)


def test_liger_saves_no_more_than_it_surely_fuses() -> None:
    """fp32 inputs of the two norms of a layer (4 h each) and silu(gate) (b f); not the norms of queries and keys."""
    shape = ModelShape.from_config(QWEN3_0_6B)
    eager, fused = (memory_model.layer_bytes_per_token(shape, 2, LayerOptions(liger=liger)) for liger in (False, True))
    assert eager - fused == 2 * 4 * 1024 + 2 * 3072


def test_states_of_zero_2_on_two_gpus_by_hand() -> None:
    parameters = 596_049_920
    got = zero.state_bytes(
        ModelShape.from_config(QWEN3_0_6B), StateOptions(2, 4, 4, zero_stage=2, world_size=2, bucket=200_000_000)
    )
    assert got == (2 * parameters, 4 * parameters / 2, 12 * parameters / 2, 2 * 200_000_000 * 4)


@pytest.mark.parametrize(
    ("stage", "want"),  # weights, gradients, optimizer of 10 parameters on 5 ranks, in units of one parameter
    [(0, (20, 20, 120)), (1, (20, 20, 24)), (2, (20, 4, 24)), (3, (4, 4, 24))],
)
def test_what_each_zero_stage_shares_out(stage: int, want: tuple[int, int, int]) -> None:
    class Ten(ModelShape):
        num_parameters = 10  # type: ignore[assignment]

    shape = Ten(1, 1, 1, 1, 1, 1, 1, True, False, False)
    got = zero.state_bytes(shape, StateOptions(zero_stage=stage, world_size=5))[:3]
    assert got == want


def test_fp32_keeps_no_second_copy_of_the_weights() -> None:
    shape = ModelShape.from_config(TINY)
    options = StateOptions(4, 4, 4, zero_stage=2, world_size=1)
    assert zero.state_bytes(shape, options)[2] == 8 * shape.num_parameters


def test_total_is_the_sum_of_the_parts_and_grows_with_tokens_alone() -> None:
    shape, options = ModelShape.from_config(QWEN3_0_6B), StateOptions(world_size=2)
    small, large = (memory_model.training_memory(shape, options, LayerOptions(), t) for t in (8192, 16384))
    assert small.total == pytest.approx(
        small.weights + small.gradients + small.optimizer + small.buckets + small.activations + small.working
        + small.output_layer + small.context
    )  # fmt: skip
    assert large.activations == 2 * small.activations
    assert (large.weights, large.optimizer, large.output_layer) == (small.weights, small.optimizer, small.output_layer)


def test_largest_budget_is_the_last_that_fits() -> None:
    shape, options, gib = ModelShape.from_config(QWEN3_0_6B), StateOptions(world_size=2), 2**30
    fits = memory_model.largest_budget(shape, options, LayerOptions(), 80 * gib)
    needs = [memory_model.training_memory(shape, options, LayerOptions(), t).total for t in (fits, fits + 1024)]
    assert needs[0] <= 0.9 * 80 * gib < needs[1]
    assert memory_model.largest_budget(shape, options, LayerOptions(), 8 * gib) == 0
