"""What Stage I is worth to Stage II, in small: nDCG@10 along contrastive training from different starts.

    python benchmarks/stage2_study.py --part world --seeds 5            # the demo's world, nothing else is needed
    python benchmarks/stage2_study.py --part pairs --seeds 5 --shared ../shared
    python benchmarks/stage2_study.py --draw                            # docs/stage2/: summary.json, pictures

Starts: the untrained model, and Stage I with `content` and `text` targets and over the d2q/q2d weights. All starts of
a seed share the untrained weights, the order of rows in Stage I, and the order in Stage II. Stage I runs the project's
objective and plan with plain AdamW in one process (tests/test_engine.py shows that DeepSpeed's engine computes the
same); Stage II is in-batch InfoNCE, as in examples/stage2/train_plain_pytorch.py, on the packed encoder.

What was run of a (part, seed) is appended to docs/stage2/results.jsonl when it is done; what is there is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from anchor_cli.data.batches import epoch_order, make_plan
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.data.text import load_tokenizer
from anchor_cli.demo.demo import Recipe, make_inputs, make_model, prepare_pairs
from anchor_cli.evaluate.embedder import PackedEmbedder
from anchor_cli.evaluate.evaluate import evaluate
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.packed import pack_texts
from anchor_cli.model.reconstruction import ReconstructionModel
from anchor_cli.spec.schedule import learning_rate
from anchor_cli.train.stages.feed import Feed

DOCS = Path(__file__).parents[1] / "docs" / "stage2"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Start:
    """One way to begin Stage II; `targets` None is the untrained model."""

    name: str
    targets: str | None = None
    d2q: float = 0.8
    q2d: float = 0.2


STARTS = (
    Start("untrained"),
    Start("content .8/.2", "content"),
    Start("text .8/.2", "text"),
    Start("content 1/0", "content", 1.0, 0.0),
    Start("content .5/.5", "content", 0.5, 0.5),
    Start("content 0/1", "content", 0.0, 1.0),
)


@dataclass(frozen=True)
class Settings:
    """Sizes of a part; the same for every start."""

    steps_one: int
    steps_two: int
    pairs_per_step: int
    rate_one: float
    rate_two: float
    temperature: float
    max_seq_length: int
    evaluate_one: tuple[int, ...]
    evaluate_two: tuple[int, ...]


SETTINGS = {
    "world": Settings(240, 60, 24, 4e-3, 1e-3, 0.05, 64, (80, 160, 240), (0, 5, 10, 20, 40, 60)),
    "pairs": Settings(160, 60, 24, 3e-3, 1e-3, 0.05, 48, (80, 160), (0, 10, 20, 40, 60)),
}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
NUM_WORLD_DOCUMENTS = 100
NUM_QUERIES = 200  # of the real benchmark's test queries
VOCABULARY = 2048  # tokens learned on the real rows


@dataclass
class Bench:
    """A part made ready for one seed."""

    model: Path
    pairs: PreparedPairs
    benchmarks: list[Any]


def world_bench(folder: Path, seed: int, settings: Settings, shared: Path) -> Bench:
    """A quarter of the demo's world, the demo's model at half the width and two layers."""
    train, beir = make_inputs(folder, Recipe(seed=seed, num_documents=NUM_WORLD_DOCUMENTS, **SHAPE))
    prepare_pairs(folder, train, settings.max_seq_length)
    names = [f"{path.name.rpartition('-')[2]}:{path}" for path in beir]
    return Bench(folder / "model", PreparedPairs.open(folder / "prepared"), load_benchmarks(names))


def pairs_bench(folder: Path, seed: int, settings: Settings, shared: Path) -> Bench:
    """The Korean rows of the shared pairs and the BEIR folder that belongs to them; a byte-level BPE learned on them.

    The benchmark keeps every document and some of its test queries; rows that ask one of these are left out.
    """
    from datasets import load_from_disk

    from anchor_cli.demo.tokenizer import train_text_tokenizer, write_small_tokenizer

    benchmark = load_benchmarks([f"ko:{shared / 'data' / 'beir' / 'welfare-ko'}"])[0]
    asked = sorted(benchmark.qrels)
    kept = [asked[at] for at in np.random.default_rng(0).permutation(len(asked))[:NUM_QUERIES]]
    queries = {query: benchmark.queries[query] for query in kept}
    benchmark = replace(benchmark, queries=queries, qrels={query: benchmark.qrels[query] for query in kept})
    rows = load_from_disk(str(shared / "data" / "pairs" / "train_ko_en"))
    texts = set(queries.values())
    train = [row for row in rows if re.search("[가-힣]", row["anchor"]) and row["anchor"] not in texts]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train), encoding="utf-8")
    tokenizer = train_text_tokenizer((text for row in train for text in row.values()), VOCABULARY)
    make_model(folder / "model", Recipe(seed=seed, **SHAPE), tokenizer)
    write_small_tokenizer(tokenizer, folder / "model")
    prepare(
        [str(folder / "train.jsonl")],
        folder / "prepared",
        tokenizer=folder / "model",
        max_seq_length=settings.max_seq_length,
        options=Options(query_column="anchor", document_column="positive"),
    )
    return Bench(folder / "model", PreparedPairs.open(folder / "prepared"), [benchmark])


BENCHES: dict[str, Callable[[Path, int, Settings, Path], Bench]] = {"world": world_bench, "pairs": pairs_bench}


def load(bench: Bench) -> ReconstructionModel:
    return ReconstructionModel(load_backbone(bench.model, dtype=torch.float32), kernel="sdpa")


def score(model: ReconstructionModel, bench: Bench) -> float:
    """Mean nDCG@10 of the part's benchmarks."""
    embedder = PackedEmbedder(
        model.encode,
        load_tokenizer(bench.model),
        bench.pairs.contract,
        name="study",
        dimension=int(model.language_model.config.hidden_size),
        device=CPU,
    )
    return float(evaluate(embedder, bench.benchmarks, metrics=("ndcg@10",))["avg"]["ndcg@10"])


