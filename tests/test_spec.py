"""The run spec: what loads, what it says, and every mistake in one line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO
from anchor_cli.base.errors import InputError
from anchor_cli.cli import run
from anchor_cli.spec import aliases as compat
from anchor_cli.spec import docs as spec_docs
from anchor_cli.spec.load import PATH_KEYS, load_spec, read_spec
from anchor_cli.spec.spec import NOT_OF_THE_RESULT, OF_STAGE_II, RunSpec
from anchor_cli.train.start import differences_that_matter

REPOSITORY = Path(__file__).parents[1]
LEAST = {"model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_file_path": "pairs"}
# A file of the research code, key for key (its Stage I run of Qwen3-0.6B).
RESEARCH = {
    "model_name_or_path": "Qwen/Qwen3-0.6B",
    "bidirectional": False,
    "pooling_mode": "eos_token",
    "dataset_name": "KoEnQP",
    "dataset_file_path": "/data/train_ko_en",
    "remove_unused_columns": False,
    "learning_rate": 4e-5,
    "num_train_epochs": 1,
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "gradient_accumulation_steps": 2,
    "do_train": True,
    "disable_tqdm": False,
    "max_seq_length": 2048,
    "overwrite_output_dir": True,
    "output_dir": "out",
    "logging_steps": 1,
    "save_steps": 0.2,
    "save_only_model": True,
    "gradient_checkpointing": True,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "bf16": True,
    "seed": 42,
    "dataloader_num_workers": 8,
    "ddp_find_unused_parameters": False,
    "report_to": "wandb",
    "run_name": "stage-I",
    "d2q_weight": 0.8,
    "q2d_weight": 0.2,
    "retrieval_eval_steps": 0.05,
    "retrieval_eval_on_start": True,
    "retrieval_eval_batch_size": 64,
}


def write(folder: Path, spec: dict[str, Any]) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_keys_are_those_of_the_design() -> None:
    want = """model_name_or_path dataset_name dataset_file_path output_dir experiment_id
    max_seq_length pooling_mode instructions text_template reconstruction_targets d2q_weight q2d_weight
    stage temperature in_batch_negatives negatives_group_size margin_strategy margin guide_model_name_or_path
    hardness_mode hardness_strength matryoshka_dims matryoshka_weights kd_weight kd_temperature num_hard_negatives
    learning_rate num_train_epochs warmup_steps warmup_ratio max_steps stop_after_n_steps weight_decay max_grad_norm
    lr_scheduler_type seed per_device_train_batch_size gradient_accumulation_steps global_batch_size
    max_tokens_per_micro_batch precision attn_implementation gradient_checkpointing torch_compile liger deepspeed
    eval_steps eval_on_start eval_batch_size eval_data save_steps save_total_limit logging_steps report_to
    run_name""".split()
    assert list(RunSpec.model_fields) == want
    assert all(field.description for field in RunSpec.model_fields.values())
    assert set(want) >= NOT_OF_THE_RESULT


def test_a_spec_of_the_research_code_loads_and_names_once_what_it_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, RESEARCH)
    spec = load_spec(path)
    assert capsys.readouterr().err == (
        f"{path}: ignored, they mean nothing here: remove_unused_columns, per_device_eval_batch_size, do_train, "
        "disable_tqdm, overwrite_output_dir, save_only_model, dataloader_num_workers, ddp_find_unused_parameters\n"
    )
    assert (spec.precision, spec.eval_steps, spec.eval_on_start, spec.eval_batch_size) == ("bfloat16", 0.05, True, 64)
    assert (spec.warmup_steps, spec.warmup_ratio) == (0, 0.1)
    assert spec.global_batch(world_size=2) == 16 * 2 * 2
    for key in RunSpec.model_fields:
        if key in RESEARCH:
            assert getattr(spec, key) == RESEARCH[key]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "train_configs").rglob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["spec", str(path), "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert json.loads(said.out)["ignored"] == []
    named = json.loads(path.read_text(encoding="utf-8"))["$schema"]
    assert (path.parent / named).resolve() == REPOSITORY / spec_docs.SCHEMA_PATH


def test_shipped_specs_are_found_outside_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tool (uv, pipx) there is no repository around; a file of that name in the current folder comes first."""
    monkeypatch.chdir(tmp_path)
    name = "train_configs/stage_I/laptop.json"
    assert load_spec(name) == load_spec(REPOSITORY / name)
    with pytest.raises(InputError, match="no such file"):
        load_spec("train_configs/stage_I/nothing.json")
    (tmp_path / "train_configs/stage_I").mkdir(parents=True)
    given = {"model_name_or_path": "a", "dataset_file_path": "b", "output_dir": "c", "seed": 7}
    (tmp_path / name).write_text(json.dumps(given), encoding="utf-8")
    assert load_spec(name).seed == 7


