"""One rank of tests/test_contrast_engine.py: Stage II under DeepSpeed, every cut and ZeRO stage; findings as JSON.

Started as: torchrun --nproc-per-node N tests/contrast_worker.py MODEL DATA OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_contrast import naive
from transformers import AutoModelForCausalLM

from anchor_cli.base.contract import read_contract
from anchor_cli.data.contrast_rows import ContrastData, StepTexts
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.model.backbone import load_backbone
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed import build_engine, quiet_deepspeed, start_processes
from anchor_cli.train.stages.contrast import Contrast, contrast_rows, settings_of

ROWS, LEARNING_RATE = 12, 1e-3
MANY_TOKENS = 10**6  # one micro-batch a rank: the first encoding is the graph
KEYS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.05},
    "all": {
        "temperature": 0.05,
        "negatives_group_size": 5,
        "hardness_mode": "explicit_negatives",
        "hardness_strength": 5.0,
        "margin_strategy": "absolute",
        "margin": -0.1,
        "matryoshka_dims": [32, 16],
        "kd_weight": 0.5,
    },
    "sharp": {"temperature": 0.01},
}


def reference(model: Path, texts: StepTexts, spec: RunSpec) -> tuple[float, dict[str, torch.Tensor]]:
    """Float64, transformers' own model, one text at a time, the whole graph: (loss, gradients)."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="sdpa").train()
    embeddings = torch.stack([theirs.model(torch.from_numpy(ids).long()[None])[0][0, -1] for ids in texts.ids])
    loss = naive(embeddings[texts.queries], embeddings[texts.documents], contrast_rows(texts), settings_of(spec))
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}


def update_with(
    objective: Contrast, model: Path, spec: RunSpec, stage: int, budget: int, ranks: Ranks
) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, gradients, micro-batches a rank) of one update."""
    from deepspeed.utils import safe_get_full_grad

    plan = objective.plan(ROWS, budget, 1)
    raw = load_ds_config("zero2_fp32", ".")
    raw["zero_optimization"]["stage"] = stage
    config = resolve_ds_config(
        raw, spec, gradient_accumulation_steps=plan.num_micro_batches, micro_batch_size=1, world_size=ranks.world_size
    )
    module = objective.module(load_backbone(model, dtype=torch.float32), "sdpa", "eos_token").train()
    engine, _ = build_engine(module, spec, config, ranks.device)
    named = dict(engine.module.language_model.named_parameters())
    gradients: dict[str, torch.Tensor] = {}
    update = engine.step

    def look_then_update() -> None:  # accumulated gradients can be seen right before the update
        if engine.is_gradient_accumulation_boundary():
            gradients.update({n: safe_get_full_grad(p).clone() for n, p in named.items()})
        update()

    engine.step = look_then_update
    result = objective.update(engine, objective.feed(plan).step(0), LEARNING_RATE)
    return float(result.loss), gradients, plan.num_micro_batches


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """L2 distance of the whole gradient over its norm."""
    total = torch.stack([(got[n].double() - want[n]).norm() for n in want]).norm()
    return float(total / torch.stack([want[n].norm() for n in want]).norm())


def main() -> None:
    model, data, out = (Path(argument) for argument in sys.argv[1:4])
    ranks = start_processes()
    with quiet_deepspeed():
        pass
    pairs, contract = PreparedPairs.open(data), read_contract(data)
    longest = ContrastData(pairs).longest_text
    found = []
    for name, keys in KEYS.items():
        values = {"model_name_or_path": str(model), "dataset_file_path": str(data), "stage": "II", **keys}
        spec = RunSpec.model_validate({**values, "precision": "float32"})
        objective = Contrast(spec, contract, pairs, ranks)
        plan = objective.plan(ROWS, MANY_TOKENS, 1)
        want_loss, want = reference(model, objective.feed(plan).step(0).texts, spec)
        for stage in (1, 2, 3) if name == "plain" else (2,):
            for budget in (MANY_TOKENS, 4 * longest, longest):
                loss, got, count = update_with(objective, model, spec, stage, budget, ranks)
                facts = {"keys": name, "stage": stage, "micro_batches": count, "loss": loss, "want": want_loss}
                found.append({**facts, "gradient": distance(got, want)})
    if ranks.rank == 0:
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
