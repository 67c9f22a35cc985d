"""`anchor plan`: steps, tokens, time, communication and disk against hand arithmetic; the command from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_nvml import Card, FakeNvml, install
from test_benchmarks import write_nano

from anchor_cli.base.errors import InputError
from anchor_cli.cli import run
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks, snapshot_nanobeir
from anchor_cli.plan import estimate, flops, probe, zero
from anchor_cli.plan.checks import check_plan
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.hardware import GPUS, gpu_named, gpu_of_device_name
from anchor_cli.plan.inputs import KNOWN_CONFIGS, hardware_of, rows_of, shape_of
from anchor_cli.plan.result import Estimate, Hardware, Throughput
from anchor_cli.plan.rows import Rows
from anchor_cli.plan.zero import StateOptions
from anchor_cli.processes.gpus import local_gpus
from anchor_cli.spec.spec import RunSpec

SHAPE = ModelShape.from_config(KNOWN_CONFIGS["Qwen/Qwen3-0.6B"])
KURE = "train_configs/stage_I/Qwen3_0.6b_q2d_d2q_512.json"
ROOT = Path(__file__).parents[1]


def spec(**keys: Any) -> RunSpec:
    return RunSpec(**({"model_name_or_path": "m", "dataset_file_path": "d", "save_steps": 0.0} | keys))


def some_rows(count: int = 1000, query: int = 40, document: int = 360) -> Rows:
    queries, documents = np.full(count, query, np.int32), np.full(count, document, np.int32)
    return Rows(queries, documents, count * (query + document - 2), None, "made up")


def test_kure_steps() -> None:
    run_spec = spec(per_device_train_batch_size=32, gradient_accumulation_steps=2, stop_after_n_steps=2000)
    got = estimate.steps_of(run_spec, 1_862_922, 2)
    assert (got.global_batch_size, got.steps_per_epoch, got.total_steps, got.last_step) == (128, 14_554, 43_662, 2000)
    assert got.rows_dropped_per_epoch == 10


@pytest.mark.parametrize(
    ("stage", "micro_batches", "want"),
    # 8 ranks; gradients 4 bytes, weights 2 bytes, P parameters; per rank and step, in units of P x 7/8
    [(0, 1, 2 * 4), (1, 3, 2 * 4 + 2), (2, 3, 3 * 2 * 4 + 2), (3, 1, 4 + 4 * 2)],
)
def test_communication(stage: int, micro_batches: int, want: float) -> None:
    options = StateOptions(2, 4, 4, zero_stage=stage, world_size=8)
    got = zero.communication_bytes(SHAPE, options, micro_batches)
    assert got == want * SHAPE.num_parameters * 7 / 8
    assert zero.communication_bytes(SHAPE, StateOptions(zero_stage=stage, world_size=1), micro_batches) == 0


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"save_steps": 0.0}, 1),  # the last one
        ({"save_steps": 100.0}, 10),  # 100, 200 … 1000, the last of which is the end's
        ({"save_steps": 300.0}, 4),  # 300, 600, 900 and the end
        ({"save_steps": 100.0, "save_total_limit": 2}, 3),  # two and the one being written
        ({"save_steps": 0.1, "stop_after_n_steps": 250}, 3),  # a tenth of all 1000 steps: 100, 200 and the end, 250
    ],
)
def test_disk(keys: dict[str, Any], kept: int) -> None:
    run_spec = spec(max_steps=1000, global_batch_size=1, per_device_train_batch_size=1, **keys)
    got = estimate.disk_of(run_spec, SHAPE, estimate.steps_of(run_spec, 5000, 1))
    assert got.checkpoints_kept == kept
    assert got.checkpoint_bytes == 14 * 596_049_920 + 32 * 2**20


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_checkpoint_has_the_size_of_a_real_one(precision: str, small_model: Path, tmp_path: Path) -> None:
    """Weights and optimizer of a checkpoint that a run of one step has written; the rest is below its allowance."""
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"query": f"q {i}", "document": "d " * 9}) for i in range(8)))
    keys = {"model_name_or_path": str(small_model), "dataset_file_path": str(raw), "precision": precision,
            "max_seq_length": 160, "global_batch_size": 4, "max_steps": 1, "warmup_steps": 0, "experiment_id": "run",
            "output_dir": str(tmp_path)}  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(keys))
    command = [sys.executable, "-m", "anchor_cli", "train", str(tmp_path / "spec.json"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "run" / "checkpoint-1").rglob("*") if path.is_file()]
    tensors = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
    run_spec = spec(**keys)
    shape = shape_of(str(small_model))[0]
    want = estimate.disk_of(run_spec, shape, estimate.steps_of(run_spec, 8, 1)).checkpoint_bytes - 32 * 2**20
    assert tensors == pytest.approx(want, rel=0.05)  # headers of so small files
    assert sum(path.stat().st_size for path in files) - tensors < 32 * 2**20


def made(throughput: Throughput | None = None, **keys: Any) -> Estimate:
    hardware, config = Hardware(GPUS["h100-nvl"], 2, 94 * 2**30), {"zero_optimization": {"stage": 2}}
    return estimate.estimate(spec(**keys), SHAPE, some_rows(), hardware, config, throughput or Throughput())


def test_time_is_needed_flops_over_assumed_speed() -> None:
    got = made(Throughput(mfu=0.5))
    needed = flops.objective_flops(SHAPE, [40] * 64, [360] * 64)
    assert got.time is not None
    assert got.time.step_s == pytest.approx(needed / (0.5 * 2 * 835e12))
    assert got.time.total_s == pytest.approx(got.time.step_s * got.steps.total_steps)
    measured = made(Throughput(tokens_per_s=1000.0, basis="given")).time
    assert measured is not None and measured.step_s == pytest.approx(64 * 400 / 1000)


def test_checkpointing_takes_longer_at_the_same_share_of_useful_work() -> None:
    slow, fast = made(gradient_checkpointing=True).time, made(gradient_checkpointing=False).time
    assert slow is not None and fast is not None
    assert slow.step_s / fast.step_s == pytest.approx(flops.recompute_factor(SHAPE, [40], [360]))
    assert 1.2 < slow.step_s / fast.step_s < 4 / 3


def test_tokens_and_cut() -> None:
    got = made()
    assert got.tokens.per_step == 64 * 400
    assert got.tokens.whole_run == 64 * 400 * got.steps.total_steps
    assert got.cut.heaviest_tokens == 12_800 and got.cut.micro_batches_per_step == 1  # 32 pairs of 400 on each of two
    assert got.memory is not None and got.memory.total < 94 * 2**30


def test_a_cpu_has_no_modelled_time_or_memory() -> None:
    run_spec = spec(precision="float32")
    got = estimate.estimate(run_spec, SHAPE, some_rows(), Hardware(None, 1, None), {}, Throughput())
    assert got.memory is None and got.time is None


def test_too_few_rows() -> None:
    with pytest.raises(InputError, match="fewer than one global batch of 32"):
        estimate.steps_of(spec(), 31, 1)


def test_gpu_names() -> None:
    assert gpu_named("h100-nvl").memory_gib == 94
    with pytest.raises(InputError, match="no such GPU") as caught:
        gpu_named("h100-nv")
    assert caught.value.hint == "did you mean h100-nvl?"
    names = {"NVIDIA H100 NVL": "h100-nvl", "NVIDIA H100 80GB HBM3": "h100-sxm", "NVIDIA H100 PCIe": "h100-pcie",
             "NVIDIA H200": "h200-sxm", "NVIDIA GH200 480GB": "gh200", "NVIDIA A100-SXM4-80GB": "a100-80gb",
             "NVIDIA GeForce RTX 4090": "rtx4090"}  # fmt: skip
    for device, want in names.items():
        gpu = gpu_of_device_name(device)
        assert gpu is not None and gpu.name == want
    assert gpu_of_device_name("Tesla T4") is None


def test_gpus_are_counted_by_their_files_without_the_drivers_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr("anchor_cli.processes.gpus.DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert len(local_gpus()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(local_gpus()) == 1
    with pytest.raises(InputError, match="unknown GPU: this GPU's peak is not known"):
        hardware_of(None, None)


CARDS = [Card(uuid="GPU-aa11"), Card(uuid="GPU-bb22"), Card("NVIDIA GeForce RTX 4090", 24564, "GPU-cc33")]


@pytest.mark.parametrize(
    ("visible", "want"),
    [(None, [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("", []), ("-1", []), ("0,9,1", [0]), ("GPU-bb", [1]),
     ("MIG-1234", [0]), ("NoDevFiles", [])],
)  # fmt: skip
def test_plan_and_train_count_the_same_gpus(
    visible: str | None, want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's rule for CUDA_VISIBLE_DEVICES, over a driver with three cards."""
    install(monkeypatch, FakeNvml(CARDS))
    monkeypatch.setattr("anchor_cli.processes.gpus.cuda_problem", lambda: None)  # torch is built for the CPU here
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvl = ("NVIDIA H100 NVL", 95830 / 1024)
    cards = [nvl, nvl, ("NVIDIA GeForce RTX 4090", 24564 / 1024)]
    assert local_gpus() == [cards[place] for place in want]
    planned = hardware_of(None, None)
    assert (planned.num_gpus, planned.gpu is not None) == (max(1, len(want)), bool(want))
    started: list[int] = []
    monkeypatch.setattr("anchor_cli.processes.signals.StopFlag.install", lambda flag: None)
    monkeypatch.setattr("anchor_cli.processes.launch.launch", lambda arguments, num, *rest: started.append(num))
    monkeypatch.setattr("anchor_cli.train.worker.run_rank", lambda *arguments: started.append(1))
    monkeypatch.setattr("anchor_cli.processes.launch.prepare_run_folder", lambda folder: None)
    monkeypatch.setattr("anchor_cli.data.training_set.prepare_raw", lambda spec: None)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert run(["train", str(ROOT / KURE)]) == 0
    assert started == [planned.num_gpus]


