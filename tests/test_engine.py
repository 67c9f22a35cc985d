"""The engine is right: DeepSpeed's gradients and updates, 2 ranks, against a single process without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two DeepSpeed processes found, for every shipped config: one start, many assertions."""
    out = tmp_path_factory.mktemp("engine") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, str(REPOSITORY / "tests/engine_worker.py"), str(small_model), str(out)],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_accumulated_gradients_equal_a_single_process_to_fp32_rounding(found: dict[str, Any]) -> None:
    assert found["zero2_fp32"]["gradient"] < 1e-6


def test_updates_equal_plain_adamw_with_clipping(found: dict[str, Any]) -> None:
    assert max(found["zero2_fp32"]["weights"]) < 1e-5


@pytest.mark.parametrize("config", ["zero2_bf16", "zero1_bf16", "zero3_bf16", "zero2_offload_bf16"])
def test_every_shipped_bf16_config_trains_and_stays_near_fp32(found: dict[str, Any], config: str) -> None:
    """bf16 has 8 bits: 2^-8 a rounding. A factor (wrong accumulation, wrong averaging) would be 0.5 or more."""
    assert found[config]["gradient"] < 0.1
    assert found[config]["norm"] == pytest.approx(found["zero2_fp32"]["norm"], rel=0.05)
    assert max(found[config]["weights"]) < 0.02
    for got, want in zip(found[config]["losses"], found["zero2_fp32"]["losses"], strict=True):
        assert got == pytest.approx(want, rel=5e-3)


def test_the_loss_falls(found: dict[str, Any]) -> None:
    for config, facts in found.items():
        assert facts["losses"][1] < facts["losses"][0], config


def test_nan_and_inf_of_one_rank_are_refused_before_any_weight_changes(found: dict[str, Any]) -> None:
    """Without DeepSpeed's own check of every gradient (bf16.check_grad_overflow), by the norm alone."""
    for config, facts in found.items():
        assert facts["refused"] and facts["unchanged"], config
