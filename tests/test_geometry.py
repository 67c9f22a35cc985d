"""The same spec gives the same losses on any number of processes and any token budget, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.harness import TRAIN_KEYS, fork_server, losses, tensors, write_spec, write_world

GEOMETRIES = {"1 process": (1, 1), "2 processes": (2, 1), "small": (1, 2), "smallest": (1, 4)}
"""Name -> (processes, budget: 1 for whole steps, 2 for about half of one, …)."""
COMPARED = [TRAIN_KEYS.index(key) for key in TRAIN_KEYS if key != "train/learning_rate"]


def train(folder: Path, model: Path, name: str, tokens_a_step: int, **changes: Any) -> Path:
    ranks, parts = GEOMETRIES[name.split("/")[0]]
    spec = {"experiment_id": name.replace(" ", "-").replace("/", "-")}
    spec |= {"max_tokens_per_micro_batch": tokens_a_step // parts}
    path = write_spec(folder, model, **spec, **changes)
    code, said = fork_server().run(["train", str(path)], folder, seconds=1500, ranks=ranks)
    assert code == 0, said
    return folder / "out" / spec["experiment_id"]


def assert_geometry_free(folder: Path, model: Path, tokens_a_step: int, **changes: Any) -> None:
    """20 steps of every geometry: losses and gradient norms, and the gradient of the first step, within 1e-5 of one
    process's. The norm is the one before clipping: a wrong factor on the whole gradient shows there alone."""
    common = {"max_steps": 20, "warmup_steps": 2, "eval_steps": 0, "save_steps": 0, **changes}
    runs = {name: train(folder, model, name, tokens_a_step, **common) for name in GEOMETRIES}
    cuts = set()
    for run in runs.values():
        state = json.loads((run / "checkpoint-20/training_state.json").read_text())
        cuts.add((state["world_size"], state["num_micro_batches"]))
    assert len(cuts) == len(GEOMETRIES), f"the steps were not cut differently: {cuts}"
    want = np.array(losses(runs["1 process"]))[:, COMPARED]
    assert len(want) == 20 and want[-1, 1] < want[0, 1]
    apart = {name: np.abs(np.array(losses(run))[:, COMPARED] / want - 1).max(axis=0) for name, run in runs.items()}
    print("largest relative difference (step, loss, d2q, q2d, gradient norm):", apart)
    assert max(each.max() for each in apart.values()) < 1e-5, apart

    # After one update Adam's first moment is (1 - 0.9) times the clipped gradient.
    common |= {"stop_after_n_steps": 1}
    first = {name: train(folder, model, f"{name}/first", tokens_a_step, **common) for name in GEOMETRIES}
    moments = {
        name: {key: value for key, value in tensors(run / "checkpoint-1").items() if key.endswith(".exp_avg")}
        for name, run in first.items()
    }
    apart = {name: relative_distance(found, moments["1 process"]) for name, found in moments.items()}
    print("relative distance of the first gradient:", apart)
    assert max(apart.values()) < 1e-5, apart


def relative_distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """|ours - theirs| / |theirs| of all tensors as one vector, in float64."""
    assert ours.keys() == theirs.keys() and len(ours) > 10
    difference = sum(float((ours[key].double() - theirs[key].double()).square().sum()) for key in ours)
    size = sum(float(theirs[key].double().square().sum()) for key in ours)
    assert size > 0
    return (difference / size) ** 0.5


def test_losses_and_gradients_do_not_depend_on_processes_or_token_budget(small_model: Path, tmp_path: Path) -> None:
    write_world(tmp_path)
    assert_geometry_free(tmp_path, small_model, 640)


@pytest.mark.slow
def test_nor_with_the_real_vocabulary_and_real_pairs(tiny_model: Path, shared_data: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    rows = load_from_disk(str(shared_data / "pairs/train_ko_en")).select(range(400))
    lines = [json.dumps({"anchor": row["anchor"], "positive": row["positive"]}, ensure_ascii=False) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert_geometry_free(tmp_path, tiny_model, 300, max_seq_length=32, global_batch_size=4)