def checked(name: str, **keys: Any) -> list[tuple[str, str]]:
    checks = check_plan(spec(**keys), Hardware(None, 1, None), made(), {})
    return [(check.status, check.message) for check in checks if check.name == name]


def test_evaluation_data_are_checked_as_training_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What load_benchmarks takes is ok, what it refuses fails; the Hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANCHOR_NANOBEIR", raising=False)
    nano = write_nano(tmp_path / "data" / "nano", parquet=False, card=False)
    snapshot_nanobeir(tmp_path / "data/snap", languages=["ko"], subsets=["NanoNQ"], sources={"ko": str(nano)})
    broken = tmp_path / "data" / "broken"
    broken.mkdir()
    (broken / "corpus.jsonl").write_text("")
    names = ["data/nano", "data/nano/NanoNQ", "data/snap", "data/snap/ko/NanoNQ", "ko:data/nano", "data/broken",
             "data/nothing", "nanobier", "nanobeir:fr", "/nowhere"]  # fmt: skip
    for name in names:
        try:
            load_benchmarks([name])
            loads = "ok"
        except InputError:
            loads = "fail"
        assert [status for status, _ in checked("evaluation", eval_steps=1.0, eval_data=[name])] == [loads], name
    (hub,) = checked("evaluation", eval_steps=1.0, eval_data=["de:org/NanoBEIR-de", "nanobeir:ko"])
    assert hub == ("warn", "de:org/NanoBEIR-de, nanobeir:ko: from the Hub or its cache")
    monkeypatch.setenv("ANCHOR_NANOBEIR", "data/snap")
    assert checked("evaluation", eval_steps=1.0, eval_data=["ko:NanoNQ"]) == [("ok", "ko:NanoNQ: ko/NanoNQ")]
    assert [status for status, _ in checked("evaluation", eval_steps=1.0)] == ["fail"]  # the snapshot has one of four


