"""Training throughput: anchor against the padded baseline, same rows, same process, taking turns.

    python benchmarks/train_throughput.py --data ../shared/data/pairs/train_ko_en --max-seq-length 512
    python benchmarks/train_throughput.py --full-size --data DATA --rows 32 --variants all      # one GPU, one command

A *step* here is forward, backward, clipping and a fused AdamW update on `--rows` pairs, from what each side is given:
text for the baseline (it tokenises in its collator), token ids for anchor (`anchor prepare` tokenised them). The
baseline's batch is one padded rectangle a side; anchor deals the same rows out to micro-batches of at most `--budget`
tokens.

Printed and written as JSON (`--json FILE`): pairs/s, tokens/s (useful tokens, each counted once), model FLOP/s and MFU
(anchor_cli/plan/flops.py: useful work only), the ratio of the sides, the ratio that arithmetic allows (FLOPs the
baseline does over FLOPs the objective needs), peak memory of each side in a process of its own, and the relative
difference of the two losses on the first rows (they optimise the same objective, so it must be rounding).

On a CPU without `--peak-tflops` the peak is that of a measured 2048 x 2048 float32 matrix product.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import padded_baseline  # noqa: E402
from padded_baseline import INSTRUCTION, TEMPLATE, PaddedTrainer, Row, read_rows  # noqa: E402
from padded_flops import padded_flops  # noqa: E402

from anchor_cli.data.batches import fill_bins  # noqa: E402
from anchor_cli.data.text import TextEncoder, TokenisedText, load_tokenizer  # noqa: E402
from anchor_cli.model.attention import choose_kernel  # noqa: E402
from anchor_cli.model.backbone import apply_liger, compile_layers, load_backbone  # noqa: E402
from anchor_cli.model.packed import PairBatch, pack_pairs  # noqa: E402
from anchor_cli.model.reconstruction import ReconstructionModel  # noqa: E402
from anchor_cli.plan import flops  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared"
QWEN3_0_6B = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "initializer_range": 0.02,
}  # fmt: skip
Pair = tuple[TokenisedText, TokenisedText]


@dataclass(frozen=True)
class Variant:
    """How anchor's side runs. `kernel`: auto, flash_attention_3, flash_attention_2, varlen, sdpa."""

    name: str = "default"
    kernel: str = "auto"
    compile: bool = False
    checkpointing: bool = False
    liger: bool = False
    budget: int = 16384