def test_kure_is_the_run_of_the_paper_in_korean() -> None:
    spec = load_spec(REPOSITORY / "train_configs/stage_I/Qwen3_0.6b_q2d_d2q_512.json")
    want = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "learning_rate": 4e-5,
        "warmup_steps": 300,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "max_seq_length": 512,
        "precision": "bfloat16",
        "attn_implementation": "flash_attention_2",
        "gradient_checkpointing": "auto",
        "d2q_weight": 0.8,
        "q2d_weight": 0.2,
        "eval_steps": 500,
        "eval_batch_size": 64,
        "output_dir": "output/stage_I/Qwen3-0.6B-q2d-d2q-WO-PEFT",
        "deepspeed": "zero2_bf16",
        "instructions": None,
    }
    assert {key: getattr(spec, key) for key in want} == want
    assert spec.global_batch(world_size=2) == 128
    assert spec.training_instructions == {"*": INSTRUCTION_KO}
    assert spec.query_instructions == {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}


def test_kure_as_it_is_run_today() -> None:
    """The values of its newest run, and the name its folder has there."""
    spec = load_spec(REPOSITORY / "train_configs/stage_I/Qwen3_0.6b_q2d_d2q_2048.json")
    batch = (spec.per_device_train_batch_size, spec.gradient_accumulation_steps, spec.global_batch(world_size=2))
    assert batch == (16, 4, 128) and spec.global_batch(world_size=1) == 128
    assert (spec.max_seq_length, spec.learning_rate, spec.num_train_epochs, spec.warmup_ratio) == (2048, 1e-4, 1, 0.1)
    assert (spec.d2q_weight, spec.q2d_weight, spec.save_steps, spec.eval_steps) == (0.5, 0.5, 0.2, 0.05)
    assert spec.eval_on_start and spec.warmup_steps == 0
    assert spec.run_folder.name == (
        "KoEnQP_train_ko_en_m-Qwen3-0.6B_g-2_b-16_ga-4_l-2048_e-1_w-0.1_lr-0.0001_d2q-0.5_q2d-0.5"
    )


@pytest.mark.parametrize(
    ("pattern", "want"),
    [
        ("{data}_s-{seed}", "pairs_s-42"),
        ("{model}.{learning_rate}.{warmup}", "Qwen3-0.6B.4e-05.300"),
        ("run{{1}}", "run-1-"),
        ("plain", "plain"),
        ("{lerning_rate}", "experiment_id {lerning_rate}: expected keys of the spec and data, folder, model, gpus, "
                           "warmup in braces, not {lerning_rate} (did you mean {learning_rate}?)"),
        ("{gpus}", "experiment_id {gpus}: expected no {gpus} without global_batch_size, which says for how many GPUs "
                   "the batch is meant"),
    ],
)  # fmt: skip
def test_fields_of_the_experiments_name(pattern: str, want: str, tmp_path: Path) -> None:
    path = write(tmp_path, LEAST | {"experiment_id": pattern})
    if not want.startswith("experiment_id"):
        spec = load_spec(path)
        assert spec.experiment == spec.model_dump()["experiment_id"] == want
        return
    with pytest.raises(InputError) as caught:
        load_spec(path)
    assert caught.value.message == f"{path}: {want}"