def test_data_of_the_hub_and_patterns(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("a", "b"):
        Path(f"data/{name}.jsonl").write_text('{"query": "Where do otters live?", "document": "In rivers."}\n' * 3)
    keys: dict[str, Any] = {"model_name_or_path": str(small_model), "max_seq_length": 160}
    assert rows_of(spec(dataset_file_path="data/*.jsonl", **keys), None).num_rows == 6
    ((status, said),) = checked("data", dataset_file_path="data/*.jsonl", **keys)
    assert status == "warn" and "training will prepare it" in said
    with pytest.raises(InputError, match="from the Hub") as caught:
        rows_of(spec(dataset_file_path="hf://org/pairs"), None)
    assert caught.value.hint is not None and "--rows N" in caught.value.hint
    ((status, said),) = checked("data", dataset_file_path="hf://org/pairs")
    assert status == "warn" and "from the Hub" in said
    for missing in ("data/nothing", "org/pairs", "data/*.csv", "/nowhere"):
        assert [status for status, _ in checked("data", dataset_file_path=missing)] == ["fail"]


def test_a_known_model_and_no_data_ask_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("anchor_cli.base.hub.hub_answer", ask)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    known = "Qwen/Qwen3-0.6B"
    assert shape_of(known)[0] == SHAPE
    with pytest.raises(AssertionError, match="asked the Hub"):
        shape_of("org/other")


def test_lengths_of_raw_rows_equal_those_of_prepare(small_model: Path, tmp_path: Path) -> None:
    from anchor_cli.data.prepare.prepare import prepare

    raw = tmp_path / "raw.jsonl"
    pairs = [(f"Where do otters live {i}?", "Otters live in rivers. " * (i % 7 + 1)) for i in range(60)]
    raw.write_text("\n".join(json.dumps({"query": q, "document": d}) for q, d in pairs), encoding="utf-8")
    keys = {"model_name_or_path": str(small_model), "max_seq_length": 160}
    prepare([str(raw)], tmp_path / "data", tokenizer=str(small_model), max_seq_length=160)
    exact = rows_of(spec(dataset_file_path=str(tmp_path / "data"), **keys), None)
    sampled = rows_of(spec(dataset_file_path=str(raw), **keys), None)
    assert sampled.num_rows == exact.num_rows == 60
    assert sampled.num_targets == exact.num_targets
    assert set(sampled.document_lengths.tolist()) == set(exact.document_lengths.tolist())


def test_a_missing_data_set_needs_rows() -> None:
    with pytest.raises(InputError, match="not found on this machine"):
        rows_of(spec(dataset_file_path="/nowhere"), None)
    got = rows_of(spec(dataset_file_path="/nowhere"), 500)
    assert got.num_rows == 500 and got.source.startswith("assumed")


def test_lengths_that_are_given_or_assumed() -> None:
    def means(**keys: Any) -> tuple[float, float]:
        got = rows_of(spec(dataset_file_path="/nowhere", max_seq_length=2048), 100_000, **keys)
        return round(float(got.query_lengths.mean())), round(float(got.document_lengths.mean()))

    assert means() == (42, 493)  # documents that are hardly cut, not 72 % of 2,048
    assert means(mean_query=30, mean_document=700) == (30, 700)
    short = rows_of(spec(dataset_file_path="/nowhere", max_seq_length=512), 100_000)
    assert round(float(short.document_lengths.mean())) == 369
    cut = rows_of(spec(dataset_file_path="/nowhere", max_seq_length=64), 100, mean_query=20, mean_document=300)
    assert cut.source == "given: queries of 20, documents of 64 tokens on average, cut at max_seq_length 64"


def test_prepared_rows_as_a_sample_of_more(small_model: Path, tmp_path: Path) -> None:
    from anchor_cli.data.prepare.prepare import prepare

    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"query": f"q {i}", "document": "d " * (i % 7 + 1)}) for i in range(50)))
    prepare([str(raw)], tmp_path / "data", tokenizer=str(small_model), max_seq_length=160)
    keys: dict[str, Any] = {"model_name_or_path": str(small_model), "max_seq_length": 160}
    exact = rows_of(spec(dataset_file_path=str(tmp_path / "data"), **keys), None)
    many = rows_of(spec(dataset_file_path=str(tmp_path / "data"), **keys), 20_000)
    assert (exact.num_rows, many.num_rows) == (50, 20_000)
    assert many.document_lengths.mean() == pytest.approx(exact.document_lengths.mean(), rel=0.02)
    assert many.num_targets == exact.num_targets * 400
    assert rows_of(spec(dataset_file_path=str(raw), **keys), 20_000).num_rows == 20_000


