"""Stage II beside sentence-transformers' trainer: same model, rows, batch and loss, one CPU process, in turns.

    python benchmarks/stage2_throughput.py --shared ../shared --out stage2.json

Theirs: `SentenceTransformerTrainer`, fp32, AdamW, the loss cached (texts sorted by length, micro-batches by tokens as
large as ours) or not. Its path without padding (flash attention with flattened inputs) needs a GPU. Ours: the objective
and engine of `anchor train`. Each measurement is a process of its own; CPU seconds are compared beside wall seconds,
because other programs on the machine disturb these less.
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
from pathlib import Path
from typing import Any

ROWS, WARM = 32, 1


def prepare_rows(shared: Path, folder: Path, model: Path, num_negatives: int, length: int, num_rows: int) -> None:
    """Real rows; the negatives are other rows' documents."""
    from datasets import load_from_disk

    from anchor_cli.data.prepare.prepare import Options, prepare

    pairs = load_from_disk(str(shared / "data/pairs/train_ko_en")).select(range(num_rows * 9))
    documents = pairs["positive"][:]
    rows = [
        {
            "anchor": pairs[row]["anchor"],
            "positive": documents[row],
            "negatives": documents[num_rows + 7 * row : num_rows + 7 * row + num_negatives],
        }
        for row in range(num_rows)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    options = Options(negatives=True)
    prepare([str(folder / "rows.jsonl")], folder / "out", tokenizer=model, max_seq_length=length, options=options)


def ours(model: Path, folder: Path, length: int, budget: int, steps: int) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of every step."""
    import torch

    from anchor_cli.base.contract import read_contract
    from anchor_cli.data.pairs import PreparedPairs
    from anchor_cli.model.backbone import load_backbone
    from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.deepspeed import build_engine, start_processes
    from anchor_cli.train.stages.contrast import Contrast

    ranks = start_processes()
    values = {"model_name_or_path": str(model), "dataset_file_path": "x", "stage": "II", "temperature": 0.05}
    spec = RunSpec.model_validate({**values, "precision": "float32", "max_seq_length": length})
    objective = Contrast(spec, read_contract(folder / "out"), PreparedPairs.open(folder / "out"), ranks)
    plan = objective.plan(ROWS, budget, steps)
    raw = load_ds_config("zero2_fp32", ".")
    config = resolve_ds_config(
        raw, spec, gradient_accumulation_steps=plan.num_micro_batches, micro_batch_size=1, world_size=1
    )
    module = objective.module(load_backbone(model, dtype=torch.float32), "sdpa", "eos_token").train()
    engine, _ = build_engine(module, spec, config, ranks.device)
    seconds = []
    for ready in objective.feed(plan).steps(0, steps):
        begin = time.perf_counter(), time.process_time()
        objective.update(engine, ready, 1e-5)
        seconds.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return seconds


def theirs(model: Path, folder: Path, length: int, budget: int, steps: int, cached: bool) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of every step, by the trainer's own callbacks."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
        models,
    )
    from transformers import AutoTokenizer, TrainerCallback

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    template = lambda text: f"<|im_start|>user\n{text.strip()}"  # noqa: E731
    columns: dict[str, list[str]] = {"anchor": [], "positive": []}
    for row in rows:
        columns["anchor"].append(template(row["anchor"]))
        columns["positive"].append(template(row["positive"]))
        for place, text in enumerate(row["negatives"], 1):
            columns.setdefault(f"negative_{place}", []).append(template(text))
    del tokenizer
    word = models.Transformer(str(model), max_seq_length=length)
    pooling = models.Pooling(word.get_word_embedding_dimension(), pooling_mode="lasttoken")
    encoder = SentenceTransformer(modules=[word, pooling, models.Normalize()], device="cpu")
    if cached:
        loss: Any = losses.CachedMultipleNegativesRankingLoss(encoder, scale=20.0, mini_batch_num_tokens=budget)
    else:
        loss = losses.MultipleNegativesRankingLoss(encoder, scale=20.0)
    seconds: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append((time.perf_counter() - self.begin[0], time.process_time() - self.begin[1]))

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "theirs"), per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=1e-5,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, dataloader_drop_last=True,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=encoder, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
    ).train()
    return seconds


def one(options: argparse.Namespace) -> None:
    run = options.one.split("-")
    arguments = (options.model, options.folder, options.length, options.budget, options.steps)
    seconds = ours(*arguments) if run[0] == "ours" else theirs(*arguments, cached=run[1] == "cached")
    kept = seconds[WARM:]
    wall, cpu = sum(w for w, _ in kept), sum(c for _, c in kept)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"pairs": ROWS * len(kept), "wall_s": wall, "cpu_s": cpu, "peak_gb": peak}))


def measure(options: argparse.Namespace, name: str, folder: Path, length: int, budget: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--model", str(options.model), "--folder", str(folder)]
    command += ["--length", str(length), "--budget", str(budget), "--steps", str(options.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--model", type=Path, required=True, help="a folder of make_tiny_model.py")
    parser.add_argument("--out", type=Path, default=Path("stage2_throughput.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 7])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    results = []
    for length in options.lengths:
        for negatives in options.negatives:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                prepare_rows(options.shared, folder, options.model, negatives, length, ROWS * options.steps)
                for cached, budget in ((False, 10**6), (True, 4 * length)):
                    pair = ("ours", f"theirs-{'cached' if cached else 'plain'}")
                    runs: dict[str, list[dict[str, float]]] = {each: [] for each in pair}
                    for _ in range(options.turns):
                        for each in pair:
                            runs[each].append(measure(options, each, folder, length, budget))
                    results.append({"length": length, "negatives": negatives, "cached": cached, "runs": runs})
                    options.out.write_text(json.dumps(results, indent=1))
                    middle = {e: sorted(r["pairs"] / r["cpu_s"] for r in runs[e])[len(runs[e]) // 2] for e in pair}
                    peak = {each: max(run["peak_gb"] for run in runs[each]) for each in pair}
                    ratio = middle["ours"] / middle[pair[1]]
                    print(f"{length} tokens, {negatives} negatives, {'cached' if cached else 'plain'}: "
                          f"{middle['ours']:.2f} / {middle[pair[1]]:.2f} pairs per CPU second = {ratio:.2f}; "
                          f"peak {peak['ours']:.2f} / {peak[pair[1]]:.2f} GB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