def test_a_resolved_spec_read_again_is_the_same(tmp_path: Path) -> None:
    for more in ({}, {"warmup_ratio": 0.1}, {"precision": "float32"}, {"global_batch_size": 100}, {"report_to": []}):
        spec = load_spec(write(tmp_path, LEAST | more))
        again = load_spec(write(tmp_path, spec.model_dump()))
        assert again == spec
        assert again.fingerprint == spec.fingerprint


MISTAKES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"lerning_rate": 1e-4}, "lerning_rate: unknown key", "did you mean learning_rate?"),
    ({"Learning-Rate": 1e-4}, "Learning-Rate: unknown key", "did you mean learning_rate?"),
    ({"xyzzy": 1}, "xyzzy: unknown key", "anchor spec --keys lists all keys"),
    ({"learning_rate": "4e-5"}, 'learning_rate: got "4e-5", expected a number above 0', None),
    ({"learning_rate": 0}, "learning_rate: got 0, expected a number above 0", None),
    ({"learning_rate": True}, "learning_rate: got true, expected a number above 0", None),
    ({"warmup_steps": 10.5}, "warmup_steps: got 10.5, expected a whole number of at least 0", None),
    ({"seed": None}, "seed: got null, expected a whole number of at least 0 and below 4294967296", None),
    ({"precision": "half"}, 'precision: got "half", expected one of bfloat16, float32', None),
    (
        {"gradient_checkpointing": "yes"},
        'gradient_checkpointing: got "yes", expected true or false, or "auto"',
        None,
    ),
    ({"eval_data": "ko:welfare"}, 'eval_data: got "ko:welfare", expected a list, each text, or null', None),
    ({"instructions": {"ko": 1}}, 'instructions: got {"ko": 1}, expected an object of texts, or null', None),
    (
        {"text_template": "user: "},
        'text_template: got "user: ", expected a template with {text} in it exactly once',
        None,
    ),
    (
        {"text_template": "user: {text}"},
        'text_template: got "user: {text}", expected a template that ends in a special token right after {text}',
        None,
    ),
    (
        {"save_steps": 10.5},
        "save_steps: got 10.5, expected a whole number of steps, or a share of all steps below 1",
        None,
    ),
    (
        {"max_steps": 0},
        "max_steps: got 0, expected a number of steps, or -1 for as many as num_train_epochs gives",
        None,
    ),
    ({"max_seq_length": 4}, "max_seq_length: got 4, expected a whole number of at least 5", None),
    (
        {"experiment_id": "a/b"},
        'experiment_id: got "a/b", expected a name for a folder, without slashes, or null',
        None,
    ),
    ({"d2q_weight": -1}, "d2q_weight: got -1, expected a number of at least 0", None),
    ({"d2q_weight": 0, "q2d_weight": 0}, "d2q_weight and q2d_weight are both 0: nothing would be learned", None),
    (
        {"warmup_steps": 300, "warmup_ratio": 0.1},
        "warmup_steps 300 and warmup_ratio 0.1 contradict each other",
        "keep one of them, or set the other to 0",
    ),
    (
        {"global_batch_size": 100, "per_device_train_batch_size": 32},
        "global_batch_size 100 is not a multiple of per_device_train_batch_size 32 x gradient_accumulation_steps 1",
        "leave the two out: global_batch_size alone is enough",
    ),
    (
        {"bf16": True, "precision": "float32"},
        'precision "float32" and bf16 true contradict each other: both are precision',
        None,
    ),
    (
        {"torch_dtype": "float32", "bf16": True},
        'torch_dtype "float32" and bf16 true contradict each other: both are precision',
        None,
    ),
    (
        {"eval_steps": 100, "retrieval_eval_steps": 200},
        "eval_steps 100 and retrieval_eval_steps 200 contradict each other: both are eval_steps",
        None,
    ),
    (
        {"torch_dtype": "float16"},
        'torch_dtype: "float16" is not supported: float16 overflows in training of this kind; '
        'use "precision": "bfloat16"',
        None,
    ),
    ({"torch_dtype": "int8"}, 'torch_dtype: got "int8", expected bfloat16 or float32', None),
    (
        {"fp16": True},
        'fp16: true is not supported: float16 overflows in training of this kind; use "precision": "bfloat16"',
        None,
    ),
    (
        {"bidirectional": True},
        "bidirectional: true is not supported: anchor trains causal encoders only: [EOS] sees the whole text",
        None,
    ),
    (
        {"use_peft": True, "lora_r": 16},
        "use_peft: true is not supported: all weights are trained; there are no adapters",
        None,
    ),
    (
        {"optim": "adafactor"},
        'optim: "adafactor" is not supported: the optimizer is AdamW with betas 0.9, 0.999 and eps 1e-8',
        None,
    ),
    (
        {"retrieval_eval_steps": -1},
        "eval_steps (here retrieval_eval_steps): got -1, expected a number of at least 0",
        None,
    ),
    (
        {"learning_rate": 0, "seed": -1, "lr_scheduler_type": "none"},
        "learning_rate: got 0, expected a number above 0",
        "also wrong: lr_scheduler_type, seed",
    ),
    (
        {"temperature": 0.05},
        "temperature belongs to Stage II, but stage is I",
        'take it out, or set "stage" to "II"',
    ),
    (
        {"stage": "II", "q2d_weight": 0.5},
        "q2d_weight belongs to Stage I, but stage is II",
        'take it out, or set "stage" to "I"',
    ),
    (
        {"stage": "II", "margin": 0.1},
        "margin changes nothing without margin_strategy",
        'add "margin_strategy": "absolute" or "relative"',
    ),
    (
        {"stage": "II", "hardness_mode": "hard_negatives"},
        "hardness_mode and hardness_strength need each other",
        "give both, or neither",
    ),
    (
        {"stage": "II", "matryoshka_dims": [64, 32], "matryoshka_weights": [1.0]},
        "matryoshka_weights [1.0] are not one weight, not all 0, for each of matryoshka_dims [64, 32]",
        None,
    ),
    (
        {"stage": "II", "in_batch_negatives": "some"},
        'in_batch_negatives: got "some", expected one of all, same_language, none',
        None,
    ),
    (
        {"deepspeed": "zero2_bf61"},
        "deepspeed: zero2_bf61: no such config, expected a name in ds_configs/ or a file",
        "did you mean zero2_bf16?",
    ),
    (
        {"deepspeed": "zero2_bf16", "precision": "float32"},
        "deepspeed config: bf16.enabled true contradicts the spec's precision float32",
        'write "auto" in the DeepSpeed config: the spec decides',
    ),
]