def test_what_stage_1_saves_is_said_where_stage_2_reduces_twice_a_step() -> None:
    """By hand: one reduction less of 2 · 4 · P / 2 bytes; the other card's half of the fp32 gradients stays."""
    from anchor_cli.plan.checks import _stage_1_saves

    hardware = Hardware(GPUS["h100-nvl"], 2, 94 * 2**30)
    config = {
        "zero_optimization": {"stage": 2},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    one, two = (replace(made(), cut=replace(made().cut, micro_batches_per_step=count)) for count in (1, 2))
    assert _stage_1_saves(spec(), hardware, one, config) == ""
    assert _stage_1_saves(spec(), hardware, two, config | {"zero_optimization": {"stage": 1}}) == ""
    P = 596_049_920
    want = f"; stage 1 would send {4 * P / 1e9:.1f} GB less a step and rank, for {2 * P / 1e9:.1f} GB more memory"
    assert _stage_1_saves(spec(), hardware, two, config) == want


def test_many_checkpoints_are_named_with_what_a_limit_saves() -> None:
    def checks(**more: Any) -> list[tuple[str, str, str | None]]:
        keys = {"save_steps": 100.0, "max_steps": 1000, "global_batch_size": 2, "per_device_train_batch_size": 1} | more
        lines = check_plan(spec(**keys), Hardware(None, 1, None), made(**keys), {})
        return [(line.status, line.message, line.remedy) for line in lines if line.name == "checkpoints"]

    # ten checkpoints of 596,049,920 x 14 bytes and 34 MB: 8.38 GB; a limit of five and the one being written keep six
    assert checks() == [("warn", "all 10 are kept, 84 GB", "save_total_limit: 5 would save 34 GB")]
    assert checks(save_total_limit=5) == []


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("flags\t\t: fpu sse avx2 fma", False),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("", True),  # another system: nothing is known
    ],
)
def test_bfloat16_on_a_cpu_that_has_no_instructions_for_it(
    cpuinfo: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anchor_cli.doctor.gpu import gpus
    from anchor_cli.doctor.needs import Needs

    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr("anchor_cli.base.cpu.CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    want = [] if fast else ["warn"]
    assert [status for status, _ in checked("precision")] == want
    assert checked("precision", precision="float32") == []
    lines = [check for check in gpus(Needs.of(spec())) if check.name == "precision"]
    assert [check.status for check in lines] == want
    assert not [check for check in gpus(Needs()) if check.name == "precision"]  # no spec, nothing asked for


def test_shape_from_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_CONFIGS["Qwen/Qwen3-0.6B"]))
    assert shape_of(str(tmp_path))[0] == SHAPE == shape_of("Qwen/Qwen3-0.6B")[0]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no hidden_size"):
        shape_of(str(tmp_path))
    with pytest.raises(InputError, match="no config.json there"):
        shape_of(str(tmp_path / "nothing"))


