"""`anchor plan --probe`: the heaviest micro-batch, twice, on the real device, with random weights where none are here.

Measures what the arithmetic cannot: the peak of memory and the seconds of a forward and backward pass. The optimizer is
not run; its state's bytes (of this rank's shard) are added, since they are known exactly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from anchor_cli.base.errors import InputError, first_line
from anchor_cli.model.attention import PACKED_ATTENTION, choose_kernel, register
from anchor_cli.model.backbone import checkpoint_activations, load_backbone
from anchor_cli.model.fusing import decide_fusing, fuse
from anchor_cli.model.packed import PairBatch, pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.inputs import config_of
from anchor_cli.plan.result import Estimate
from anchor_cli.processes.gpus import on_gpu
from anchor_cli.spec.spec import RunSpec


@dataclass(frozen=True)
class Probe:
    """One measured micro-batch. `peak_bytes`: on a GPU, allocated at the peak, optimizer included; None on a CPU."""

    device: str
    kernel: str
    tokens: int
    seconds: float
    tokens_per_s: float
    peak_bytes: float | None


def probe(spec: RunSpec, shape: ModelShape, made: Estimate) -> Probe:
    """Run the longest packed micro-batch for two passes; the second is timed."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    kernel = choose_kernel(spec.attn_implementation, device, dtype)
    backbone = _backbone(spec, dtype, made.cut.gradient_checkpointing)
    if device.type == "cuda":
        fusing = decide_fusing(spec.torch_compile, spec.liger, spec.model_name_or_path, device, dtype)
        fuse(backbone, *fusing, device, dtype, selective=made.cut.selective)
        torch.cuda.reset_peak_memory_stats()
    model = ReconstructionModel(backbone, kernel=kernel).train().to(device)
    batch = _heaviest(spec, shape, made).to(device)
    seconds = 0.0
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        model(batch, 1e-3, 1e-3).loss.backward()
        _wait(device)
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    tokens = int(batch.texts.cu_seqlens[-1])
    peak = None
    if device.type == "cuda":
        states = made.memory.optimizer + made.memory.gradients + made.memory.buckets if made.memory else 0
        peak = torch.cuda.max_memory_allocated() + states
    return Probe(str(device), kernel, tokens, seconds, tokens / seconds, peak)


def _backbone(spec: RunSpec, dtype: torch.dtype, checkpointing: bool) -> PreTrainedModel:
    """The spec's model if its weights are here, else a random one of the same config: weights change no timing."""
    folder = Path(spec.model_name_or_path).expanduser()
    if any(folder.glob("*.safetensors")):
        return load_backbone(folder, dtype=dtype, gradient_checkpointing=checkpointing)
    register()
    values, where = config_of(spec.model_name_or_path)
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values | {"use_cache": False})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=PACKED_ATTENTION, dtype=dtype
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{where}: no causal language model that transformers knows: {first_line(error)}") from error
    if checkpointing:
        checkpoint_activations(model)
    return model


def _heaviest(spec: RunSpec, shape: ModelShape, made: Estimate) -> PairBatch:
    """Pairs of the longest row's length up to the heaviest micro-batch's tokens: random ids, the plan's worst."""
    longest = made.tokens.longest_row
    query = min(round(made.tokens.mean_query), longest // 2)
    count = max(1, made.cut.heaviest_tokens // longest)
    ids = np.random.default_rng(0)
    queries = [ids.integers(0, shape.vocab_size, query, dtype=np.int32) for _ in range(count)]
    documents = [ids.integers(0, shape.vocab_size, longest - query, dtype=np.int32) for _ in range(count)]
    starts = np.zeros(count, dtype=np.int32)
    return pack_pairs(queries, documents, starts, starts, eos_token_id=-1, targets="text")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
