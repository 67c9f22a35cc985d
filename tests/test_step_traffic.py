"""The counts of benchmarks/step_traffic.py, held: what a micro-batch of the real step moves and launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ESTIMATED_MFU = 0.45  # estimated 0.4504 with the network of two cards, 0.466 without
REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "benchmarks"))


def printed(*command: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_an_operator_is_counted_once_each_way() -> None:
    """By hand: a product, a sum with an expanded row, an operator in place, a view."""
    from step_traffic import Count

    left, right, row = torch.zeros(4, 8), torch.zeros(8, 2), torch.zeros(1, 2)
    with Count(table_numel=-1) as counter:
        product = left @ right
        product + row.expand(4, 2)
        product.mul_(2)
        product.view(8)
    operators = {name: tuple(both) for name, both in counter.traffic.operators.items()}
    assert operators == {
        "aten.mm": (4 * (32 + 16 + 8), 1),
        "aten.add": (4 * (8 + 2 + 8), 1),  # the row has two numbers, however often they are read
        "aten.mul_": (4 * (8 + 8), 1),
    }
    assert counter.traffic.matrix_flops == 2 * 4 * 8 * 2


def test_the_output_layer_moves_two_reads_and_one_write_of_its_logits() -> None:
    """No logits in fp32, no sums of tables beside the matrix products; FLOPs are those of the plan's formula."""
    pytest.importorskip("triton", reason="triton is not installed: its operator is not registered")
    from step_traffic import LENGTHS, QWEN3_0_6B, batch_of_pairs, step_traffic

    from anchor_cli.plan.flops import ModelShape, output_flops, trunk_flops

    batch = batch_of_pairs(40, LENGTHS, 24)
    traffic = step_traffic("fused-output", batch)
    logits = 2 * len(batch.target_ids) * QWEN3_0_6B["vocab_size"]
    assert traffic.operators["anchor.softmax_gradient_"] == [3 * logits, 4]
    assert traffic.bytes["softmax and table"] <= 25e9
    shape = ModelShape.from_config(QWEN3_0_6B)
    rows = len(batch.texts.input_ids) + len(batch.recon.input_ids)
    want = 3 * (trunk_flops(shape, rows) + output_flops(shape, len(batch.target_ids)))
    left_out = len(batch.texts.input_ids) - len(batch.texts.lengths)  # after attention, in the encode pass's last layer
    want -= 3 * 2 * left_out * (2048 * 1024 + 3 * 1024 * 3072)
    assert traffic.matrix_flops == pytest.approx(want, rel=1e-4)


def test_the_engine_makes_the_device_wait_for_nothing_in_a_micro_batch() -> None:
    found = printed("benchmarks/engine_traffic.py")
    assert found["device_syncs_per_micro_batch"] == 0
    assert found["boundary_launches"] <= 700


@pytest.mark.slow
def test_the_default_path_on_cuda_meets_its_goals() -> None:
    pytest.importorskip("triton", reason="triton is not installed: inductor does not lower for CUDA")
    found = printed("benchmarks/step_traffic.py", "--json")
    assert found["elementwise_gb"] <= 130
    assert found["softmax_gb"] <= 25
    assert found["device_syncs_per_micro_batch"] == 0 and found["boundary_launches"] <= 700
    assert found["estimated_mfu"] >= ESTIMATED_MFU
