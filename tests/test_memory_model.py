"""The memory model against what autograd really keeps, and against hand arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._functorch.config
from live_bytes import LiveBytes
from test_flops import QWEN3_0_6B, TINY
from transformers import Qwen3Config, Qwen3ForCausalLM

from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.backbone import checkpoint_activations, compile_layers
from anchor_cli.model.output_layer import OutputLayer
from anchor_cli.model.packed import pack_pairs, pack_texts
from anchor_cli.model.reconstruction import ReconstructionModel
from anchor_cli.plan import memory as memory_model
from anchor_cli.plan import zero
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import LayerOptions
from anchor_cli.plan.zero import StateOptions
from anchor_cli.spec.spec import RunSpec

WIDE = TINY | {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "head_dim": 24}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["kept", "checkpointed", "compiled", "selective"])
@torch._functorch.config.patch(ban_recompute_materialized_backward=True)  # put back afterwards
def test_activations_equal_what_autograd_saves(dtype: torch.dtype, way: str) -> None:
    """`compiled`: torch's own partitioner decides what a compiled layer keeps, as it does under inductor."""
    register()
    checkpointing, compiled = way == "checkpointed", way in ("compiled", "selective")
    kwargs = {key: value for key, value in WIDE.items() if key != "model_type"}
    backbone = Qwen3ForCausalLM(Qwen3Config(**kwargs, attn_implementation=PACKED_ATTENTION, use_cache=False))
    backbone.to(dtype).train()
    if checkpointing:
        checkpoint_activations(backbone)
    if compiled:
        torch._dynamo.reset()
        compile_layers(backbone, backend="aot_eager_decomp_partition", selective=way == "selective")
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
    layers = LayerOptions(checkpointing, "sdpa", "compiled" if compiled else "none", way == "selective")
    want = memory_model.activation_bytes_per_token(ModelShape.from_config(WIDE), dtype.itemsize, layers)
    assert hidden.shape == (1200, 96)
    assert want == pytest.approx(got, rel=0.01)


def test_liger_saves_no_more_than_it_surely_fuses() -> None:
    """fp32 inputs of the two norms of a layer (4 h each) and silu(gate) (b f); not the norms of queries and keys."""
    shape = ModelShape.from_config(QWEN3_0_6B)
    eager, fused = (memory_model.layer_bytes_per_token(shape, 2, LayerOptions(fused=way)) for way in ("none", "liger"))
    assert eager - fused == 2 * 4 * 1024 + 2 * 3072


def test_states_of_zero_2_on_two_gpus_by_hand() -> None:
    parameters = 596_049_920
    got = zero.state_bytes(
        ModelShape.from_config(QWEN3_0_6B), StateOptions(2, 4, 4, zero_stage=2, world_size=2, bucket=200_000_000)
    )
    bucket = 200_000_000  # one in bf16, a flat copy in bf16, a copy in fp32; another in bf16 where reducing overlaps
    assert got == (2 * parameters, 4 * parameters / 2, 12 * parameters / 2, bucket * (2 + 2 + 4))
    overlapping = StateOptions(2, 4, 4, zero_stage=2, world_size=1, bucket=bucket, overlap=True)
    assert zero.state_bytes(ModelShape.from_config(QWEN3_0_6B), overlapping)[3] == 2.0e9


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


def test_activations_alone_grow_with_tokens() -> None:
    shape, options = ModelShape.from_config(QWEN3_0_6B), StateOptions(world_size=2)
    small, large = (memory_model.training_memory(shape, options, LayerOptions(), t) for t in (8192, 16384))
    assert large.activations == 2 * small.activations
    assert (large.weights, large.optimizer, large.output_layer) == (small.weights, small.optimizer, small.output_layer)


