"""Spec files of the research code load as they are: its spellings, and its keys that mean nothing here.

The keys are those of its flat JSON files: LLM2Vec's own arguments (`run_stage_I*.py`) and every field of Hugging
Face's `TrainingArguments`. A key is ignored only when it cannot change the result; one that would is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from anchor_cli.base.errors import InputError

RENAMED = {
    "retrieval_eval_steps": "eval_steps",
    "retrieval_eval_on_start": "eval_on_start",
    "retrieval_eval_batch_size": "eval_batch_size",
    "max_length": "max_seq_length",
    "activation_checkpointing": "gradient_checkpointing",
}
"""Another name for one of our keys, with the same meaning."""

PRECISION_KEYS = ("precision", "torch_dtype", "dtype", "bf16")
_PRECISIONS = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32", "auto": None}

ALIASES = (*RENAMED, "torch_dtype", "dtype", "bf16")
"""Every accepted spelling that is not one of our keys."""

IGNORED = frozenset(
    # LLM2Vec's own arguments without a meaning in Stage I
    "lora_r lora_alpha lora_dropout loss_class loss_scale add_special_tokens "
    # what is run: anchor has commands for that
    "do_train do_eval do_predict overwrite_output_dir prediction_loss_only "
    # how rows reach the model: rows are prepared, packed and never padded
    "remove_unused_columns dataloader_drop_last dataloader_num_workers dataloader_pin_memory "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order "
    "dataloader_multiprocessing_context length_column_name train_sampling_strategy "
    "per_device_eval_batch_size per_gpu_train_batch_size per_gpu_eval_batch_size eval_accumulation_steps "
    "eval_strategy evaluation_strategy eval_delay eval_use_gather_object eval_do_concat_batches "
    "include_for_metrics include_inputs_for_metrics include_tokens_per_second include_num_input_tokens_seen "
    "batch_eval_metrics label_names past_index average_tokens_across_devices "
    # how it is distributed and how fast: the spec's own keys and the DeepSpeed config decide
    "local_rank ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_timeout "
    "ddp_static_graph accelerator_config parallelism_config fsdp_config fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap use_cpu no_cuda use_mps_device use_ipex jit_mode_eval tf32 "
    "bf16_full_eval fp16_full_eval fp16_opt_level fp16_backend half_precision_backend torchdynamo "
    "torch_compile_backend torch_compile_mode torch_empty_cache_steps gradient_checkpointing_kwargs "
    "use_liger_kernel liger_kernel_config skip_memory_metrics enable_jit_checkpoint use_cache full_determinism "
    "activation_checkpointing_kwargs "
    # logging, saving, the Hub
    "disable_tqdm log_level log_level_replica log_on_each_node logging_dir logging_strategy logging_first_step "
    "logging_nan_inf_filter debug ray_scope project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "save_only_model save_safetensors save_on_each_node restore_callback_states_from_checkpoint ignore_data_skip "
    "metric_for_best_model greater_is_better push_to_hub push_to_hub_model_id push_to_hub_organization "
    "push_to_hub_token hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
    "cache_dir mp_parameters".split()
)
"""Keys without a meaning here, whatever their value."""


def _is_off(value: Any) -> bool:
    return value in (None, False, 0, "", [], {}, "none", "no")


def _is(*wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value is None or value in wanted


REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bidirectional": (_is_off, "anchor trains causal encoders only: [EOS] sees the whole text"),
    "use_peft": (_is_off, "all weights are trained; there are no adapters"),
    "peft_model_name_or_path": (_is_off, "merge the adapter into the model first and name that one"),
    "fp16": (_is_off, 'float16 overflows in training of this kind; use "precision": "bfloat16"'),
    "max_train_samples": (_is_off, "cut the data, or use max_steps or stop_after_n_steps"),
    "load_best_model_at_end": (_is_off, "anchor export takes the best checkpoint by itself"),
    "data_seed": (_is_off, "seed alone decides the order of rows"),
    "optim": (
        _is("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"),
        "the optimizer is AdamW with betas 0.9, 0.999 and eps 1e-8",
    ),
    "optim_args": (_is_off, "the optimizer is AdamW with betas 0.9, 0.999 and eps 1e-8"),
    "optim_target_modules": (_is_off, "all weights are trained alike"),
    "adafactor": (_is_off, "the optimizer is AdamW"),
    "adam_beta1": (_is(0.9), "AdamW's betas are 0.9 and 0.999"),
    "adam_beta2": (_is(0.999), "AdamW's betas are 0.9 and 0.999"),
    "adam_epsilon": (_is(1e-8), "AdamW's eps is 1e-8"),
    "lr_scheduler_kwargs": (_is_off, "lr_scheduler_type has no further arguments"),
    "label_smoothing_factor": (_is_off, "the losses are plain cross-entropies"),
    "neftune_noise_alpha": (_is_off, "no noise is added to embeddings"),
    "group_by_length": (_is_off, "rows are shuffled; packing makes grouping by length needless"),
    "auto_find_batch_size": (_is_off, "micro-batches are found by token budget: max_tokens_per_micro_batch"),
    "fsdp": (_is_off, "sharding is DeepSpeed's: see the key deepspeed"),
    "sharded_ddp": (_is_off, "sharding is DeepSpeed's: see the key deepspeed"),
    "save_strategy": (_is("steps"), "use save_steps: steps, a share of all steps, or 0 for only at the end"),
    "resume_from_checkpoint": (_is(True, False, ""), "a run resumes by itself from its newest whole checkpoint"),
    "trust_remote_code": (_is_off, "models are built from transformers' own code"),
}
"""Keys that would change the result: (is the value harmless?, why it is refused)."""


def translate(given: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """One layer of a spec (the file, or the overrides) in our own spellings.

    Returns:
        our keys and their values; the spelling each was given in where it was another; keys ignored, in their order.

    Raises:
        InputError: a refused key, two spellings of one key that disagree.
    """
    ours: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    ignored: list[str] = []
    for key, value in given.items():
        if key in REFUSED:
            harmless, why = REFUSED[key]
            if not harmless(value):
                raise InputError(f"{where}: {key}: {json.dumps(value)} is not supported: {why}")
        elif key in IGNORED:
            ignored.append(key)
        elif key in PRECISION_KEYS or (key in RENAMED and value is None):
            continue  # precision keys are read together below; null is Hugging Face's "not given"
        else:
            _put(ours, spelled, RENAMED.get(key, key), value, (key, given), where)
    _put_precision(ours, spelled, given, where)
    _translate_values(ours)
    return ours, spelled, ignored


def _put(
    ours: dict[str, Any],
    spelled: dict[str, str],
    name: str,
    value: Any,
    source: tuple[str, dict[str, Any]],
    where: str,
) -> None:
    key, given = source
    if name in ours and ours[name] != value:
        other = spelled.get(name, name)
        one, two = (f"{spelling} {json.dumps(given[spelling])}" for spelling in (other, key))
        raise InputError(f"{where}: {one} and {two} contradict each other: both are {name}")
    ours[name] = value
    if key != name:
        spelled[name] = key


def _put_precision(ours: dict[str, Any], spelled: dict[str, str], given: dict[str, Any], where: str) -> None:
    for key in PRECISION_KEYS:
        if key not in given or given[key] is None:
            continue
        value = given[key]
        if key in ("torch_dtype", "dtype"):
            value = _precision_of(value, key, where)
        elif key == "bf16":
            if not isinstance(value, bool):
                raise InputError(f"{where}: bf16: got {json.dumps(value)}, expected true or false")
            if value is False and "precision" in ours:
                continue  # no autocast; the weights' own precision stands
            value = "bfloat16" if value else "float32"
        if value is not None:
            _put(ours, spelled, "precision", value, (key, given), where)


def _precision_of(value: Any, key: str, where: str) -> str | None:
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain in ("float16", "fp16", "half"):
        raise InputError(f"{where}: {key}: {json.dumps(value)} is not supported: {REFUSED['fp16'][1]}")
    if plain not in _PRECISIONS:
        raise InputError(f"{where}: {key}: got {json.dumps(value)}, expected bfloat16 or float32")
    return _PRECISIONS[plain]


def _translate_values(ours: dict[str, Any]) -> None:
    """Values of the research code with the same meaning under another spelling."""
    if ours.get("attn_implementation") == "eager":
        ours["attn_implementation"] = "sdpa"  # the same function, computed in one piece
    if ours.get("report_to") == "all":
        ours["report_to"] = ["wandb", "tensorboard"]
    if ours.get("report_to") in ([], None) and "report_to" in ours:
        ours["report_to"] = "none"
    for key in ("eval_steps", "save_steps"):
        if key in ours and ours[key] is None:
            del ours[key]
    if ours.get("warmup_ratio") == 0:
        ours["warmup_ratio"] = None  # as in Hugging Face warmup_steps counts, whose default there is 0
        ours.setdefault("warmup_steps", 0)
    if ours.get("save_total_limit") == 0:
        ours["save_total_limit"] = None
