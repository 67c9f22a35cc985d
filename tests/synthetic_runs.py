"""Run folders as `anchor train` would leave them, made from a seed: for the report and whoever else reads runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

BENCHMARKS = ("ko/NanoMSMARCO", "ko/NanoNQ", "en/NanoMSMARCO", "en/NanoNQ")
START = 1_780_000_000.0


def make_run(
    folder: Path,
    *,
    seed: int = 0,
    num_steps: int = 2000,
    logging_steps: int = 10,
    eval_steps: int = 250,
    quality: float = 1.0,
    crash_at: int | None = 1130,
    checkpoint_steps: int = 250,
    torn: bool = False,
    benchmarks: tuple[str, ...] = BENCHMARKS,
    spec: dict[str, Any] | None = None,
) -> Path:
    """Write a run with a warm-up, falling losses, four evaluation sets, one crash and resume, and return its folder."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = [
        {"time": START, "step": 0, "event": "start", "world_size": 2, "total_steps": num_steps}
    ]
    lines.append(_evaluation_line(rng, 0, START + 20, quality, num_steps, benchmarks))
    last = _attempt(rng, lines, events, 0, crash_at or num_steps, START + 30, quality, num_steps, benchmarks,
                    logging_steps, eval_steps, checkpoint_steps)  # fmt: skip
    if crash_at:
        events.append({"time": last, "step": crash_at, "event": "incident", "kind": "worker killed", "rank": 1,
                       "message": "rank 1 was killed by signal 9 (메모리 부족일 수 있음)"})  # fmt: skip
        again = last + 5400
        first = crash_at // checkpoint_steps * checkpoint_steps
        events.append({"time": again, "step": first, "event": "resume", "checkpoint": f"checkpoint-{first}"})
        last = _attempt(rng, lines, events, first, num_steps, again + 30, quality, num_steps, benchmarks,
                        logging_steps, eval_steps, checkpoint_steps)  # fmt: skip
    events.append({"time": last + 5, "step": num_steps, "event": "end"})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + ('{"step": 99999, "tra' if torn else ""), encoding="utf-8")
    (folder / "events.jsonl").write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in events), "utf-8")
    (folder / "spec.json").write_text(json.dumps({**_spec(folder.name), **(spec or {})}, ensure_ascii=False), "utf-8")
    (folder / "prepare.json").write_text(json.dumps(_manifest(rng), ensure_ascii=False), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(_environment()), encoding="utf-8")
    return folder


def _attempt(
    rng: random.Random, lines: list[dict[str, Any]], events: list[dict[str, Any]], first: int, last: int, time: float,
    quality: float, num_steps: int, benchmarks: tuple[str, ...], logging_steps: int, eval_steps: int, saving: int,
) -> float:  # fmt: skip
    for step in range(first + 1, last + 1):
        time += 0.61 + 0.05 * rng.random()
        if step % logging_steps == 0:
            lines.append(_training_line(rng, step, time, quality, num_steps))
        if step % eval_steps == 0:
            time += 9
            lines.append(_evaluation_line(rng, step, time, quality, num_steps, benchmarks))
            events.append({"time": time, "step": step, "event": "evaluation"})
        if step % saving == 0:
            time += 4
            events.append({"time": time, "step": step, "event": "checkpoint", "path": f"checkpoint-{step}"})
    return time


def _training_line(rng: random.Random, step: int, time: float, quality: float, num_steps: int) -> dict[str, Any]:
    fall = math.exp(-step / 220)
    d2q = 2.35 / quality + 4.1 * fall + rng.gauss(0, 0.06)
    q2d = 3.05 / quality + 3.2 * fall + rng.gauss(0, 0.05)
    spike = 9.0 if rng.random() < 0.01 else 1.0
    return {
        "step": step,
        "epoch": step / 14554,
        "time": time,
        "train/loss": 0.8 * d2q + 0.2 * q2d,
        "train/d2q_loss": d2q,
        "train/q2d_loss": q2d,
        "train/learning_rate": 4e-5 * min(step / 300, (num_steps - step) / max(1, num_steps - 300)),
        "train/grad_norm": spike * (0.55 + 6 * fall) * math.exp(rng.gauss(0, 0.15)),
        "perf/pairs_per_s": 196 + rng.gauss(0, 4),
        "perf/tokens_per_s": 104_000 + rng.gauss(0, 2200),
        "perf/mfu": 0.41 + rng.gauss(0, 0.008),
        "perf/peak_memory_gb": 61.4,
    }


