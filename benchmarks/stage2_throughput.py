"""Stage II beside sentence-transformers' trainer: same model, rows, batches and loss, one CPU process, in turns.

    python benchmarks/stage2_throughput.py --shared ../shared --out stage2.json

Theirs, fp32, AdamW: `plain` (the loss on one graph of the whole batch), `grouped` (the same on batches of rows of
like length: other batches, the least padding that a padded batch can have) and `cached` (GradCache, micro-batches by
tokens as large as ours, which sorts texts by length). Its path without padding (flash attention with flattened inputs)
needs a GPU. Ours: the objective and engine of `anchor train`, on one graph or in micro-batches.

Each measurement is a process of its own; CPU seconds are compared, because other programs on the machine disturb these
less than wall seconds. The model: Qwen3 of 4 layers x 256 with a BPE of 16,384 tokens learned on the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = {0: 16, 7: 4}  # rows of a step by negatives of a row
ONE_GRAPH, CACHED = 10**6, 2048  # tokens of a micro-batch; small ones pad least


def write_model(shared: Path, folder: Path) -> None:
    from datasets import load_from_disk

    from anchor_cli.demo.demo import Recipe, make_model
    from anchor_cli.demo.tokenizer import train_text_tokenizer

    pairs = load_from_disk(str(shared / "data/pairs/train_ko_en"))
    tokenizer = train_text_tokenizer((text for name in ("anchor", "positive") for text in pairs[name]), 2**14)
    make_model(folder, Recipe(hidden_size=256, num_layers=4, intermediate_size=768), tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))


def prepare_rows(shared: Path, folder: Path, model: Path, num_negatives: int, length: int, num_rows: int) -> None:
    """Real rows; the negatives are other rows' documents."""
    from datasets import load_from_disk

    from anchor_cli.data.prepare.prepare import Options, prepare

    pairs = load_from_disk(str(shared / "data/pairs/train_ko_en")).shuffle(seed=0).select(range(num_rows * 8))
    documents = pairs["positive"][:]
    rows = [
        {
            "anchor": pairs[row]["anchor"],
            "positive": documents[row],
            "negatives": documents[num_rows + 7 * row :][:num_negatives],
        }
        for row in range(num_rows)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    options = Options(negatives=True)
    prepare([str(folder / "rows.jsonl")], folder / "out", tokenizer=model, max_seq_length=length, options=options)


def ours(options: argparse.Namespace) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of every step."""
    import torch

    from anchor_cli.base.contract import read_contract
    from anchor_cli.data.pairs import PreparedPairs
    from anchor_cli.model.backbone import load_backbone
    from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.deepspeed import build_engine, start_processes
    from anchor_cli.train.stages.contrast import Contrast

    ranks, data = start_processes(), options.folder / "out"
    values = {"model_name_or_path": str(options.model), "dataset_file_path": "x", "stage": "II", "temperature": 0.05}
    spec = RunSpec.model_validate({**values, "precision": "float32", "max_seq_length": options.length})
    objective = Contrast(spec, read_contract(data), PreparedPairs.open(data), ranks)
    keys = {"seed": spec.seed, "world_size": 1, "total_steps": options.steps}
    plan = objective.plan(global_batch_size=options.rows, token_budget=options.budget, **keys)
    raw = load_ds_config("zero2_fp32", ".")
    config = resolve_ds_config(
        raw, spec, gradient_accumulation_steps=plan.num_micro_batches, micro_batch_size=1, world_size=1
    )
    module = objective.module(load_backbone(options.model, dtype=torch.float32), "sdpa", "eos_token").train()
    engine, _ = build_engine(module, spec, config, ranks.device)
    seconds = []
    for ready in objective.feed(plan).steps(0, options.steps):
        begin = time.perf_counter(), time.process_time()
        objective.update(engine, ready, 1e-5)
        seconds.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return seconds


def columns_of(folder: Path) -> dict[str, list[str]]:
    """The rows as sentence-transformers takes them; their tokenizer does not close a text, so the text does."""
    columns: dict[str, list[str]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [row["anchor"], row["positive"], *row["negatives"]]
        for name, text in zip(["anchor", "positive", *(f"negative_{k}" for k in range(1, 8))], texts, strict=False):
            columns.setdefault(name, []).append(f"<|im_start|>user\n{text.strip()}<|im_end|>")
    return columns


def batches_of(options: argparse.Namespace, positives: list[str]) -> list[list[int]]:
    """The rows of every step: ours, or of like length."""
    from anchor_cli.data.batches import epoch_order

    order = epoch_order(len(positives), 42, 0).tolist()  # the seed of a spec that names none
    if options.one == "grouped":
        order.sort(key=lambda row: len(positives[row]))
    return [order[step * options.rows : (step + 1) * options.rows] for step in range(options.steps)]


def theirs(options: argparse.Namespace) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of every step, by the trainer's own callbacks."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from transformers import TrainerCallback

    columns = columns_of(options.folder)
    word = models.Transformer(str(options.model), max_seq_length=options.length)
    pooling = models.Pooling(word.get_word_embedding_dimension(), pooling_mode="lasttoken")
    encoder = SentenceTransformer(modules=[word, pooling, models.Normalize()], device="cpu")
    loss: Any = losses.MultipleNegativesRankingLoss(encoder, scale=20.0)
    if options.one == "cached":
        tokens = options.budget
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, scale=20.0, mini_batch_num_tokens=tokens)
    seconds: list[tuple[float, float]] = []
    batches = batches_of(options, columns["positive"])

    class Ordered(DefaultBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            yield from batches

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append((time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(options.folder / "theirs"), per_device_train_batch_size=options.rows, max_steps=options.steps,
        learning_rate=1e-5, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, batch_sampler=Ordered,
        dataloader_drop_last=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=encoder, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
    ).train()
    return seconds


def one(options: argparse.Namespace) -> None:
    seconds = (ours if options.one == "ours" else theirs)(options)
    wall, cpu = sum(w for w, _ in seconds), sum(c for _, c in seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"pairs": options.rows * len(seconds), "wall_s": wall, "cpu_s": cpu, "peak_gb": peak}))


def measure(name: str, budget: int, options: argparse.Namespace, model: Path, folder: Path) -> dict[str, float]:
    values = {"one": name, "model": model, "folder": folder, "budget": budget, "length": options.length}
    values |= {"rows": options.rows, "steps": options.steps}
    command = [sys.executable, __file__, *(text for key, value in values.items() for text in (f"--{key}", str(value)))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("stage2_throughput.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 7])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    for name in ("--one", "--folder", "--model", "--length", "--budget", "--rows"):
        kind = str if name == "--one" else Path if name in ("--folder", "--model") else int
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_model(options.shared, model)
        for negatives in options.negatives:
            for length in options.lengths:
                folder = Path(scratch) / f"{negatives}-{length}"
                folder.mkdir()
                options.length, options.rows = length, ROWS[negatives]
                prepare_rows(options.shared, folder, model, negatives, length, options.rows * options.steps)
                kinds = {"ours": ONE_GRAPH, "plain": 0, "grouped": 0, "ours cached": CACHED, "cached": CACHED}
                runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
                for _ in range(options.turns):
                    for kind, budget in kinds.items():
                        runs[kind].append(measure(kind.split()[0], budget, options, model, folder))
                results.append({"length": length, "negatives": negatives, "rows": options.rows, "runs": runs})
                options.out.write_text(json.dumps(results, indent=1))
                for kind, measured in runs.items():
                    pairs, cpu = (sum(run[key] for run in measured) for key in ("pairs", "cpu_s"))
                    peak = max(run["peak_gb"] for run in measured)
                    print(f"{negatives} negatives, {length} tokens, {kind}: {pairs / cpu:.3f} pairs a CPU second,"
                          f" peak {peak:.2f} GB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
