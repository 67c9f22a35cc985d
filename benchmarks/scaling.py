"""Growth: how planning, opening data and a training step cost more as rows and lengths grow.

    python benchmarks/scaling.py plan   [--rows 250000 500000 1000000 2000000]
    python benchmarks/scaling.py length [--lengths 128 256 512 1024 2048]
    python benchmarks/scaling.py epoch  [--steps 60]
    python benchmarks/scaling.py ranks  [--processes 1 2] [--data ../shared/data/pairs/train_ko_en]

`plan`: seconds and peak memory (a process of its own each) of the plan of three epochs at 128 rows a step, and seconds
to cut one step at the start and at the end of the run. `length`: seconds per token of one micro-batch of about 4,096
tokens in texts of one length. `epoch`: seconds of equally large steps along a run, the slope says whether they grow.
On a CPU these two count the process's own CPU time. `ranks`: pairs/s of `anchor train` itself (DeepSpeed ZeRO-2, fp32,
the same global batch) on so many processes of one thread each, in turns; of each run the median of all steps but the
first two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from anchor_cli.data.batches import make_plan  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
PEAK = "VmHWM"


def lengths_of(num_rows: int, seed: int = 0) -> np.ndarray:
    """Row lengths like KURE's mix at 512: a query of about 42 tokens and a log-normal document, cut at 512."""
    chance = np.random.default_rng(seed)
    documents = np.minimum(chance.lognormal(5.95, 0.8, num_rows), 512)
    return (documents + chance.normal(42, 10, num_rows).clip(21, 80)).astype(np.int32)


def plan_once(num_rows: int, budget: int) -> dict[str, float]:
    lengths = lengths_of(num_rows)
    before = peak_gb()
    start = time.perf_counter()
    plan = make_plan(
        lengths, seed=42, global_batch_size=128, world_size=2, token_budget=budget, total_steps=3 * (num_rows // 128)
    )
    planned = time.perf_counter() - start
    cuts = []
    for first in (0, plan.total_steps - 20):
        plan.step(first)  # the epoch's order is drawn once and kept
        begin = time.perf_counter()
        for step in range(first, first + 20):
            plan.step(step)
        cuts.append((time.perf_counter() - begin) / 20)
    return {"rows": num_rows, "plan_s": planned, "peak_gb": peak_gb(), "before_gb": before,
            "micro_batches": plan.num_micro_batches, "cut_first_s": cuts[0], "cut_last_s": cuts[1]}  # fmt: skip


def peak_gb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(PEAK))


def plan(args: argparse.Namespace) -> None:
    for num_rows in args.rows:
        command = [sys.executable, __file__, "plan", "--once", "--budget", str(args.budget), "--rows", str(num_rows)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{num_rows:>10,} rows  {found['micro_batches']} micro-batches  planned in {found['plan_s']:6.2f} s  "
              f"peak {found['peak_gb']:.3f} GB ({found['before_gb']:.3f} before)  "
              f"a step cut in {found['cut_first_s'] * 1e3:.1f} ms, at the end {found['cut_last_s'] * 1e3:.1f} ms",
              flush=True)  # fmt: skip


