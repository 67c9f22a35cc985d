"""One rank of tests/test_engine.py: DeepSpeed for real, 2 processes, every shipped config; findings as JSON.

Started as: torchrun --nproc-per-node 2 tests/engine_worker.py MODEL OUT
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.packed import PairBatch, pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed import NonFiniteGradient, build_engine, quiet_deepspeed, start_processes
from anchor_cli.train.stages.reconstruct import train_step

CONFIGS = ("zero2_fp32", "zero2_bf16", "zero1_bf16", "zero3_bf16", "zero2_offload_bf16")
BAD = {"zero2_fp32": math.nan, "zero2_bf16": math.nan, "zero1_bf16": math.inf, "zero3_bf16": math.nan,
       "zero2_offload_bf16": math.inf}  # fmt: skip
CUT = ((0, 2), (2, 6), (6, 7), (7, 12))  # rows of the four micro-batches: two a rank, of unlike size
LEARNING_RATES = (1e-3, 5e-4)


def pairs(vocabulary: int, eos: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    draw = lambda: np.append(rng.integers(3, vocabulary, rng.integers(5, 40)), eos).astype(np.int32)  # noqa: E731
    return [(draw(), draw()) for _ in range(12)]


def packed(rows: list[tuple[np.ndarray, np.ndarray]], eos: int) -> PairBatch:
    starts = np.full(len(rows), 3)
    return pack_pairs([q for q, _ in rows], [d for _, d in rows], starts, starts, eos_token_id=eos, targets="text")


def reference(model: Path, batch: PairBatch, d2q: float, q2d: float) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Single process, plain autograd, torch AdamW and clipping: (gradients of step 1, weights after each step)."""
    ours = ReconstructionModel(load_backbone(model, dtype=torch.float32), kernel="sdpa")
    optimizer = torch.optim.AdamW(ours.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    gradients: dict[str, torch.Tensor] = {}
    weights = []
    for rate in LEARNING_RATES:
        optimizer.zero_grad()
        ours(batch, d2q, q2d).loss.backward()
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in ours.language_model.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        weights.append({n: p.detach().clone() for n, p in ours.language_model.named_parameters()})
    return gradients, weights


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter."""
    return max(float((got[n].float() - want[n]).norm() / want[n].norm()) for n in want)


def train_with(config: str, model: Path, ranks: Ranks, rows: Any, eos: int) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    precision = "float32" if config.endswith("fp32") else "bfloat16"
    spec = RunSpec.model_validate(
        {"model_name_or_path": "m", "dataset_file_path": "d", "precision": precision, "deepspeed": config}
    )
    raw = load_ds_config(config, ".")
    resolved = resolve_ds_config(
        raw, spec, gradient_accumulation_steps=2, micro_batch_size=1, world_size=ranks.world_size
    )
    whole = packed(rows, eos)
    d2q, q2d = 0.8 / whole.num_query_targets, 0.2 / (len(whole.target_ids) - whole.num_query_targets)
    gradients, weights = reference(model, whole, d2q, q2d)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    engine, _ = build_engine(
        ReconstructionModel(load_backbone(model, dtype=dtype), kernel="sdpa").train(), spec, resolved, ranks.device
    )
    mine = [packed(rows[slice(*cut)], eos) for cut in CUT[2 * ranks.rank : 2 * ranks.rank + 2]]
    named = dict(engine.module.language_model.named_parameters())
    found: dict[str, Any] = {"optimizer": type(engine.optimizer).__name__, "weights": [], "losses": []}
    update = engine.step

    def look_then_update() -> None:  # accumulated gradients can be seen right before the update
        if engine.is_gradient_accumulation_boundary():
            found["gradient"] = distance({n: safe_get_full_grad(p).clone() for n, p in named.items()}, gradients)
        update()

    for step, rate in enumerate(LEARNING_RATES):
        engine.step = look_then_update if step == 0 else update
        result = train_step(engine, mine, d2q_scale=d2q, q2d_scale=q2d, learning_rate=rate)
        sums = torch.stack([result.d2q_sum, result.q2d_sum]).double()
        torch.distributed.all_reduce(sums)
        found["losses"].append(float(sums[0] * d2q + sums[1] * q2d))
        got = {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}
        found["weights"].append(distance(got, weights[step]))
    found["norm"] = float(engine.get_global_grad_norm())
    before = {n: safe_get_full_fp32_param(p).clone() for n, p in named.items()}
    bad = BAD[config] if ranks.rank == 1 else d2q  # one rank's gradient alone: both must refuse
    try:
        train_step(engine, mine, d2q_scale=bad, q2d_scale=q2d, learning_rate=1e-3)
        found["refused"] = False
    except NonFiniteGradient:
        found["refused"] = True
    found["unchanged"] = all(torch.equal(safe_get_full_fp32_param(p), before[n]) for n, p in named.items())
    return found


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    ranks = start_processes()
    with quiet_deepspeed():
        pass
    config = json.loads((model / "config.json").read_text())
    eos = config["eos_token_id"]
    rows = pairs(config["vocab_size"], eos)
    found = {config: train_with(config, model, ranks, rows, eos) for config in CONFIGS}
    if ranks.rank == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
