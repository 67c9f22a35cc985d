"""The stock transformers language model, loaded with our packed attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from anchor_cli.base.errors import InputError
from anchor_cli.model.attention import PACKED_ATTENTION, register

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

    Gradient checkpointing is non-reentrant: with DeepSpeed ZeRO-2 and a backbone used twice a step the reentrant kind
    gives wrong gradients (measured, deepspeed 0.19.8).

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
    try:
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
    _refuse_other_attention(model, source, max_seq_length, reconstructs)
    model.config.use_cache = False
    # A config that names a pad token (often [EOS]) makes stock models drop the gradient of its embedding row. There
    # is no padding here, and [EOS] must learn.
    model.get_input_embeddings().padding_idx = None  # type: ignore[assignment]
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


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


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Regional `torch.compile`: each decoder layer by itself, sizes dynamic, attention left out (model/attention.py).

    All layers and all batches share the same few graphs (counted: tests/test_compile.py). A layer that is checkpointed
    is compiled child by child, because its own `forward` hands over to the checkpoint, which dynamo does not trace.
    """
    for layer in model.get_decoder().layers:
        for region in layer.children() if getattr(layer, "gradient_checkpointing", False) else (layer,):
            region.compile(dynamic=True, backend=backend)


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


def _refuse_other_attention(
    model: PreTrainedModel, source: str, max_seq_length: int | None, reconstructs: bool
) -> None:
    """A model whose numbers would be wrong, because packed attention is plain, causal and of full reach."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    strange = sorted(kinds - {"full_attention", "sliding_attention"})
    found = None
    if getattr(config, "attn_logit_softcapping", None):
        found = "soft-capped attention scores (attn_logit_softcapping)"
    elif reconstructs and getattr(config, "final_logit_softcapping", None):
        found = "soft-capped logits (final_logit_softcapping)"
    elif any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        found = "attention sinks"
    elif strange:
        found = f"layers of {strange[0]}"
    elif getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False:
        found = "attention in both directions"
    if found:
        raise InputError(
            f"model_name_or_path: {source!r} ({config.model_type}) has {found}, which anchor does not compute",
            hint="take a model with plain causal attention, such as Qwen3, Qwen2, Llama or Mistral",
        )
    window = getattr(config, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    if window and max_seq_length and max_seq_length > window:
        raise InputError(
            f"max_seq_length: {max_seq_length}, but {source!r} attends over a sliding window of {window} tokens only",
            hint=f"set max_seq_length to {window} or less, or take a model without a sliding window",
        )