def variants_for(choice: str, base: Variant) -> list[Variant]:
    """`default`: one. `all`: each kernel, Liger, compile, checkpointing, half and double budget, one at a time."""
    if choice == "default":
        return [base]
    kernels = ("flash_attention_3", "flash_attention_4", "flash_attention_2", "varlen", "sdpa")
    changes: list[dict[str, Any]] = [{"kernel": kernel} for kernel in kernels]
    changes += [{"liger": True}, {"compile": True}, {"liger": True, "compile": True}, {"checkpointing": True}]
    changes += [{"budget": base.budget // 2}, {"budget": base.budget * 2}]
    return [base] + [replace(base, name=",".join(f"{k}={v}" for k, v in c.items()), **c) for c in changes]


class PackedTrainer:
    """anchor's own packing, model and loss under a plain optimizer (DeepSpeed adds communication, not arithmetic)."""

    def __init__(self, folder: Path, variant: Variant, device: torch.device, dtype: torch.dtype) -> None:
        backbone = load_backbone(folder, dtype=dtype, gradient_checkpointing=variant.checkpointing)
        backbone.train()
        if variant.liger and not apply_liger(backbone):
            raise RuntimeError("liger-kernel is not installed or does not know this model")
        backbone.to(device)  # type: ignore[arg-type]
        if variant.compile:
            compile_layers(backbone)
        self.device, self.budget = device, variant.budget
        self.kernel = choose_kernel(variant.kernel, device, dtype)
        if variant.kernel not in ("auto", self.kernel):
            raise RuntimeError(f"kernel {variant.kernel} cannot run here")
        self.model = ReconstructionModel(backbone, kernel=self.kernel)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=4e-5, weight_decay=0.0, fused=True)

    def micro_batches(self, pairs: Sequence[Pair]) -> list[PairBatch]:
        """The rows divided among the fewest micro-batches within the budget, as `data/batches.py` does for a run."""
        lengths = np.array([[len(q.ids) + len(d.ids) for q, d in pairs]])
        count = max(1, -(-int(lengths.sum()) // self.budget))
        bins, loads = fill_bins(lengths, count)
        while loads.max() > self.budget and count < len(pairs):
            count += 1
            bins, loads = fill_bins(lengths, count)
        return [self._pack([p for p, b in zip(pairs, bins[0], strict=True) if b == index]) for index in range(count)]

    @staticmethod
    def _pack(pairs: Sequence[Pair]) -> PairBatch:
        queries, documents = zip(*pairs, strict=True)
        starts = [np.array([t.content_start for t in side], dtype=np.int32) for side in (queries, documents)]
        return pack_pairs(
            [t.ids for t in queries],
            [t.ids for t in documents],
            *starts,
            eos_token_id=padded_baseline.EOS_ID,
            targets="text",
        )

    def losses(self, pairs: Sequence[Pair], backward: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean D2Q and Q2D losses of the rows; gradients accumulate if asked for."""
        batches = self.micro_batches(pairs)
        num_query = sum(batch.num_query_targets for batch in batches)
        num_document = sum(len(batch.target_ids) for batch in batches) - num_query
        sums = []
        for batch in batches:
            if self.device.type == "cuda":
                batch = batch.pin().to(self.device)
            out = self.model(batch, 0.8 / num_query, 0.2 / num_document)
            if backward:
                out.loss.backward()
            sums.append(torch.stack([out.d2q_sum, out.q2d_sum]))
        d2q, q2d = torch.stack(sums).sum(0)
        return d2q / num_query, q2d / num_document

    def step(self, pairs: Sequence[Pair]) -> float:
        d2q, q2d = self.losses(pairs, backward=True)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(0.8 * d2q + 0.2 * q2d)


def tokenise(folder: Path, rows: Sequence[Row], max_seq_length: int) -> list[Pair]:
    encoder = TextEncoder(load_tokenizer(folder), TEMPLATE, max_seq_length)
    queries = encoder.encode_batch([query for query, _ in rows], INSTRUCTION)
    return list(zip(queries, encoder.encode_batch([document for _, document in rows], None), strict=True))


def make_model(out: Path, tokenizer: Path, hidden: int, layers: int, full_size: bool, dtype: torch.dtype) -> Path:
    """A random-weight Qwen3 with the real vocabulary: Qwen3-0.6B's shape, or a small one."""
    import shutil

    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = dict(QWEN3_0_6B)
    if not full_size:
        shape |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "head_dim": 32,
                  "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64,
                  "initializer_range": hidden**-0.5}  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**shape)).to(dtype).save_pretrained(out)  # type: ignore[arg-type]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / name)
    return out


def timed(step: Callable[[], float], device: torch.device) -> float:
    """Wall seconds of one step, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device, given_tflops: float | None) -> float:
    """Peak FLOP/s: as given; 989e12 (dense bf16, H100/H200 SXM data sheet) on a GPU; a measured product on a CPU."""
    if given_tflops:
        return given_tflops * 1e12
    if device.type == "cuda":
        return 989e12
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / min(timed(lambda: float((a @ a)[0, 0]), device) for _ in range(4))


def peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    # VmHWM, not getrusage: a child's ru_maxrss starts at its parent's on Linux.
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in status.splitlines() if line.startswith("VmHWM"))


@dataclass(frozen=True)
class Setting:
    """What both sides share."""

    model: Path
    max_seq_length: int
    device: torch.device
    dtype: torch.dtype
    baseline_attention: str


def baseline(setting: Setting) -> PaddedTrainer:
    return PaddedTrainer(
        setting.model, max_seq_length=setting.max_seq_length, device=str(setting.device), dtype=setting.dtype,
        attn_implementation=setting.baseline_attention,
    )  # fmt: skip


def memory_of(side: str, setting: Setting, variant: Variant, steps_file: Path) -> dict[str, float]:
    """Run by a process of its own: peak memory over these steps, and what was there before the first one."""
    steps = json.loads(steps_file.read_text())
    if side == "baseline":
        padded = baseline(setting)
        before = peak_memory_gb(setting.device)
        for rows in steps["rows"]:
            padded.step(rows)
    else:
        packed = PackedTrainer(setting.model, variant, setting.device, setting.dtype)
        before = peak_memory_gb(setting.device)
        for ids in steps["ids"]:
            packed.step([(_text(query), _text(document)) for query, document in ids])
    return {"loaded_gb": before, "peak_gb": peak_memory_gb(setting.device)}


def _text(ids: list[int]) -> TokenisedText:
    return TokenisedText(np.array(ids, dtype=np.int32), 0, len(ids))


def compare(
    setting: Setting, variant: Variant, steps: list[list[Row]], repeats: int, peak: float, *, anchor_only: bool = False
) -> dict[str, Any]:
    """Time both sides on every step's rows, `repeats` times, taking turns; the first round is a warm-up."""
    theirs = None if anchor_only else baseline(setting)  # before ours: what Liger patches it patches for both
    ours = PackedTrainer(setting.model, variant, setting.device, setting.dtype)
    pairs = [tokenise(setting.model, rows, setting.max_seq_length) for rows in steps]
    difference = None
    if theirs is not None:
        with torch.no_grad():
            want = [float(x) for x in theirs.losses(steps[0])]
            got = [float(x) for x in ours.losses(pairs[0])]
        difference = max(abs(w - g) / abs(w) for w, g in zip(want, got, strict=True))

    seconds: dict[str, list[float]] = {"anchor": []} if theirs is None else {"baseline": [], "anchor": []}
    for repeat in range(repeats + 1):
        total = dict.fromkeys(seconds, 0.0)
        for rows, ids in zip(steps, pairs, strict=True):
            turns: list[tuple[str, Callable[[], float]]] = [("anchor", lambda ids=ids: ours.step(ids))]  # type: ignore[misc]
            if theirs is not None:
                turns.insert(0, ("baseline", lambda rows=rows: theirs.step(rows)))  # type: ignore[misc]
            for side, step in turns if repeat % 2 else turns[::-1]:
                total[side] += timed(step, setting.device)
        if repeat:
            for side, value in total.items():
                seconds[side].append(value)

    config = json.loads((setting.model / "config.json").read_text())
    shape = flops.ModelShape.from_config(config)
    flat = [pair for step in pairs for pair in step]
    lengths = [np.array([len(pair[side].ids) for pair in flat]) for side in (0, 1)]
    targets = sum(int((t.ids[:-1] != padded_baseline.EOS_ID).sum()) for pair in flat for t in pair)
    needed = flops.objective_flops(shape, *lengths, num_targets=targets)
    square = not setting.baseline_attention.startswith("flash")
    done = padded_flops(shape, *lengths, len(steps[0]), square_attention=square)
    report: dict[str, Any] = {"variant": variant.name, "kernel": ours.kernel, "loss_difference": difference}
    for side, values in seconds.items():
        typical = statistics.median(values)
        report[side] = {
            "pairs_per_s": len(flat) / typical,
            "tokens_per_s": sum(int(n.sum()) for n in lengths) / typical,
            "model_tflops_per_s": needed / typical / 1e12,
            "mfu": flops.mfu(needed, typical, peak),
            "seconds": values,
        }
    if theirs is not None:
        report["ratio"] = statistics.median(b / a for b, a in zip(seconds["baseline"], seconds["anchor"], strict=True))
    report["bound"] = done / needed
    report["needed_tflop"], report["baseline_tflop"] = needed / 1e12, done / 1e12
    if variant.compile:
        report["compilations"] = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    return report


def memory_report(setting: Setting, variant: Variant, steps: list[list[Row]], scratch: Path) -> dict[str, Any]:
    """Both sides' memory, each in a fresh process on the same rows: text for the baseline, ids for anchor."""
    out: dict[str, Any] = {}
    pairs = [tokenise(setting.model, rows, setting.max_seq_length) for rows in steps]
    ids = [[[text.ids.tolist() for text in pair] for pair in step] for step in pairs]
    steps_file = scratch / "steps.json"
    steps_file.write_text(json.dumps({"rows": steps, "ids": ids}))
    for side in ("baseline", "anchor"):
        command = [sys.executable, __file__, *sys.argv[1:], "--model", str(setting.model), "--memory-of", side]
        command += ["--variant-json", json.dumps(variant.__dict__), "--steps-file", str(steps_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            out[side] = {"failed": done.stderr.strip().splitlines()[-1:]}
            continue
        out[side] = json.loads(done.stdout.splitlines()[-1])
    if all("peak_gb" in out[side] for side in out):
        out["ratio"] = out["anchor"]["peak_gb"] / out["baseline"]["peak_gb"]
    return out


def machine() -> dict[str, Any]:
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "command": " ".join(["python", "benchmarks/train_throughput.py", *sys.argv[1:]])}  # fmt: skip


def show(report: dict[str, Any]) -> None:
    print(f"\n{report['data']}  length {report['max_seq_length']}  {report['rows']} rows/step  "
          f"variant {report['variant']}  kernel {report['kernel']}")  # fmt: skip
    for side in (side for side in ("baseline", "anchor") if side in report):
        line, memory = report[side], report.get("memory", {}).get(side, {})
        print(f"  {side:9s} {line['pairs_per_s']:9.2f} pairs/s {line['tokens_per_s']:11.0f} tokens/s "
              f"{line['model_tflops_per_s']:8.3f} TFLOP/s  MFU {line['mfu']:6.1%}  "
              f"peak {memory.get('peak_gb', float('nan')):.2f} GB")  # fmt: skip
    if "ratio" not in report:
        return
    print(f"  ratio {report['ratio']:.2f}, arithmetic allows {report['bound']:.2f} "
          f"({report['ratio'] / report['bound']:.2f} of it); losses differ by {report['loss_difference']:.1e}"
          + (f"; memory {report['memory']['ratio']:.2f} of it" if "ratio" in report.get("memory", {}) else "")
          + (f"; {report['compilations']} compilations" if "compilations" in report else ""), flush=True)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", type=Path, help="save_to_disk folder or .jsonl; may be repeated")
    parser.add_argument("--model", type=Path, help="model folder; default: random weights in --hidden/--layers")
    parser.add_argument("--full-size", action="store_true", help="random weights in the shape of Qwen3-0.6B")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "data/tokenizer", help="folder with tokenizer.json")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8, help="rows per step, of both sides")
    parser.add_argument("--steps", type=int, default=3, help="different steps' rows in a round")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after the warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=None, help="tokens a micro-batch: 16384 (GPU), 4096 (CPU)")
    parser.add_argument("--variants", choices=("default", "all"), default="default")
    parser.add_argument("--baseline-attention", default=None, help="default: flash_attention_2 if installed, else sdpa")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the GPU")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", choices=("baseline", "anchor"), help=argparse.SUPPRESS)
    parser.add_argument("--variant-json", help=argparse.SUPPRESS)
    parser.add_argument("--steps-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--anchor-only", action="store_true", help="leave the baseline out")
    args = parser.parse_args()
    args.data = args.data or [SHARED / "data/pairs/train_ko_en"]
    return args


