"""One rank of a doctor's question: `python -m anchor_cli.doctor.worker TASK ANSWER.json [key=value …]`.

Rank, world size and rendezvous come from the environment, as under torchrun. Rank 0 writes the answer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from anchor_cli.model.packed import PairBatch
    from anchor_cli.model.reconstruction import ReconstructionModel
    from anchor_cli.processes.ranks import Ranks

NUM_MICRO_BATCHES = 3
PAIRS_PER_MICRO_BATCH = 4
EOS_ID, VOCABULARY = 299, 300
ALLOWED = {"bfloat16": 2e-2, "float32": 1e-5}
"""Largest relative error of one parameter's gradient. bf16 keeps 8 bits and DeepSpeed scales the loss by a number that
is not always a power of two, so roundings differ (2^-8 = 4e-3 each); fp32 keeps 24 bits (6e-8)."""


def all_reduce(_: dict[str, str]) -> dict[str, Any]:
    """Sum rank + 1 over all ranks, then time a larger sum. `gb_s` is NCCL's bus bandwidth, 2 (n - 1) / n bytes/s."""
    cuda = torch.cuda.is_available()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend)
    small = torch.full((1000,), float(rank + 1), device=device)
    dist.all_reduce(small)
    want = world_size * (world_size + 1) / 2
    num_bytes = (256 if cuda else 8) << 20
    large = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(large)
    rounds = 5
    _wait_for(device)
    start = time.perf_counter()
    for _round in range(rounds):
        dist.all_reduce(large)
    _wait_for(device)
    seconds = (time.perf_counter() - start) / rounds
    dist.destroy_process_group()
    return {
        "backend": backend,
        "right": bool((small == want).all().item()),
        "gb_s": 2 * (world_size - 1) / max(world_size, 1) * num_bytes / seconds / 1e9,
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gradients(arguments: dict[str, str]) -> dict[str, Any]:
    """Gradients that DeepSpeed has accumulated just before its step, against one plain backward of the whole step.

    The step has `NUM_MICRO_BATCHES` micro-batches of mixed lengths on each rank; the reference is the same small
    model in the same precision, in this process alone, its gradients summed in float32 over all ranks' micro-batches.
    """
    from anchor_cli.model.attention import choose_kernel
    from anchor_cli.model.reconstruction import target_scales
    from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.deepspeed import build_engine, start_processes

    ranks = start_processes(timeout_s=240.0)
    name = arguments.get("config", "zero2_bf16")
    raw = load_ds_config(name, Path.cwd())
    precision: Literal["bfloat16", "float32"] = "bfloat16" if raw.get("bf16", {}).get("enabled") else "float32"
    spec = RunSpec(
        model_name_or_path="-",
        dataset_file_path="-",
        precision=precision,
        deepspeed=name,
        max_grad_norm=0.0,
        per_device_train_batch_size=PAIRS_PER_MICRO_BATCH,
        gradient_accumulation_steps=NUM_MICRO_BATCHES,
    )
    config = resolve_ds_config(
        raw, spec, gradient_accumulation_steps=NUM_MICRO_BATCHES, micro_batch_size=1, world_size=ranks.world_size
    )
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    batches = [_batch(seed) for seed in range(ranks.world_size * NUM_MICRO_BATCHES)]
    mine = batches[ranks.rank :: ranks.world_size]
    kernel = choose_kernel("auto", ranks.device, dtype)
    model = _model(dtype, kernel)
    engine, _ = build_engine(model, spec, config, ranks.device)
    queries = sum(batch.num_query_targets for batch in batches)
    documents = sum(len(batch.target_ids) for batch in batches) - queries
    scale = target_scales(spec.d2q_weight, spec.q2d_weight, queries, documents)
    undo = engine.world_size * engine.gradient_accumulation_steps()
    for index, batch in enumerate(mine):
        engine.backward(engine(batch.to(ranks.device), *scale).loss * undo)
        if index < len(mine) - 1:  # the last one's step would consume the gradients
            engine.step()
    ours = _accumulated(engine, model)
    return {**_compare(ours, batches, scale, dtype, kernel, ranks), "config": name, "allowed": ALLOWED[precision]}


def _accumulated(engine: Any, model: ReconstructionModel) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    full = {}
    for name, parameter in model.named_parameters():
        gradient = safe_get_full_grad(parameter)
        if gradient is None:
            raise RuntimeError(f"DeepSpeed has no gradient for {name}")
        full[name] = gradient.detach().float().cpu()
    return full


def _compare(
    ours: dict[str, torch.Tensor],
    batches: list[PairBatch],
    scale: tuple[float, float],
    dtype: torch.dtype,
    kernel: str,
    ranks: Ranks,
) -> dict[str, Any]:
    reference = _model(dtype, kernel).to(ranks.device)
    want = {name: torch.zeros(p.shape, device=ranks.device) for name, p in reference.named_parameters()}
    for batch in batches:
        reference.zero_grad()
        reference(batch.to(ranks.device), *scale).loss.backward()
        for name, parameter in reference.named_parameters():
            assert parameter.grad is not None
            want[name] += parameter.grad.float()
    errors: dict[str, float] = {}
    for name, theirs in want.items():
        errors[name] = float((ours[name] - theirs.cpu()).norm() / theirs.norm().clamp_min(1e-12))
    worst = max(errors, key=errors.__getitem__)
    dist.barrier()
    return {"error": errors[worst], "worst": worst, "micro_batches": NUM_MICRO_BATCHES, "ranks": ranks.world_size}


def _model(dtype: torch.dtype, kernel: str) -> ReconstructionModel:
    """Two layers of Qwen3 with random weights, the same in every process and precision (rounded to `dtype`)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from anchor_cli.model.attention import PACKED_ATTENTION, register
    from anchor_cli.model.reconstruction import ReconstructionModel

    register()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    config._attn_implementation = PACKED_ATTENTION
    language_model = Qwen3ForCausalLM(config)
    for parameter in language_model.parameters():
        parameter.data = parameter.data.to(dtype)
    return ReconstructionModel(language_model, kernel=kernel).train()


def _batch(seed: int) -> PairBatch:
    from anchor_cli.model.packed import pack_pairs

    rng = np.random.default_rng(seed)

    def texts(longest: int) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
        lengths = rng.integers(4, longest, PAIRS_PER_MICRO_BATCH)
        return [np.append(rng.integers(0, EOS_ID, n), EOS_ID).astype(np.int32) for n in lengths]

    starts = np.ones(PAIRS_PER_MICRO_BATCH, dtype=np.int32)
    return pack_pairs(texts(12), texts(40), starts, starts, eos_token_id=EOS_ID, targets="text")


def main() -> None:
    """Entry point of a rank."""
    task, answer, *pairs = sys.argv[1:]
    arguments = dict(pair.split("=", 1) for pair in pairs)
    result = {"all_reduce": all_reduce, "gradients": gradients}[task](arguments)
    if os.environ["RANK"] == "0":
        Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