def test_the_command_plans_kure_on_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["plan", str(ROOT / KURE), "--gpu", "h100-nvl", "--num-gpus", "2", "--rows", "1862922", "--json"])
    got = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (got["steps"]["steps_per_epoch"], got["steps"]["total_steps"]) == (14_554, 43_662)
    assert got["parameters"] == 596_049_920 and got["cut"]["gradient_checkpointing"] is False
    parts = {key: value for key, value in got["memory"].items() if key != "total"}
    assert got["memory"]["total"] == pytest.approx(sum(parts.values()))
    assert {check["name"]: check["status"] for check in got["checks"]}["data"] == "fail"


def test_the_command_in_words_with_a_probe(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"query": f"q {i}", "document": "d " * 9}) for i in range(40)))
    keys = {"model_name_or_path": str(small_model), "dataset_file_path": str(raw), "precision": "float32",
            "max_seq_length": 160, "global_batch_size": 4, "num_train_epochs": 1.0, "warmup_steps": 1,
            "output_dir": str(tmp_path / "out")}  # fmt: skip
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(keys))
    assert run(["plan", str(path), "--probe"]) == 0
    out = capsys.readouterr().out
    assert "10 an epoch, 10 in all" in out and "on cpu (sdpa)" in out and "probe: " in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_the_probe_builds_the_family_of_the_config(family: str, tmp_path: Path) -> None:
    """Without weights: the same parameters, by name and shape, as transformers' own class has."""
    import torch
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    config.save_pretrained(tmp_path)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    ours = probe._backbone(spec(model_name_or_path=str(tmp_path)), torch.float32, False)
    assert type(ours) is type(theirs)
    got = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert got == {name: parameter.shape for name, parameter in theirs.named_parameters()}
    assert sum(shape.numel() for shape in got.values()) == shape_of(str(tmp_path))[0].num_parameters
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen9"}))
    with pytest.raises(InputError, match="no causal language model that transformers knows"):
        probe._backbone(spec(model_name_or_path=str(tmp_path)), torch.float32, False)


def test_mistakes_are_said(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(ROOT / KURE), "--mfu", "0.4", "--tokens-per-second", "10"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert run(["plan", str(ROOT / KURE), "--gpu", "h100"]) == 2
