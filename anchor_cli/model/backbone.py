"""The stock transformers language model, loaded with our packed attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from anchor_cli.base.errors import InputError
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent
from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.exactness import Trial, logit_scale, packing_problem, try_configuration
from anchor_cli.model.reconstruction import LOGIT_SCALE

_PLAIN = "take a model with plain causal attention, such as Qwen3, Qwen2, Llama or Mistral"
CAN_PRUNE = "anchor_can_prune"
"""Attribute of a loaded language model: whether its last layer gives the same in pooled rows only."""
_LIGER_MODELS = ("qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3_text")


def load_backbone(
    folder_or_id: str | Path,
    *,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    max_seq_length: int | None = None,
    reconstructs: bool = False,
) -> PreTrainedModel:
    """A causal language model (`Qwen3ForCausalLM` or any other decoder of transformers) on the CPU.

    Args:
        max_seq_length: tokens of the longest text to come, where that is known.
        reconstructs: the output layer is used, too, and its weights must be there.
    Raises:
        InputError: the folder is missing or not a model, lacks weights, or the Hub could not be reached; attention of a
            kind that `model/attention.py` does not compute.
    """
    register()
    transformers_logging.disable_progress_bar()
    source = str(folder_or_id)
    _refuse_pickled_weights(source)
    if not Path(source).exists():
        go_offline_if_the_hub_is_silent()
    try:
        config = AutoConfig.from_pretrained(source)
        trial = refuse_configuration(config, source, max_seq_length=max_seq_length, reconstructs=reconstructs)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = "give a folder with config.json and model.safetensors, or a Hub id that this host can reach"
        if isinstance(error, RuntimeError | SafetensorError):  # cut short, or of other sizes than the config says
            hint = "copy or download it again: config.json and the weights do not fit together, or a file is damaged"
        raise InputError(
            f"model_name_or_path: {source!r} could not be loaded as a causal language model: {reason}", hint=hint
        ) from error
    model: PreTrainedModel
    model, info = loaded
    _refuse_missing_weights(model, info["missing_keys"], source, reconstructs)
    _refuse_other_results(model, source, reconstructs, trial)
    setattr(model, CAN_PRUNE, trial.prunes)
    model.config.use_cache = False
    # A config that names a pad token (often [EOS]) makes stock models drop the gradient of its embedding row. There
    # is no padding here, and [EOS] must learn.
    model.get_input_embeddings().padding_idx = None  # type: ignore[assignment]
    if gradient_checkpointing:
        checkpoint_activations(model)
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass. Without dropout nothing random is recomputed, so no state is kept.

    Non-reentrant: with DeepSpeed ZeRO-2 and a backbone used twice a step the reentrant kind gives wrong gradients
    (measured, deepspeed 0.19.8).
    """
    draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    draws |= any("drop" in name and value for name, value in model.config.to_dict().items())
    options = {"use_reentrant": False, "preserve_rng_state": draws}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.20 renamed it
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def apply_liger(model: PreTrainedModel) -> bool:
    """Replace RMSNorm, RoPE and SwiGLU by Liger's Triton kernels, if liger-kernel knows this model. True if done.

    The loss stays ours (`output_layer`): it needs a weight for each target. CUDA only; unmeasured here.
    """
    apply = _liger()
    if apply is None or model.config.model_type not in _LIGER_MODELS:
        return False
    apply(model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
    return True


def liger_fits(folder_or_id: str | Path) -> bool:
    """Whether `apply_liger` will do anything for this model, told from its config, before it is loaded."""
    if _liger() is None:
        return False
    try:
        config, _ = PretrainedConfig.get_config_dict(str(folder_or_id))
    except OSError:
        return False
    return config.get("model_type") in _LIGER_MODELS


def _liger() -> Callable[..., None] | None:
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return None
    apply: Callable[..., None] = _apply_liger_kernel_to_instance
    return apply


def compile_layers(model: PreTrainedModel, backend: str = "inductor", selective: bool = False) -> None:
    """Regional `torch.compile`: each decoder layer and the final norm by itself, attention left out (attention.py).

    Only the number of tokens is dynamic: the first pass of the first step compiles for its number, the second pass, one
    token a text shorter, makes it a symbol, and the widths stay constants. All layers and all batches share the same
    few graphs from then on (counted: tests/test_compile.py). A layer that is checkpointed is compiled child by child,
    because its own `forward` hands over to the checkpoint, which dynamo does not trace.

    `selective`: the backward pass makes the MLP's normed input and the product of its halves again. That is all that
    torch's partitioner keeps although it costs no matrix product: attention's normed input crosses two graphs. Its
    `activation_memory_budget` is no way to it: from 0.9 down to 0.7 the projection of keys is recomputed (counted).
    """
    from torch._dynamo import config as dynamo
    from torch._functorch import config as partitioner

    # training and evaluation, static and dynamic lengths, whole and pruned: 8 variants of a function, torch's limit
    dynamo.recompile_limit = max(dynamo.recompile_limit, 16)
    if selective:
        partitioner.ban_recompute_materialized_backward = False
    decoder = model.get_decoder()
    decoder.norm.compile(backend=backend)
    for layer in decoder.layers:
        for region in layer.children() if getattr(layer, "gradient_checkpointing", False) else (layer,):
            region.compile(backend=backend)


def _refuse_pickled_weights(source: str) -> None:
    """A local folder that has only pickled weights is refused: nothing anchor loads is ever unpickled."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: has only pickled weights (*.bin); anchor loads safetensors only",
            hint="convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)",
        )


def _refuse_missing_weights(model: PreTrainedModel, missing: set[str], source: str, reconstructs: bool) -> None:
    """What a folder lacks transformers fills with random numbers. An output layer that is tied, or unused, may lack."""
    head = model.get_output_embeddings()
    may_lack = head is not None and (not reconstructs or head.weight is model.get_input_embeddings().weight)
    heads = tuple(f"{name}." for name, module in model.named_modules() if module is head) if may_lack else ()
    lacking = sorted(name for name in missing if not name.startswith(heads))
    if lacking:
        shown = ", ".join(lacking[:3]) + (", …" if len(lacking) > 3 else "")
        raise InputError(
            f"model_name_or_path: {source!r} lacks {len(lacking)} of the model's weights: {shown}",
            hint="copy or download it again: every file that model.safetensors.index.json names must be there",
        )


def refuse_configuration(
    config: PretrainedConfig, source: str, *, max_seq_length: int | None = None, reconstructs: bool = False
) -> Trial:
    """Refuse, before any weights are read, a model whose numbers would be wrong here.

    Packed attention is plain, causal and of full reach, and the loss takes hidden states times the output matrix.
    What a configuration says of it is looked at first; a small model of it shows the rest (model/exactness.py).

    Raises:
        InputError: which part of the model anchor does not compute.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    part = None
    if getattr(text, "attn_logit_softcapping", None):
        part = "soft-capped attention scores (attn_logit_softcapping)"
    elif reconstructs and getattr(text, "final_logit_softcapping", None):
        part = "soft-capped logits (final_logit_softcapping)"
    elif strange:
        part = f"layers of {strange[0]}"
    elif getattr(text, "use_bidirectional_attention", None) or getattr(text, "is_causal", None) is False:
        part = "attention in both directions"
    if part:
        raise _not_computed(config, source, part)
    _refuse_long_texts(text, source, kinds, max_seq_length)
    trial = try_configuration(config)
    if trial.packing_problem:
        raise _not_packable(config, source, trial.packing_problem)
    if reconstructs and trial.output_problem:
        raise _not_computed(config, source, trial.output_problem)
    return trial


def _refuse_long_texts(config: PretrainedConfig, source: str, kinds: set[str], max_seq_length: int | None) -> None:
    """Texts beyond a sliding window, or so long that rotary frequencies would depend on the longest text of a pack."""
    window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    if window and max_seq_length and max_seq_length > window:
        raise InputError(
            f"max_seq_length: {max_seq_length}, but {source!r} attends over a sliding window of {window} tokens only",
            hint=f"set max_seq_length to {window} or less, or take a model without a sliding window",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return
    limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    if limit and max_seq_length and max_seq_length > limit:
        raise InputError(
            f"max_seq_length: {max_seq_length}, but {source!r} ({rope['rope_type']} rotary embeddings) encodes texts "
            f"of more than {limit} tokens otherwise, and whatever is packed beside them",
            hint=f"set max_seq_length to {limit} or less",
        )


def _refuse_other_results(model: PreTrainedModel, source: str, reconstructs: bool, trial: Trial) -> None:
    """What only the loaded model shows: sinks, its output layer, and packing where no small model could be tried."""
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        raise _not_computed(model.config, source, "attention sinks")
    if not trial.was_tried and (problem := packing_problem(model)):
        raise _not_packable(model.config, source, problem)
    if reconstructs:
        try:
            setattr(model, LOGIT_SCALE, logit_scale(model))
        except InputError as error:
            raise _not_computed(model.config, source, error.message) from error


def _not_computed(config: PretrainedConfig, source: str, part: str) -> InputError:
    return InputError(
        f"model_name_or_path: {source!r} ({config.model_type}) has {part}, which anchor does not compute", hint=_PLAIN
    )


def _not_packable(config: PretrainedConfig, source: str, problem: str) -> InputError:
    return InputError(
        f"model_name_or_path: {source!r} ({config.model_type}) cannot be run without padding: {problem}", hint=_PLAIN
    )


def refuse_dropout(config: Any, model: str) -> None:
    """Dropout would make the loss depend on how a step is cut, and a run not repeatable; Stage II encodes a text twice.

    Raises:
        InputError: names the key of config.json.
    """
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, int | float) and value > 0:
            raise InputError(
                f"{model}: its config.json has {key} {value:g}: with dropout no loss can be exact, nor a run continued",
                f"set {key} to 0 there",
            )