def stage_one(
    model: ReconstructionModel, bench: Bench, start: Start, settings: Settings, seed: int
) -> Iterator[dict[str, Any]]:
    """Train by reconstruction; yields {"step", "loss", "ndcg"} at the steps asked for."""
    pairs = bench.pairs
    plan = make_plan(
        pairs.query_lengths + pairs.document_lengths,
        seed=seed,
        global_batch_size=settings.pairs_per_step,
        world_size=1,
        token_budget=1 << 14,
        total_steps=settings.steps_one,
    )
    assert start.targets in ("content", "text")
    feed = Feed(pairs, plan, 0, start.targets, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for ready in feed.steps(0, settings.steps_one):
        total = 0.0
        for batch in ready.micro_batches:
            out = model(batch, start.d2q / ready.query_targets, start.q2d / ready.document_targets)
            out.loss.backward()
            total += out.loss.item()
        update(model, optimizer, ready.step, settings.steps_one, settings.rate_one)
        if ready.step + 1 in settings.evaluate_one:
            yield {"step": ready.step + 1, "loss": total, "ndcg": score(model, bench)}


def stage_two(model: ReconstructionModel, bench: Bench, settings: Settings, seed: int) -> Iterator[dict[str, Any]]:
    """Contrastive training with in-batch negatives, equal documents excepted; yields as `stage_one`, from step 0."""
    pairs, size = bench.pairs, settings.pairs_per_step
    order = np.concatenate([epoch_order(pairs.num_rows, seed + 1000, epoch) for epoch in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(settings.steps_two + 1):
        if step in settings.evaluate_two:
            yield {"step": step, "loss": loss.item() if step else None, "ndcg": score(model, bench)}
        if step == settings.steps_two:
            break
        queries, documents = pairs.tokens(order[step * size : (step + 1) * size])
        left, right = F.normalize(model.encode(pack_texts([*queries, *documents])), dim=-1).chunk(2)
        keys = [ids.tobytes() for ids in documents]
        same = torch.tensor([[a == b and i != j for j, b in enumerate(keys)] for i, a in enumerate(keys)])
        scores = (left @ right.T / settings.temperature).masked_fill(same, float("-inf"))
        loss = F.cross_entropy(scores, torch.arange(size))
        loss.backward()
        update(model, optimizer, step, settings.steps_two, settings.rate_two)


def update(model: ReconstructionModel, optimizer: torch.optim.Optimizer, step: int, total: int, rate: float) -> None:
    """Clip to norm 1, one AdamW update, linear warm-up over a tenth and linear decay."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, peak=rate, warmup=total // 10, total=total)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def run_seed(part: str, seed: int, shared: Path, starts: list[Start]) -> dict[str, Any]:
    """These starts of one seed."""
    settings, began = SETTINGS[part], time.process_time()
    curves: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = BENCHES[part](Path(folder), seed, settings, shared)
        untrained = load(bench)
        for start in starts:
            model = copy.deepcopy(untrained)
            one = list(stage_one(model, bench, start, settings, seed)) if start.targets else []
            two = list(stage_two(model, bench, settings, seed))
            curves[start.name] = {"stage_one": one, "stage_two": two}
            line = " ".join(f"{point['step']}:{point['ndcg']:.3f}" for point in two)
            print(f"{part} seed {seed} {start.name}: {line}", file=sys.stderr, flush=True)
    return {
        "part": part,
        "seed": seed,
        "rows": bench.pairs.num_rows,
        "settings": asdict(settings),
        "cpu_seconds": round(time.process_time() - began),
        "curves": curves,
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """One entry for each (part, seed), with the curves of all its lines, in the order of `STARTS`."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        run = json.loads(line)
        kept = merged.setdefault((run["part"], run["seed"]), run)
        if kept is not run:
            kept["curves"] |= run["curves"]
            kept["cpu_seconds"] += run["cpu_seconds"]
    names = [start.name for start in STARTS]
    for run in merged.values():
        run["curves"] = {name: run["curves"][name] for name in names if name in run["curves"]}
    return list(merged.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(BENCHES))
    parser.add_argument("--seeds", type=int, default=5, help="seeds FIRST … FIRST + N - 1")
    parser.add_argument("--first", type=int, default=0, help="lowest seed, to share the seeds out over processes")
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="folder that holds data/pairs, data/beir"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true", help="summary and pictures of what has been run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    DOCS.mkdir(parents=True, exist_ok=True)
    results = DOCS / "results.jsonl"
    done = read_results(results)
    for seed in range(args.first, args.first + (args.seeds if args.part else 0)):
        there = [run["curves"] for run in done if run["part"] == args.part and run["seed"] == seed]
        missing = [start for start in STARTS if not any(start.name in curves for curves in there)]
        if missing:
            run = run_seed(args.part, seed, args.shared, missing)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
    done = read_results(results)
    if args.draw:
        from stage2_pictures import draw

        draw(done, DOCS)


if __name__ == "__main__":
    main()
