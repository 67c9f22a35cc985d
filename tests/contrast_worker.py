"""One rank of tests/test_contrast_engine.py: Stage II under DeepSpeed, every cut and ZeRO stage; findings as JSON.

Started as: torchrun --nproc-per-node N tests/contrast_worker.py MODEL GUIDE DATA OUT quick|whole
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from test_contrast import naive
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, read_contract
from anchor_cli.data.batches import BatchPlan
from anchor_cli.data.contrast_rows import ContrastData, StepTexts
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.model.backbone import load_backbone
from anchor_cli.processes.ranks import Ranks
from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed import build_engine, quiet_deepspeed, start_processes
from anchor_cli.train.stages.contrast import Contrast, ContrastResult, contrast_rows, settings_of

ROWS, LEARNING_RATE = 12, 1e-3
MANY_TOKENS = 10**6  # one micro-batch a rank: the first encoding is the graph
EVERYTHING: dict[str, Any] = {
    "negatives_group_size": 5,
    "in_batch_negatives": "same_language",
    "hardness_strength": 5.0,
    "matryoshka_dims": [32, 16],
    "kd_weight": 0.5,
}
ABSOLUTE = {"margin_strategy": "absolute", "margin": -0.1, "hardness_mode": "explicit_negatives"}
GUIDED = {"margin_strategy": "relative", "margin": 0.1, "hardness_mode": "all_negatives"}
KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "absolute margin": {**EVERYTHING, **ABSOLUTE},
    "relative margin, another guide": {**EVERYTHING, **GUIDED},
}


def embed(folder: Path, texts: list[Any]) -> tuple[PreTrainedModel, torch.Tensor]:
    """transformers' own model, and its (U, D) float64 embeddings of token ids, one text at a time, with a graph."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").train()
    return theirs, torch.stack([theirs.model(torch.as_tensor(ids).long()[None])[0][0, -1] for ids in texts])


def guide_ids(folder: Path, rows: list[dict[str, Any]], texts: StepTexts) -> list[list[int]]:
    """The step's texts under the guide's own contract: the paper's template and instructions by language."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    instructions = {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}
    ids = []
    for row, place in texts.places:
        documents = [rows[row]["positive"], *rows[row]["negatives"]]
        query = f"{instructions[rows[row]['language']]}; {rows[row]['anchor']}"
        content = query if place == 0 else documents[place - 1]
        ids.append(tokenizer.encode(f"<|im_start|>user\n{content.strip()}<|im_end|>").ids)
    return ids


def reference(
    model: Path, guide: Path | None, rows: list[dict[str, Any]], texts: StepTexts, spec: RunSpec
) -> tuple[float, dict[str, torch.Tensor]]:
    """Float64, the whole graph: (loss, gradients)."""
    theirs, embeddings = embed(model, texts.ids)
    sides = texts.queries, texts.documents
    judged = None
    if guide:
        with torch.no_grad():
            judged = tuple(embed(guide, guide_ids(guide, rows, texts))[1][side] for side in sides)
    loss = naive(*(embeddings[side] for side in sides), contrast_rows(texts), settings_of(spec), judged)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}


def plan_of(objective: Contrast, spec: RunSpec, token_budget: int, ranks: Ranks) -> BatchPlan:
    """One step of all rows."""
    world = {"world_size": ranks.world_size, "seed": spec.seed}
    return objective.plan(global_batch_size=ROWS, token_budget=token_budget, total_steps=1, **world)


def update_with(
    objective: Contrast, model: Path, spec: RunSpec, stage: int, budget: int, ranks: Ranks
) -> tuple[ContrastResult, dict[str, torch.Tensor], int]:
    """(loss and counts, gradients, micro-batches a rank) of one update."""
    from deepspeed.utils import safe_get_full_grad

    plan = plan_of(objective, spec, budget, ranks)
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
    return result, gradients, plan.num_micro_batches


def distance(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """L2 distance of the whole gradient over its norm."""
    total = torch.stack([(got[n].double() - want[n]).norm() for n in want]).norm()
    return float(total / torch.stack([want[n].norm() for n in want]).norm())


def main() -> None:
    model, guide, data, out = (Path(argument) for argument in sys.argv[1:5])
    whole = sys.argv[5] == "whole"  # else one temperature, and ZeRO-1 and 3 in one cut
    ranks = start_processes()
    with quiet_deepspeed():
        pass
    pairs, contract = PreparedPairs.open(data), read_contract(data)
    rows = [json.loads(line) for line in (data.parent / "rows.jsonl").read_text().splitlines()]
    longest = ContrastData(pairs).longest_text
    cuts = []
    for name, keys in KEYS.items():
        judge = guide if "guide" in name else None
        for temperature in (0.05, 0.01) if whole else (0.05 if name == "plain" else 0.01,):
            values = {"model_name_or_path": str(model), "dataset_file_path": str(data), "stage": "II", **keys}
            values |= {"temperature": temperature, "guide_model_name_or_path": judge and str(judge)}
            spec = RunSpec.model_validate({**values, "precision": "float32"})
            objective = Contrast(spec, contract, pairs, ranks)
            plan = plan_of(objective, spec, MANY_TOKENS, ranks)
            want_loss, want = reference(model, judge, rows, objective.feed(plan).step(0).texts, spec)
            for stage in (1, 2, 3):
                for budget in (MANY_TOKENS, 4 * longest, longest) if whole or stage == 2 else (4 * longest,):
                    result, got, count = update_with(objective, model, spec, stage, budget, ranks)
                    facts = {"keys": name, "temperature": temperature, "stage": stage, "micro_batches": count}
                    facts |= {"loss": float(result.loss), "want": want_loss, **result.counts.metrics()}
                    cuts.append({**facts, "gradient": distance(got, want)})
    if ranks.rank == 0:
        out.write_text(json.dumps(cuts))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