LAYERS_LEAD = {"vocab_size": 1000, "num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 192}
VOCABULARY_LEADS = {"vocab_size": 30000, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192}


@pytest.mark.parametrize("sizes", [LAYERS_LEAD, VOCABULARY_LEADS], ids=["layers", "vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_step_equals_what_is_alive(sizes: dict[str, int], dtype: torch.dtype, checkpointing: bool) -> None:
    """Forward and backward of the objective, every tensor counted while it lives; weights and states left out.

    With checkpointing the model takes all of the recomputed layer for alive at the worst moment, which is up to a fifth
    too much.
    """
    register()
    config = TINY | sizes
    kwargs = {key: value for key, value in config.items() if key != "model_type"}
    backbone = Qwen3ForCausalLM(Qwen3Config(**kwargs, attn_implementation=PACKED_ATTENTION, use_cache=False))
    backbone.to(dtype).train()
    if checkpointing:
        checkpoint_activations(backbone)
    chunk, rows = 128, 8
    model = ReconstructionModel(backbone, kernel="sdpa", chunk_targets=chunk)
    starts = np.zeros(rows, dtype=np.int32)
    queries, documents = ([np.arange(n, dtype=np.int32)] * rows for n in (40, 160))
    batch = pack_pairs(queries, documents, starts, starts, eos_token_id=-1, targets="text")
    with LiveBytes() as live:
        model(batch, 1e-3, 1e-3).loss.backward()
    shape = ModelShape.from_config(config)
    want = memory_model.training_memory(
        shape, StateOptions(dtype.itemsize), LayerOptions(checkpointing, "sdpa"), 200 * rows,
        chunk_bytes=chunk * shape.vocab_size * 4, fused=False, context=0,
    )  # fmt: skip
    ratio = (want.activations + want.working + want.output_layer) / live.peak
    assert 0.97 < ratio < (1.25 if checkpointing else 1.03)


def test_a_chunk_of_logits_does_not_live_beside_the_next() -> None:
    """Four chunks need no more than one: logits, their gradient, the table's gradient and its product."""
    layer = OutputLayer(torch.nn.Parameter(torch.zeros(5000, 16, dtype=torch.bfloat16)), chunk_targets=64, fused=False)
    peaks = []
    for chunks in (1, 4):
        hidden = torch.zeros(64 * chunks, 16, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(64 * chunks, dtype=torch.int64)
        with LiveBytes() as live:
            layer(hidden, targets, torch.ones(64 * chunks))
        peaks.append(live.peak - hidden.numel() * 2)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    shape = ModelShape(16, 1, 1, 1, 1, 1, 5000, True, False, False)
    assert peaks[0] == pytest.approx(memory_model.output_layer_bytes(shape, 2, 64, 64 * 5000 * 4, False), rel=0.01)


def test_repeated_keys_and_values_of_a_kernel_without_grouped_heads() -> None:
    """16 query heads and 8 of keys and values, 128 wide: 2 x 8 x 128 more values a token and layer, in both passes."""
    shape = ModelShape.from_config(QWEN3_0_6B)
    native, repeated = (
        memory_model.training_memory(shape, StateOptions(), LayerOptions(kernel=kernel), 16_360).activations
        for kernel in ("flash", "repeated")
    )
    assert repeated - native == 2 * 16_360 * 28 * (2 * 8 * 128) * 2  # 3.75 GB


ZERO_2 = """
import json, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from live_bytes import LiveBytes
from anchor_cli.train.deepspeed import quiet_deepspeed, start_processes
import os
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29541")
start_processes()
config = json.loads(sys.argv[1])
model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(8))).to(torch.bfloat16)
with quiet_deepspeed() as deepspeed:
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters()))
    row = torch.ones(1, 1000, dtype=torch.bfloat16)
    with LiveBytes() as live:
        engine.backward(engine(row).sum())
print(live.peak)
"""


@pytest.mark.parametrize("overlap", [False, True])
def test_buffers_of_zero_2_equal_what_deepspeed_allocates(overlap: bool) -> None:
    """One rank, eight matrices of a million values, a bucket of three million; activations are 1,000 values a layer."""
    raw = {
        "train_batch_size": 1, "bf16": {"enabled": True}, "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"}, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2, "overlap_comm": overlap, "contiguous_gradients": True,
                              "reduce_scatter": True, "reduce_bucket_size": 3_000_000},
    }  # fmt: skip
    command = [sys.executable, "-c", ZERO_2, json.dumps(raw), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    options = zero.state_options(RunSpec(model_name_or_path="m", dataset_file_path="d"), raw, 1)

    class EightMillion(ModelShape):
        num_parameters = 8_000_000  # type: ignore[assignment]

    _, gradients, _, buffers = zero.state_bytes(EightMillion(1, 1, 1, 1, 1, 1, 1, True, False, False), options)
    fresh = 2 * 1_000_000  # the gradient that autograd has just made, before it is copied into the bucket
    assert int(done.stdout.split()[-1]) == pytest.approx(gradients + buffers + fresh, rel=0.05)


def test_largest_budget_is_the_last_that_fits() -> None:
    shape, options, gib = ModelShape.from_config(QWEN3_0_6B), StateOptions(world_size=2), 2**30
    fits = memory_model.largest_budget(shape, options, LayerOptions(), 80 * gib)
    needs = [memory_model.training_memory(shape, options, LayerOptions(), t).total for t in (fits, fits + 1024)]
    assert needs[0] <= 0.9 * 80 * gib < needs[1]
    assert memory_model.largest_budget(shape, options, LayerOptions(), 8 * gib) == 0