@pytest.mark.parametrize(("change", "line", "hint"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], line: str, hint: str | None
) -> None:
    path = write(tmp_path, LEAST | change)
    assert run(["spec", str(path)]) == 2
    said = capsys.readouterr()
    where = "" if line.startswith("deepspeed") else f"{path}: "
    assert said.err.splitlines() == [f"anchor: {where}{line}"] + ([f"  {hint}"] if hint else [])
    assert said.out == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "line 1, column 2: not JSON: Expecting property name enclosed in double quotes"),
        ('{"a": 1,}', "line 1, column 8: not JSON: Illegal trailing comma before end of object"),
        ("[1]", "expected one JSON object, got [1]"),
        ('{"seed": 1, "seed": 2}', "seed: the key is there twice"),
        ('{"learning_rate": NaN}', "NaN is not a JSON number"),
        ("{}", "model_name_or_path: missing, expected a text that is not empty"),
    ],
)
def test_a_file_that_is_no_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    assert run(["spec", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()[0]
    if "JSON: " in line:  # the parser's words differ between Python versions
        line, said = line.split("JSON: ")[0], said.split("JSON: ")[0]
        line, said = (text.partition(", column")[0] for text in (line, said))
    assert said == f"anchor: {path}: {line}"


def test_a_missing_file_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["spec", str(tmp_path / "rum.json")]) == 2
    assert capsys.readouterr().err == (
        f"anchor: {tmp_path}/rum.json: no such file\n  anchor init writes one to start from\n"
    )
    write(tmp_path, LEAST)
    assert run(["spec", str(tmp_path / "rum.json")]) == 2
    assert capsys.readouterr().err.splitlines()[1] == f"  did you mean {tmp_path}/run.json?"
    assert run(["spec", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[0] == f"anchor: {tmp_path}: is a folder, expected a JSON file"


def test_where_values_come_from(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST | {"torch_dtype": "float32", "seed": 1, "warmup_ratio": 0.5})
    reading = read_spec(path, ["seed=7", "retrieval_eval_steps=0.5", "run_name=밤", 'instructions={"ko": "찾기"}'])
    got = {key: source for key, source in reading.sources.items() if source != "default"}
    assert got == {
        "model_name_or_path": "file",
        "dataset_file_path": "file",
        "precision": "file (torch_dtype)",
        "warmup_ratio": "file",
        "seed": "--set",
        "eval_steps": "--set (retrieval_eval_steps)",
        "run_name": "--set",
        "instructions": "--set",
        "deepspeed": "derived",
        "warmup_steps": "derived",
    }
    spec = reading.spec
    assert (spec.seed, spec.run_name, spec.deepspeed) == (7, "밤", "zero2_fp32")
    assert spec.training_instructions == {"ko": "찾기"}
    assert spec.query_instructions == {"ko": "찾기", "en": INSTRUCTION_EN}


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed", "--set seed: expected key=value"),
        ("sead=1", "--set: sead: unknown key"),
        ("seed=x", '--set: seed: got "x", expected a whole number of at least 0 and below 4294967296'),
        ("warmup_ratio=0.1", "{path} with --set: warmup_steps 300 and warmup_ratio 0.1 contradict each other"),
    ],
)
def test_a_wrong_override(tmp_path: Path, override: str, line: str) -> None:
    path = write(tmp_path, LEAST | {"warmup_steps": 300})
    with pytest.raises(InputError) as error:
        load_spec(path, [override])
    assert error.value.message == line.format(path=path)


def test_a_spec_is_frozen_and_its_name_says_what_it_depends_on() -> None:
    spec = RunSpec(**LEAST)
    with pytest.raises(ValidationError):
        spec.seed = 2  # type: ignore[misc]
    assert spec.experiment == f"pairs_Qwen3-0.6B_lr-4e-05_e-3_s-42_{spec.fingerprint[:8]}"
    same = spec.model_copy(update={"stop_after_n_steps": 5, "save_steps": 1.0, "max_tokens_per_micro_batch": 9})
    other = spec.model_copy(update={"q2d_weight": 0.3})
    assert same.fingerprint == spec.fingerprint != other.fingerprint
    assert spec.model_copy(update={"experiment_id": "x"}).run_folder == Path("output/x")


def test_stage_2_changes_neither_name_nor_resume_of_a_run_of_stage_1() -> None:
    """Runs that began before there was a Stage II have none of its keys in their training state."""
    spec = RunSpec(**LEAST)
    before = {key: value for key, value in spec.model_dump().items() if key not in ("stage", *OF_STAGE_II)}
    kept = {key: value for key, value in before.items() if key not in NOT_OF_THE_RESULT}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    assert spec.fingerprint == digest
    assert differences_that_matter(before, spec.model_dump(), 32) == []
    second = RunSpec(**LEAST, stage="II", temperature=0.05)
    assert second.fingerprint != RunSpec(**LEAST, stage="II").fingerprint != spec.fingerprint
    want = ['stage: "I" -> "II"', "temperature: 0.01 -> 0.05"]
    assert differences_that_matter(before, second.model_dump(), 32) == want


@pytest.mark.parametrize("written", [r"a\n{text}<e>", "a\n{text}<e>", r'"a\n{text}<e>"'])
def test_a_line_break_of_a_template_survives_the_shell(written: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(LEAST))
    assert read_spec(path, [f"text_template={written}"]).spec.text_template == "a\n{text}<e>"


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/otter")
    keys = {key for key in RunSpec.model_fields if re.search("path|dir|file", key)} | {"deepspeed", "eval_data"}
    assert keys == set(PATH_KEYS)
    given: dict[str, Any] = {key: f"~/{key}" for key in keys - {"guide_model_name_or_path"}}
    given["eval_data"] = ["~/a", "ko:~/b", "nanobeir", "ko:c/~/d"]
    want = {key: f"/home/otter/{key}" for key in given}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(given))
    overrides = ["dataset_file_path=~/set", "experiment_id=~x"]
    spec = read_spec(path, overrides).spec
    assert spec.eval_data == ["/home/otter/a", "ko:/home/otter/b", "nanobeir", "ko:c/~/d"]
    assert (spec.dataset_file_path, spec.experiment_id) == ("/home/otter/set", "~x")
    for key in ("model_name_or_path", "output_dir", "deepspeed"):
        assert getattr(spec, key) == want[key]


