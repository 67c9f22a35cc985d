"""`anchor train` as a user runs it: raw rows in, 2 processes, ZeRO-2; what it logs is what a naive loop computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_objective_texts import Text, content_tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from anchor_cli.data.batches import epoch_order

NUM_ROWS, GLOBAL_BATCH, LENGTH = 50, 8, 64
INSTRUCTION = "주어진 질문에 대해 관련 문서를 검색하세요"


def run(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ANCHOR_HOME": str(home), "OMP_NUM_THREADS": "1", "WANDB_DISABLED": "true"}
    command = [sys.executable, "-m", "anchor_cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def rows() -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    words = "수달 강 바다 복지 급여 otter river sea benefit query document 문서 질문 apply 🦦 where".split()

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(2, longest)))

    return [(f"{i} {text(8)}", f"{i} {text(30)}") for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def trained(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of two processes on a raw .jsonl, with evaluation and two checkpoints."""
    folder = tmp_path_factory.mktemp("train")
    lines = [json.dumps({"anchor": q, "positive": d}, ensure_ascii=False) for q, d in rows()]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    beir = folder / "world"
    (beir / "qrels").mkdir(parents=True)
    for name, column in (("corpus", 1), ("queries", 0)):
        texts = [json.dumps({"_id": f"{name}{i}", "text": row[column]}) for i, row in enumerate(rows()[:12])]
        (beir / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    judged = [f"queries{i}\tcorpus{i}\t1" for i in range(12)]
    (beir / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    suite = {"sets": [{"name": "OfASuite", "source": "world", "language": "ko", "weight": 3}]}
    (folder / "suite.json").write_text(json.dumps(suite))
    spec = {
        "model_name_or_path": str(small_model), "dataset_file_path": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "out"), "experiment_id": "run", "max_seq_length": LENGTH,
        "precision": "float32", "deepspeed": "zero2_fp32", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 150, "max_steps": 4, "warmup_steps": 2,
        "learning_rate": 1e-3, "save_steps": 2, "eval_steps": 2, "do_train": True,
        "eval_data": [f"ko:{beir}", f"suite:{folder / 'suite.json'}"], "reconstruction_targets": "content",
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    done = run("train", str(folder / "spec.json"), "--nproc-per-node", "2", home=folder / "home")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "out/run/metrics.jsonl").read_text().splitlines()
    return {"folder": folder, "stderr": done.stderr, "metrics": [json.loads(line) for line in lines]}


def naive_text(tokenizer: AutoTokenizer, content: str, instruction: str | None) -> Text:
    head = f"{instruction}; " if instruction else ""
    start = len("<|im_start|>user\n")
    whole = f"<|im_start|>user\n{head}{content}<|im_end|>"
    ids, mask = content_tokens(tokenizer, whole, start + len(head), start + len(head) + len(content))
    return ([*ids[: LENGTH - 1], ids[-1]], [*mask[: LENGTH - 1], False]) if len(ids) > LENGTH else (ids, mask)


def naive_means(model: Path, batch: list[tuple[str, str]]) -> tuple[float, float]:
    """(D2Q, Q2D) of a step at the initial weights, one pair at a time through the stock model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="sdpa")
    losses: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for query, document in batch:
            sides = [naive_text(tokenizer, query, INSTRUCTION), naive_text(tokenizer, document, None)]
            e = [stock.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids, _ in sides]
            for side, (ids, mask) in enumerate(sides):
                inputs = torch.cat([e[1 - side][None], stock.model.embed_tokens(torch.tensor(ids[:-2]))])
                logits = stock.lm_head(stock.model(inputs_embeds=inputs[None]).last_hidden_state[0])
                targets = [k for k in range(len(ids) - 1) if mask[k]]
                losses[side].extend(F.cross_entropy(logits[k], torch.tensor(ids[k])).item() for k in targets)
    return float(np.mean(losses[0])), float(np.mean(losses[1]))


def test_logged_losses_equal_the_naive_loop_over_the_same_rows(trained: dict[str, Any], small_model: Path) -> None:
    """The first update has learning rate 0 (warm-up), so steps 1 and 2 both start from the initial weights."""
    order = epoch_order(NUM_ROWS, 42, 0)
    logged = [line for line in trained["metrics"] if "train/loss" in line]
    for step in range(2):
        batch = [rows()[i] for i in order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]]
        d2q, q2d = naive_means(small_model, batch)
        assert logged[step]["train/d2q_loss"] == pytest.approx(d2q, rel=1e-5)
        assert logged[step]["train/q2d_loss"] == pytest.approx(q2d, rel=1e-5)
        assert logged[step]["train/loss"] == pytest.approx(0.8 * d2q + 0.2 * q2d, rel=1e-5)
    assert [line["train/learning_rate"] for line in logged] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_metrics_hold_every_step_and_evaluation_once(trained: dict[str, Any]) -> None:
    steps = [line["step"] for line in trained["metrics"] if "train/loss" in line]
    evaluations = [line for line in trained["metrics"] if "eval/avg/ndcg@10" in line]
    assert steps == [1, 2, 3, 4]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert {"eval/ko/world/ndcg@10", "eval/ko/world/mrr@10", "eval/avg/mrr@10"} <= evaluations[0].keys()
    for scores in evaluations:  # the same folder as the set of a suite's file
        assert scores["eval/ko/world/ndcg@10"] == scores["eval/ko/OfASuite/ndcg@10"] > 0
        assert scores["eval/avg/ndcg@10"] == pytest.approx(scores["eval/ko/world/ndcg@10"])
    promised = {"epoch", "train/grad_norm", "perf/pairs_per_s", "perf/tokens_per_s", "perf/peak_memory_gb"}
    assert all(promised <= line.keys() for line in trained["metrics"] if "train/loss" in line)


def test_the_run_folder_is_as_designed(trained: dict[str, Any]) -> None:
    folder = trained["folder"] / "out/run"
    assert {p.name for p in folder.iterdir()} >= set(
        "spec.json ds_config.json environment.json metrics.jsonl checkpoint-2".split()
    )
    names = {p.name for p in (folder / "checkpoint-4").iterdir()}
    assert names >= set(
        "model.safetensors config.json tokenizer.json tokenizer_config.json llm2vec_config.json "
        "training_state.json optimizer-00001-of-00001.safetensors".split()
    )
    config = json.loads((folder / "checkpoint-4/config.json").read_text())
    assert "anchor" not in json.dumps(config)  # nothing of our attention: any tool loads it as the stock model
    assert json.loads((folder / "checkpoint-4/llm2vec_config.json").read_text()) == {
        "pooling_mode": "eos_token", "max_length": LENGTH, "doc_max_length": LENGTH, "skip_instruction": False,
    }  # fmt: skip
    assert "ignored, they mean nothing here: do_train" in trained["stderr"]


def test_a_finished_run_started_again_changes_nothing(trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    before = (folder / "out/run/metrics.jsonl").read_bytes()
    done = run("train", str(folder / "spec.json"), "--set", "gradient_accumulation_steps=4", home=folder / "home")
    assert done.returncode == 2 and "this experiment began with another spec" in done.stderr
    done = run("train", str(folder / "spec.json"), home=folder / "home")  # one process now: allowed
    assert done.returncode == 0, done.stderr
    assert (folder / "out/run/metrics.jsonl").read_bytes() == before
