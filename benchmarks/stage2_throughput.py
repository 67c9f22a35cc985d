"""Stage II beside sentence-transformers' trainer: same model, rows, batches and loss, one CPU process, in turns.

    python benchmarks/stage2_throughput.py --shared ../shared --out stage2.jsonl

Theirs, fp32, AdamW: `plain` (the loss on one graph of the whole batch), `grouped` (the same on batches of rows of
like length: other batches, the least padding that a padded batch can have) and `cached` (GradCache, micro-batches by
tokens as large as ours, which sorts texts by length). Its path without padding (flash attention with flattened inputs)
needs a GPU. Ours: the objective and engine of `anchor train`, on one graph or in micro-batches.

A process for every measurement, in turns; CPU seconds are compared, because other programs on the machine disturb these
less than wall seconds; peak memory is the process's (VmHWM, Linux), its libraries included. The model: Qwen3 of
4 layers x 256 with a BPE of 16,384 tokens learned on the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
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


def ours(kind: str, cell: argparse.Namespace) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of every step."""
    import torch

    from anchor_cli.base.contract import read_contract
    from anchor_cli.data.pairs import PreparedPairs
    from anchor_cli.model.backbone import load_backbone
    from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.deepspeed import build_engine
    from anchor_cli.train.stages.contrast import Contrast

    ranks, data = processes(), cell.folder / "out"
    values = {"model_name_or_path": str(cell.model), "dataset_file_path": "x", "stage": "II", "temperature": 0.05}
    spec = RunSpec.model_validate({**values, "precision": "float32", "max_seq_length": cell.length})
    objective = Contrast(spec, read_contract(data), PreparedPairs.open(data), ranks)
    keys = {"seed": spec.seed, "world_size": 1, "total_steps": cell.steps}
    plan = objective.plan(
        global_batch_size=cell.rows, token_budget=CACHED if kind == "ours cached" else ONE_GRAPH, **keys
    )
    raw = load_ds_config("zero2_fp32", ".")
    config = resolve_ds_config(
        raw, spec, gradient_accumulation_steps=plan.num_micro_batches, micro_batch_size=1, world_size=1
    )
    module = objective.module(load_backbone(cell.model, dtype=torch.float32), "sdpa", "eos_token").train()
    engine, _ = build_engine(module, spec, config, ranks.device)
    seconds = []
    for ready in objective.feed(plan).steps(0, cell.steps):
        begin = time.perf_counter(), time.process_time()
        objective.update(engine, ready, 1e-5)
        seconds.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return seconds


@cache
def processes() -> Any:
    from anchor_cli.train.deepspeed import start_processes

    return start_processes()


def columns_of(folder: Path) -> dict[str, list[str]]:
    """The rows as sentence-transformers takes them; their tokenizer does not close a text, so the text does."""
    columns: dict[str, list[str]] = {}
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [row["anchor"], row["positive"], *row["negatives"]]
        for name, text in zip(["anchor", "positive", *(f"negative_{k}" for k in range(1, 8))], texts, strict=False):
            columns.setdefault(name, []).append(f"<|im_start|>user\n{text.strip()}<|im_end|>")
    return columns


def batches_of(kind: str, cell: argparse.Namespace, positives: list[str]) -> list[list[int]]:
    """The rows of every step: ours, or of like length."""
    from anchor_cli.data.batches import epoch_order

    order = epoch_order(len(positives), 42, 0).tolist()  # the seed of a spec that names none
    if kind == "grouped":
        order.sort(key=lambda row: len(positives[row]))
    return [order[step * cell.rows : (step + 1) * cell.rows] for step in range(cell.steps)]


def theirs(kind: str, cell: argparse.Namespace) -> list[tuple[float, float]]:
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

    columns = columns_of(cell.folder)
    word = models.Transformer(str(cell.model), max_seq_length=cell.length)
    pooling = models.Pooling(word.get_word_embedding_dimension(), pooling_mode="lasttoken")
    encoder = SentenceTransformer(modules=[word, pooling, models.Normalize()], device="cpu")
    loss: Any = losses.MultipleNegativesRankingLoss(encoder, scale=20.0)
    if kind == "cached":
        loss = losses.CachedMultipleNegativesRankingLoss(encoder, scale=20.0, mini_batch_num_tokens=CACHED)
    seconds: list[tuple[float, float]] = []
    batches = batches_of(kind, cell, columns["positive"])

    class Ordered(DefaultBatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            yield from batches

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append((time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(cell.folder / "theirs"), per_device_train_batch_size=cell.rows, max_steps=cell.steps,
        learning_rate=1e-5, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, batch_sampler=Ordered,
        dataloader_drop_last=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=encoder, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
    ).train()
    return seconds


KINDS: dict[str, Callable[[str, argparse.Namespace], list[tuple[float, float]]]] = {
    "ours": ours,
    "plain": theirs,
    "grouped": theirs,
    "ours cached": ours,
    "cached": theirs,
}


def measure(options: argparse.Namespace) -> None:
    """One kind in one cell, as a line of JSON."""
    from scaling import peak_gb

    (cell,) = cells_of(options)
    seconds = KINDS[options.kind](options.kind, cell)
    facts = {"negatives": cell.negatives, "length": cell.length, "kind": options.kind}
    facts |= {"pairs": cell.rows * len(seconds), "peak_gb": peak_gb()}
    facts |= {"wall_s": sum(wall for wall, _ in seconds), "cpu_s": sum(cpu for _, cpu in seconds)}
    with options.out.open("a") as file:
        file.write(json.dumps(facts) + "\n")


def cells_of(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """What is measured: rows of a number of negatives, cut at a length."""
    for negatives in options.negatives:
        for length in options.lengths:
            folder = options.scratch / f"{negatives}-{length}"
            more = {"negatives": negatives, "length": length, "rows": ROWS[negatives], "folder": folder}
            yield argparse.Namespace(**more, steps=options.steps, model=options.scratch / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--out", type=Path, default=Path("stage2_throughput.jsonl"), help="lines are appended")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 7])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--kind", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        write_model(options.shared, options.scratch / "model")
        for cell in cells_of(options):
            cell.folder.mkdir()
            prepare_rows(options.shared, cell.folder, cell.model, cell.negatives, cell.length, cell.rows * cell.steps)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        for cell, kind in options.turns * list(product(cells_of(options), KINDS)):
            one = ["--kind", kind, "--negatives", str(cell.negatives), "--lengths", str(cell.length)]
            command = [sys.executable, *sys.argv, *one, "--scratch", scratch]
            subprocess.run(command, env=environment, check=True)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    for key in dict.fromkeys((line["negatives"], line["length"], line["kind"]) for line in lines):
        runs = [line for line in lines if (line["negatives"], line["length"], line["kind"]) == key]
        pairs, cpu = (sum(run[name] for run in runs) for name in ("pairs", "cpu_s"))
        peak = max(run["peak_gb"] for run in runs)
        print(*key, f"{pairs / cpu:.3f} pairs a CPU second, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