def main() -> None:
    args = arguments()
    import importlib.util

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = args.baseline_attention or (
        "flash_attention_2" if device.type == "cuda" and importlib.util.find_spec("flash_attn") else "sdpa"
    )
    base = Variant(budget=args.budget or (16384 if device.type == "cuda" else 4096))
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or make_model(Path(scratch), args.tokenizer, args.hidden, args.layers, args.full_size, dtype)
        padded_baseline.EOS_ID = load_tokenizer(model).token_to_id("<|im_end|>")
        setting = Setting(model, args.max_seq_length, device, dtype, attention)
        if args.memory_of:
            variant = Variant(**json.loads(args.variant_json))
            print(json.dumps(memory_of(args.memory_of, setting, variant, args.steps_file)))
            return
        if args.variants == "all":
            run_each_alone(args, model, variants_for("all", base), Path(scratch))
            return
        if args.variant_json:
            base = Variant(**json.loads(args.variant_json))
        groups = {}
        for path in args.data:
            rows = read_rows(path)
            order = np.random.default_rng(args.seed).permutation(len(rows))[: args.rows * args.steps]
            groups[path] = [[rows[i] for i in part] for part in order.reshape(args.steps, args.rows)]
        run_one(args, setting, groups, base, Path(scratch))


def run_each_alone(args: argparse.Namespace, model: Path, variants: list[Variant], scratch: Path) -> None:
    """One process a variant, the baseline beside the first alone: Liger patches transformers' modules for good, and
    what an out-of-memory leaves behind belongs to nobody else."""
    reports: list[dict[str, Any]] = []
    for index, variant in enumerate(variants):
        file = scratch / "variant.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--variants", "default", "--model", str(model)]
        command += ["--variant-json", json.dumps(variant.__dict__), "--json", str(file)]
        command += ["--anchor-only", "--no-memory"] if index else []
        done = subprocess.run(command)
        if done.returncode == 0 and file.exists():
            reports += json.loads(file.read_text())["reports"]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "reports": reports}, indent=2) + "\n")


def run_one(
    args: argparse.Namespace, setting: Setting, groups: dict[Path, list[list[Row]]], variant: Variant, scratch: Path
) -> None:
    """One variant on every data set."""
    peak = peak_flops(setting.device, args.peak_tflops)
    print(json.dumps({**machine(), "peak_tflops": peak / 1e12}))
    reports = []
    for path, steps in groups.items():
        try:
            report = compare(setting, variant, steps, args.repeats, peak, anchor_only=args.anchor_only)
        except (RuntimeError, ImportError) as error:  # no such kernel, out of memory: said
            print(f"\n{path.name}  variant {variant.name}: not run ({str(error).splitlines()[0]})", flush=True)
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        report |= {"data": path.name, "max_seq_length": args.max_seq_length, "rows": args.rows, "steps": args.steps}
        if not args.no_memory:
            report["memory"] = memory_report(setting, variant, steps, scratch)
        show(report)
        reports.append(report)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "reports": reports}, indent=2) + "\n")


if __name__ == "__main__":
    main()