def test_the_global_batch_alone_is_enough() -> None:
    for batch, want in ((128, 32), (48, 24), (37, 1), (7, 7), (2048, 32)):
        spec = RunSpec(**LEAST, global_batch_size=batch)
        assert spec.per_device_train_batch_size == want
        assert spec.global_batch(world_size=3) == batch


def test_every_training_argument_of_hugging_face_is_known() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    known = {*RunSpec.model_fields, *compat.ALIASES, *compat.IGNORED, *compat.REFUSED}
    assert {field.name for field in fields(TrainingArguments) if field.init} <= known
    ours = [set(RunSpec.model_fields), set(compat.ALIASES), set(compat.IGNORED), set(compat.REFUSED)]
    assert len(set.union(*ours)) == sum(map(len, ours)), "a key has one meaning"


def test_generated_pages_are_current() -> None:
    for name, text in spec_docs.pages().items():
        assert (REPOSITORY / name).read_text(encoding="utf-8") == text, "run `make docs`"


def test_a_warm_up_ratio_of_zero_is_no_warm_up(tmp_path: Path) -> None:
    """As in Hugging Face, whose warmup_steps is 0 unless it is given; ours is 300."""
    assert load_spec(write(tmp_path, LEAST)).warmup_steps == 300
    for keys, overrides in (({"warmup_ratio": 0.0}, []), ({"warmup_ratio": 0.1}, ["warmup_ratio=0"])):
        spec = load_spec(write(tmp_path, LEAST | keys), overrides)
        assert (spec.warmup_steps, spec.warmup_ratio) == (0, None)
    spec = load_spec(write(tmp_path, LEAST | {"warmup_ratio": 0.0, "warmup_steps": 7}))
    assert (spec.warmup_steps, spec.warmup_ratio) == (7, None)


def test_a_batch_that_a_resumed_spec_no_longer_states_is_a_difference() -> None:
    before = RunSpec(model_name_or_path="m", dataset_file_path="d", global_batch_size=64)
    after = RunSpec(model_name_or_path="m", dataset_file_path="d", per_device_train_batch_size=8)
    assert differences_that_matter(before.model_dump(), after.model_dump(), 64) == ["global_batch_size: 64 -> null"]
