"""DeepSpeed configs: the shipped ones resolve and are what DeepSpeed itself accepts; contradictions are errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anchor_cli.base.errors import InputError
from anchor_cli.spec import deepspeed as ds_config
from anchor_cli.spec.spec import RunSpec

SHIPPED = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))


def spec(**more: Any) -> RunSpec:
    return RunSpec(model_name_or_path="m", dataset_file_path="d", **more)


def resolve(raw: dict[str, Any], of: RunSpec) -> dict[str, Any]:
    return ds_config.resolve_ds_config(raw, of, gradient_accumulation_steps=3, micro_batch_size=5, world_size=2)


def test_the_batch_that_a_run_keeps_is_what_its_config_states() -> None:
    """Begun on two ranks with 64 pairs a step, continued on one: the config's 64 still holds, and 32 does not."""
    of, keys = spec(per_device_train_batch_size=32), {"gradient_accumulation_steps": 3, "micro_batch_size": 5}
    raw = {"train_batch_size": 64}
    got = ds_config.resolve_ds_config(raw, of, world_size=1, global_batch_size=64, **keys)
    assert got["train_batch_size"] == 15
    for stated, global_batch in ((32, 64), (64, None)):
        with pytest.raises(InputError, match="contradicts the spec's global batch"):
            ds_config.resolve_ds_config(
                {"train_batch_size": stated}, of, world_size=1, global_batch_size=global_batch, **keys
            )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_are_what_deepspeed_accepts(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    precision = "float32" if "fp32" in path.stem else "bfloat16"
    raw = ds_config.load_ds_config(path.stem, "/nowhere")
    assert raw == json.loads(path.read_text(encoding="utf-8"))
    got = resolve(raw, spec(precision=precision, max_grad_norm=0.5))
    assert "auto" not in json.dumps(got)
    theirs = DeepSpeedConfig(got | {"train_batch_size": 15})  # DeepSpeed sees one rank here
    assert theirs.zero_optimization_stage == int(path.stem[4])
    assert theirs.bfloat16_config.enabled is (precision == "bfloat16")
    assert not theirs.float16_config.enabled
    assert theirs.gradient_clipping == 0.5
    assert str(theirs.communication_data_type) == "torch.float32"  # gradients are summed in fp32
    assert theirs.grad_accum_dtype == "fp32"
    assert theirs.zero_config.offload_optimizer is None or "offload" in path.stem


def test_all_promised_configs_are_shipped() -> None:
    want = {"zero2_bf16", "zero2_offload_bf16", "zero1_bf16", "zero3_bf16", "zero2_fp32"}
    assert {path.stem for path in SHIPPED} == want


def test_a_shipped_config_is_read_without_deepspeed() -> None:
    script = (
        "import sys; from anchor_cli.spec.deepspeed import load_ds_config; load_ds_config('zero2_bf16', '.'); "
        "print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_batch_is_what_the_engine_gets() -> None:
    got = resolve({"train_batch_size": "auto"}, spec())
    assert (got["train_micro_batch_size_per_gpu"], got["gradient_accumulation_steps"]) == (5, 3)
    assert got["train_batch_size"] == 5 * 3 * 2
    assert got["gradient_clipping"] == 1.0
    assert got["bf16"] == {"enabled": True}


def test_a_config_of_huggingface_resolves_and_is_not_changed_in_place() -> None:
    raw = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
        "gradient_accumulation_steps": 4,
        "train_micro_batch_size_per_gpu": 8,
        "train_batch_size": 64,
    }
    before = json.dumps(raw)
    got = resolve(raw, spec(per_device_train_batch_size=8, gradient_accumulation_steps=4))
    assert json.dumps(raw) == before
    assert got["zero_optimization"] == {"stage": 3}
    assert "fp16" not in got


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled true contradicts the spec's precision bfloat16"),
        ({"bf16": {"enabled": False}}, "bf16.enabled false contradicts the spec's precision bfloat16"),
        ({"gradient_clipping": 0.3}, "gradient_clipping 0.3 contradicts the spec's max_grad_norm 1.0"),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu 8 contradicts the spec's per_device_train_batch_size 32",
        ),
        (
            {"gradient_accumulation_steps": 8},
            "gradient_accumulation_steps 8 contradicts the spec's gradient_accumulation_steps 1",
        ),
        ({"train_batch_size": 128}, "train_batch_size 128 contradicts the spec's global batch (2 ranks) 64"),
    ],
)
def test_a_contradiction_is_an_error(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        resolve(raw, spec())
    assert error.value.message == f"deepspeed config: {message}"
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("raw", "message", "hint"),
    [
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation: unknown key", "did you mean zero_optimization?"),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "zero_optimization.overlap_com: unknown key",
            "did you mean overlap_comm?",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pinned": True}}},
            "zero_optimization.offload_optimizer.pinned: unknown key",
            None,
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            'zero_optimization.reduce_bucket_size: got "big": Input should be a valid integer, unable to parse string '
            "as an integer",
            None,
        ),
        ({"bf16": {"enable": True}}, "bf16.enable: unknown key", "did you mean enabled?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: got 4, expected 0, 1, 2 or 3", None),
        (
            {"optimizer": {"type": "Adam"}},
            "optimizer: not supported: the spec's learning_rate and weight_decay make the optimizer (AdamW)",
            "remove the key",
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16.bf16_master_weights_and_grads: not supported: master weights are float32",
            "remove the key",
        ),
    ],
)
def test_a_wrong_config_is_named(tmp_path: Path, raw: dict[str, Any], message: str, hint: str | None) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(InputError) as error:
        ds_config.load_ds_config("ds.json", tmp_path)
    assert (error.value.message, error.value.hint) == (f"{tmp_path}/ds.json: {message}", hint)


def test_an_auto_nobody_decides_is_an_error() -> None:
    with pytest.raises(InputError, match="aio.block_size: 'auto', but no key of the spec decides it"):
        resolve({"aio": {"block_size": "auto"}}, spec())