def clock() -> float:
    """Seconds: of this process on a CPU (other processes on the machine slow it less), of the wall on a GPU."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def length(args: argparse.Namespace) -> None:
    import torch
    from train_throughput import PackedTrainer, Variant, make_model

    from anchor_cli.data.text import TokenisedText

    chance, device = np.random.default_rng(0), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch), args.tokenizer, args.hidden, args.layers, False, torch.float32)
        trainer = PackedTrainer(model, Variant(budget=2 * args.tokens), device, torch.float32)
        for n in args.lengths:
            ids = [chance.integers(0, 100_000, n).astype(np.int32) for _ in range(2 * max(1, args.tokens // 2 // n))]
            texts = [TokenisedText(i, 0, n) for i in ids]
            pairs = list(zip(texts[::2], texts[1::2], strict=True))
            seconds = []
            for _ in range(args.repeats + 1):
                start = clock()
                trainer.step(pairs)
                seconds.append(clock() - start)
            typical = statistics.median(seconds[1:])
            print(f"length {n:>5}  {len(pairs):>3} pairs  {typical:7.2f} s a step  "
                  f"{typical / (n * len(ids)) * 1e6:8.1f} us a token", flush=True)  # fmt: skip


def epoch(args: argparse.Namespace) -> None:
    import torch
    from train_throughput import PackedTrainer, Variant, make_model

    from anchor_cli.data.text import TokenisedText

    chance, device = np.random.default_rng(0), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch), args.tokenizer, args.hidden, args.layers, False, torch.float32)
        trainer = PackedTrainer(model, Variant(), device, torch.float32)
        seconds = []
        for _ in range(args.steps):
            sizes = [(20, 60)] * 6 + [(30, 100)] * 2  # new ids every step, equal work
            pairs = [
                tuple(TokenisedText(chance.integers(0, 100_000, n).astype(np.int32), 0, n) for n in size)
                for size in sizes
            ]
            start = clock()
            trainer.step(pairs)  # type: ignore[arg-type]
            seconds.append(clock() - start)
    third = args.steps // 3
    first, last = statistics.median(seconds[1 : 1 + third]), statistics.median(seconds[-third:])
    print(f"{args.steps} steps: median of the first third {first:.3f} s, of the last {last:.3f} s, "
          f"ratio {last / first:.2f}; peak {peak_gb():.2f} GB")  # fmt: skip


def ranks(args: argparse.Namespace) -> None:
    import torch
    from train_throughput import make_model

    anchor = [sys.executable, "-m", "anchor_cli"]
    found: dict[int, list[float]] = {count: [] for count in args.processes}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch), args.tokenizer, args.hidden, args.layers, False, torch.float32)
        pairs, spec = Path(scratch) / "pairs", Path(scratch) / "run.json"
        length = ["--max-seq-length", "512"]
        prepare = [*anchor, "prepare", str(args.data), "--out", str(pairs), "--tokenizer", str(model), *length]
        subprocess.run(prepare, check=True, capture_output=True)
        common = {"model_name_or_path": str(model), "dataset_file_path": str(pairs), "output_dir": scratch,
                  "max_seq_length": 512, "precision": "float32", "deepspeed": "zero2_fp32", "global_batch_size": 16,
                  "max_steps": args.steps, "warmup_steps": 2, "logging_steps": 1, "save_steps": args.steps,
                  "eval_steps": 0, "report_to": "none"}  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ANCHOR_HOME": scratch}
        for repeat in range(args.repeats):
            for count in args.processes if repeat % 2 else args.processes[::-1]:
                name = f"ranks-{count}-{repeat}"
                spec.write_text(json.dumps(common | {"experiment_id": name}))
                train = [*anchor, "train", str(spec), "--nproc-per-node", str(count)]
                subprocess.run(train, check=True, capture_output=True, env=environment)
                lines = [json.loads(line) for line in (Path(scratch) / name / "metrics.jsonl").read_text().splitlines()]
                rates = [line["perf/pairs_per_s"] for line in lines if "perf/pairs_per_s" in line]
                found[count].append(statistics.median(rates[2:]))
                print(f"{count} processes  {found[count][-1]:7.2f} pairs/s", flush=True)
    first = statistics.median(found[args.processes[0]])
    for count, rates in found.items():
        typical = statistics.median(rates)
        spread = f"runs {min(rates):.2f} to {max(rates):.2f}"
        print(f"{count} processes  {typical:7.2f} pairs/s  {typical / first:.2f} x  ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "length", "epoch", "ranks"))
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000, 2_000_000])
    parser.add_argument("--budget", type=int, default=16384)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", type=Path, default=SHARED / "data/pairs/train_ko_en")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "data/tokenizer")
    args = parser.parse_args()
    if args.once:
        print(json.dumps(plan_once(args.rows[0], args.budget)))
        return
    {"plan": plan, "length": length, "epoch": epoch, "ranks": ranks}[args.what](args)


if __name__ == "__main__":
    main()
