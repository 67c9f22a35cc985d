"""The stock transformers language model, loaded with our packed attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.words.errors import InputError


def load_backbone(
    folder_or_id: str | Path, *, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> PreTrainedModel:
    """A causal language model (`Qwen3ForCausalLM` or any other decoder of transformers) on the CPU.

    Gradient checkpointing is non-reentrant: with DeepSpeed ZeRO-2 and a backbone used twice a step the reentrant kind
    gives wrong gradients (measured, deepspeed 0.19.8).

    Raises:
        InputError: the folder is missing or not a model, or the Hub could not be reached.
    """
    register()
    transformers_logging.disable_progress_bar()
    source = str(folder_or_id)
    _refuse_pickled_weights(source)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=PACKED_ATTENTION, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"model_name_or_path: {source!r} could not be loaded as a causal language model: {reason}",
            hint="give a folder with config.json and model.safetensors, or a Hub id that this host can reach",
        ) from error
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
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        return False
    if model.config.model_type not in ("qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3_text"):
        return False
    _apply_liger_kernel_to_instance(
        model=model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )
    return True


def compile_layers(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Regional `torch.compile`: each decoder layer by itself, sizes dynamic, attention left out (model/attention.py).

    All layers and all batches share the same few graphs (counted: tests/test_compile.py). A layer that is checkpointed
    is compiled child by child, because its own `forward` hands over to the checkpoint, which dynamo does not trace.
    """
    for layer in model.get_decoder().layers:
        for region in layer.children() if getattr(layer, "gradient_checkpointing", False) else (layer,):
            region.compile(dynamic=True, backend=backend)


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a local model folder, without importing the model. Raises InputError."""
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a model configuration ({error})") from error
    return config


def _refuse_pickled_weights(source: str) -> None:
    """A local folder that has only pickled weights is refused: nothing anchor loads is ever unpickled."""
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise InputError(
            f"{folder}: has only pickled weights (*.bin); anchor loads safetensors only",
            hint="convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True)",
        )
