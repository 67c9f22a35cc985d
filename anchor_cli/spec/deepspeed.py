"""DeepSpeed configs: plain ones, with `"auto"` where the spec decides; a contradiction is an error, never a choice.

DeepSpeed ignores top-level keys that it does not know, so a misspelled `zero_optimisation` would silently train without
ZeRO: those keys are listed here. What stands below `zero_optimization`, `bf16` and `fp16` is checked by DeepSpeed's own
models, for files that are not shipped (importing DeepSpeed takes some seconds; tests check the shipped ones).
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from anchor_cli.base.errors import InputError, nearest

if TYPE_CHECKING:
    from anchor_cli.spec.spec import RunSpec

TOP_LEVEL_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print "
    "bf16 fp16 zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type "
    "seq_parallel_communication_data_type data_types prescale_gradients gradient_predivide_factor wall_clock_breakdown "
    "memory_breakdown dump_state activation_checkpointing aio comms_logger flops_profiler checkpoint timers compile "
    "dataloader_drop_last disable_allgather disable_python_gc log_level zero_optimization_stage csv_monitor "
    "tensorboard wandb".split()
)
"""Top-level keys that are passed on."""

REFUSED = {
    "optimizer": "the spec's learning_rate and weight_decay make the optimizer (AdamW)",
    "scheduler": "the spec's warmup_steps and lr_scheduler_type make the schedule",
    "amp": 'use "precision" in the spec',
    "torch_autocast": 'use "precision" in the spec',
    "sparse_attention": "attention is attn_implementation of the spec",
    "curriculum_learning": "it changes the order of rows",
    "data_efficiency": "it changes the order of rows",
    "progressive_layer_drop": "it changes the model that is trained",
    "eigenvalue": "it belongs to quantisation, which changes the model that is trained",
    "compression_training": "it changes the model that is trained",
    "quantize_training": "it changes the model that is trained",
    "weight_quantization": "it changes the model that is trained",
    "tensor_parallel": "anchor is data-parallel only",
    "expert_parallel": "anchor is data-parallel only",
    "pipeline": "anchor is data-parallel only",
    "hybrid_engine": "it is for reinforcement learning",
    "autotuning": "anchor plan and max_tokens_per_micro_batch do that",
    "elasticity": "DeepSpeed has removed it; a run resumes on any number of GPUs",
    "gradient_allreduce_op": "the loss's normalisation relies on DeepSpeed's default",
    "managed_gradient_accumulation": "the loss's normalisation relies on DeepSpeed's default",
}
"""Top-level keys that would change the result or have no place here, and why."""

REFUSED_BELOW = {
    ("bf16", "bf16_master_weights_and_grads"): "master weights are float32",
    ("bf16", "bf16_optimizer_states"): "the optimizer's state is float32",
    ("zero_optimization", "zenflow"): "it updates weights late, which changes the result",
    ("zero_optimization", "zero_quantized_weights"): "it rounds weights",
    ("zero_optimization", "zero_quantized_gradients"): "it rounds gradients",
}

AUTO_LEFT_TO_DEEPSPEED = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
)
"""`"auto"` of Hugging Face's integration that depends on the model's width there; DeepSpeed's own default here."""


def configs_folder() -> Path:
    """The shipped configs: `ds_configs/` of the repository, or the copy inside an installed wheel."""
    return shipped_folder("ds_configs")


