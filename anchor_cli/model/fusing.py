"""How the small operators of a layer are fused on CUDA: by torch.compile, else by Liger, else not at all, said aloud.

Counted for Qwen3-0.6B and a micro-batch of 16,384 tokens (benchmarks/step_traffic.py): norms,
rotation, SwiGLU and sums move 875 GB in 8,017 launches as transformers' layers have them, 158 GB with Liger,
121 GB in 1,011 launches compiled and with our kernel for queries and keys.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from transformers import PreTrainedModel

from anchor_cli.base.console import warn
from anchor_cli.model.backbone import CAN_PRUNE, apply_liger, compile_layers
from anchor_cli.model.liger import decide_liger
from anchor_cli.model.output_layer import kernel_works
from anchor_cli.model.pooling import prune_last_layer

Fusing = Literal["torch_compile", "liger", "none"]


def decide_fusing(
    torch_compile: bool | Literal["auto"],
    liger: bool | Literal["auto"],
    model: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    split_weights: bool = False,
) -> tuple[bool, bool]:
    """(torch.compile, Liger) of this run, before a model is loaded. `auto` takes one of the two on CUDA, none on a CPU.

    torch.compile is the first choice by the counts above, where a trial shows that Triton kernels can be built here.
    `split_weights`: ZeRO-3, which gathers weights by hooks of the modules that use them; only modules that stay
    whole are fused then, so not by torch.compile unless asked for.

    Raises:
        InputError: `liger: true`, and it cannot.
    """
    on_cuda = device.type == "cuda"
    compiled = torch_compile is True
    if torch_compile == "auto" and on_cuda and liger is not True and not split_weights:
        compiled = kernel_works(device, dtype)
    use_liger = decide_liger(False if compiled and liger == "auto" else liger, model, device)
    if on_cuda and not compiled and not use_liger:
        warn(
            "neither torch.compile nor Liger fuses the layers here: norms, rotation and SwiGLU move about 7 times the"
            " memory, and a step takes about twice as long (anchor doctor says what is missing)"
        )
    return compiled, use_liger


def fuse(
    model: PreTrainedModel,
    compiled: bool,
    liger: bool,
    device: torch.device,
    dtype: torch.dtype,
    *,
    split_weights: bool = False,
    backend: str = "inductor",
    selective: bool = False,
) -> bool:
    """Apply what was decided, our kernel for queries and keys where it runs, and the pruned last layer.

    True where Liger was applied.
    """
    applied = liger and apply_liger(model)
    if device.type == "cuda" and not split_weights and importlib.util.find_spec("triton") is not None:
        from anchor_cli.model.rotary_kernel import fuse_queries_and_keys, works

        if works(device, dtype):
            fuse_queries_and_keys(model)
    if not split_weights:
        prune(model, device)
    if compiled:
        compile_layers(model, backend, selective)
    return applied


def prune(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the last layer in pooled rows only, on CUDA, where the model's class was found to give the same.

    Not on a CPU: products of fewer rows round otherwise, and a run there repeats bit for bit what older versions gave.
    """
    if device.type == "cuda" and getattr(model, CAN_PRUNE, False):
        prune_last_layer(model)