def _evaluation_line(
    rng: random.Random, step: int, time: float, quality: float, num_steps: int, benchmarks: tuple[str, ...]
) -> dict[str, Any]:
    line: dict[str, Any] = {"step": step, "epoch": step / 14554, "time": time}
    share = 1 - math.exp(-4 * step / num_steps) - 0.12 * max(0.0, step / num_steps - 0.7)
    scores = []
    for index, name in enumerate(benchmarks):
        score = 0.04 + quality * (0.42 + 0.06 * index) * share + rng.gauss(0, 0.006)
        line[f"eval/{name}/ndcg@10"] = max(score, 0.0)
        line[f"eval/{name}/mrr@10"] = max(0.93 * score, 0.0)
        line[f"eval/{name}/mean_cosine"] = 0.82 - 0.5 * share + 0.02 * index
        scores.append(max(score, 0.0))
    line["eval/avg/ndcg@10"] = sum(scores) / len(scores)
    line["eval/avg/mrr@10"] = 0.93 * sum(scores) / len(scores)
    return line


def _spec(name: str) -> dict[str, Any]:
    return {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "dataset_file_path": "/data/train_ko_en.prepared",
        "output_dir": "output/stage_I",
        "experiment_id": name,
        "max_seq_length": 512,
        "instructions": {"ko": "주어진 질문에 대해 관련 문서를 검색하세요"},
        "d2q_weight": 0.8,
        "q2d_weight": 0.2,
        "learning_rate": 4e-5,
        "warmup_steps": 300,
        "max_grad_norm": 1.0,
        "global_batch_size": 128,
        "eval_data": None,
        "deepspeed": "zero2_bf16",
    }


def _manifest(rng: random.Random) -> dict[str, Any]:
    """As `anchor prepare` writes it (format 1), its counts as of some 1.8 million pairs."""

    def bins(width: int, num: int, peak: float) -> list[list[int]]:
        made = []
        for place in range(num):
            share = (place / peak) ** 2 * math.exp(2 - 2 * place / peak)
            made.append([place * width, place * width + width - 1, int(250_000 * share * (1 + 0.05 * rng.random()))])
        return [*made, [num * width, num * width * 3, 12_345]]

    return {
        "format": 1,
        "fingerprint": "0123456789abcdef" * 4,
        "num_rows": 1_862_922,
        "contract": {"text_template": "<|im_start|>user\n{text}<|im_end|>", "max_seq_length": 512},
        "sources": [{"source": "/data/질문-문서/train_ko_en"}],
        "options": {"exclude_ngram": 13},
        "counts": {
            "rows": {"in": 1_870_000, "kept": 1_862_922, "rejected": 7_078, "left_out": 0},
            "rejected": {"duplicate_pair": 7_000, "empty_document": 78},
            "languages": {"ko": 1_400_000, "en": 462_922},
            "tokens": {"query": 78_000_000, "document": 690_000_000},
            "lengths": {
                side: {"mean": mean, "min": 9, "p50": mean, "p90": 2 * mean, "p99": 5 * mean, "max": 9 * mean}
                for side, mean in (("query", 42), ("document", 500))
            },
            "share_longer_than": {"512": {"query": 0.0, "document": 0.3255}},
            "histogram": {"query": bins(5, 14, 7.0), "document": bins(100, 14, 4.0)},
        },
    }


def _environment() -> dict[str, Any]:
    return {
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"},
        "gpus": [{"name": "NVIDIA H100 NVL", "memory_gb": 95.8}, {"name": "NVIDIA H100 NVL", "memory_gb": 95.8}],
        "git_commit": "0123abc",
    }