def shipped_folder(name: str) -> Path:
    """A top-level folder of the repository, or its copy inside an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / f"_{name}"
    return inside if inside.is_dir() else package.parent / name


def load_ds_config(name_or_path: str, spec_dir: str | Path) -> dict[str, Any]:
    """A DeepSpeed config as it is written, `"auto"`s and all.

    Looked for as a shipped name (`zero2_bf16`), below the spec's folder, then below the current one.

    Raises:
        InputError: not found (with the nearest shipped name), not JSON, an unknown or refused key.
    """
    shipped = {path.stem: path for path in sorted(configs_folder().glob("*.json"))}
    bare = name_or_path.removesuffix(".json").removeprefix("ds_configs/")
    places = [Path(spec_dir) / name_or_path, Path(name_or_path).expanduser()]
    path = next((place for place in places if place.is_file()), shipped.get(bare))
    if path is None:
        near = nearest(bare, shipped)
        hint = f"did you mean {near}?" if near else f"shipped are: {', '.join(shipped)}"
        raise InputError(f"deepspeed: {name_or_path}: no such config, expected a name in ds_configs/ or a file", hint)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected one JSON object")
    _check_keys(raw, str(path))
    if path != shipped.get(bare):
        _check_sections(raw, str(path))
    return raw


def _check_keys(raw: dict[str, Any], where: str) -> None:
    for key in raw:
        if key in REFUSED:
            raise InputError(f"{where}: {key}: not supported: {REFUSED[key]}", "remove the key")
        if key not in TOP_LEVEL_KEYS:
            raise _unknown(f"{where}: {key}", key, TOP_LEVEL_KEYS)
    for (section, key), why in REFUSED_BELOW.items():
        if isinstance(raw.get(section), dict) and raw[section].get(key):
            raise InputError(f"{where}: {section}.{key}: not supported: {why}", "remove the key")
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise InputError(f"{where}: zero_optimization.stage: got {json.dumps(stage)}, expected 0, 1, 2 or 3")


def _check_sections(raw: dict[str, Any], where: str) -> None:
    """Keys and values below the sections for which DeepSpeed has a strict model of its own."""
    with redirect_stdout(sys.stderr):  # it prints while it is imported
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for section, model in models.items():
        try:
            model(**raw[section] if isinstance(raw.get(section), dict) else {})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (section, *first["loc"]))
            if first["type"] == "extra_forbidden":
                fields = model.model_fields if len(first["loc"]) == 1 else {}
                raise _unknown(f"{where}: {place}", str(first["loc"][-1]), fields) from None
            raise InputError(f"{where}: {place}: got {json.dumps(first['input'])}: {first['msg']}") from None


def _unknown(place: str, key: str, known: Iterable[str]) -> InputError:
    near = nearest(key, known)
    return InputError(f"{place}: unknown key", f"did you mean {near}?" if near else None)


def resolve_ds_config(
    raw: dict[str, Any],
    spec: RunSpec,
    *,
    gradient_accumulation_steps: int,
    micro_batch_size: int,
    world_size: int,
    global_batch_size: int | None = None,
) -> dict[str, Any]:
    """What DeepSpeed gets: every `"auto"` replaced, every stated value compared with the spec.

    `gradient_accumulation_steps` and `micro_batch_size` are passed to the engine, as DeepSpeed wants
    micro_batch_size x accumulation x ranks = train_batch_size. A config that states them is compared with the spec's;
    its train_batch_size with `global_batch_size`, which a continued run keeps on any number of ranks.

    Raises:
        InputError: a value that contradicts the spec, an `"auto"` nobody decides.
    """
    made = copy.deepcopy(raw)
    global_batch_size = global_batch_size or spec.global_batch(world_size)
    _agree(made, "train_batch_size", global_batch_size, f"global batch ({world_size} ranks)")
    _agree(made, "train_micro_batch_size_per_gpu", spec.per_device_train_batch_size, "per_device_train_batch_size")
    _agree(made, "gradient_accumulation_steps", spec.gradient_accumulation_steps, "gradient_accumulation_steps")
    made["train_micro_batch_size_per_gpu"] = micro_batch_size
    made["gradient_accumulation_steps"] = gradient_accumulation_steps
    made["train_batch_size"] = micro_batch_size * gradient_accumulation_steps * world_size
    made["gradient_clipping"] = _agree(made, "gradient_clipping", spec.max_grad_norm, "max_grad_norm")
    bf16, fp16 = made.setdefault("bf16", {}), made.get("fp16", {})
    is_bf16 = spec.precision == "bfloat16"
    bf16["enabled"] = _agree(bf16, "enabled", is_bf16, f"precision {spec.precision}", "bf16.enabled")
    _agree(fp16, "enabled", False, f"precision {spec.precision}", "fp16.enabled")
    made.pop("fp16", None)
    zero = made.setdefault("zero_optimization", {"stage": 0})
    for key in AUTO_LEFT_TO_DEEPSPEED:
        if zero.get(key) == "auto":
            del zero[key]
    made.setdefault("steps_per_print", 2**31 - 1)  # DeepSpeed's own line every 10 steps says nothing of ours
    left = list(_autos(made))
    if left:
        raise InputError(f"deepspeed {spec.deepspeed}: {left[0]}: 'auto', but no key of the spec decides it")
    return made


def _agree(section: dict[str, Any], key: str, ours: Any, spec_key: str, shown: str | None = None) -> Any:
    theirs = section.get(key, "auto")
    if theirs == "auto" or (theirs == ours and isinstance(theirs, bool) == isinstance(ours, bool)):
        return ours
    ours_text = spec_key if isinstance(ours, bool) else f"{spec_key} {json.dumps(ours)}"
    raise InputError(
        f"deepspeed config: {shown or key} {json.dumps(theirs)} contradicts the spec's {ours_text}",
        'write "auto" in the DeepSpeed config: the spec decides',
    )


def _autos(node: Any, path: str = "") -> Iterable[str]:
    if node == "auto" and not path.endswith("keep_in_fp32_modules"):
        yield path
    for key, value in node.items() if isinstance(node, dict) else ():
        yield from _autos(value, f"{path}.{key}" if path else key)
