"""The parts of run.py: each is a function that returns what it measured. `python benchmarks/gpu/parts.py NAME [--dry]`

Legend: T tokens of a micro-batch. Times are medians of some repeats between two synchronisations, first ones left out.
On a CPU (`--dry`) sizes are tiny and the figures mean nothing: it is the path that is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from kit import model_folder, packed, pairs_file, pairs_of_ids, pairs_of_kit, up_to  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
PEAK = 989e12  # dense bf16, H100 SXM and H200 (data sheet); 835e12 for H100 NVL


class Setting:
    """What every part gets."""

    def __init__(self, dry: bool, kit: Path, scratch: Path) -> None:
        self.dry, self.kit, self.scratch = dry, kit, scratch
        self.repeats = 2 if dry else 10

    def tokens(self, full: int) -> int:
        return 256 if self.dry else full

    def model(self) -> Path:
        return model_folder(self.scratch / "model", small=self.dry)

    def pairs(self) -> Any:
        if not self.dry and (self.kit / "ids.npz").exists():
            return pairs_of_kit(self.kit)
        return pairs_of_ids(8, 64) if self.dry else pairs_of_ids(512, 512)


def synchronised() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work: Callable[[], Any], repeats: int, warm: int = 2) -> float:
    """Median seconds of one call."""
    times = []
    for index in range(warm + repeats):
        start = synchronised()
        work()
        if index >= warm:
            times.append(synchronised() - start)
        else:
            synchronised()
    return statistics.median(times)


def memory_gb() -> dict[str, float]:
    if not CUDA:
        return {}
    return {
        "allocated_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def anchor(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "anchor_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})


# -- call 1 ----------------------------------------------------------------------------------------------------------


def host(setting: Setting) -> dict[str, Any]:
    """Versions, compiler, the signature of varlen attention, the doctor with gradients."""
    import inspect

    from torch.nn.attention import varlen

    versions = {}
    for name in ("triton", "liger_kernel", "flash_attn", "flash_attn_interface", "transformers", "deepspeed"):
        try:
            versions[name] = str(getattr(__import__(name), "__version__", "installed"))
        except Exception as error:
            versions[name] = f"no: {str(error)[:80]}"
    done = anchor("doctor", "--json", *([] if setting.dry else ["--gradients"]))
    return {
        "gpu": torch.cuda.get_device_name() if CUDA else None, "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "compiler": shutil.which("cc") or shutil.which("gcc"),
        "versions": versions, "varlen": str(inspect.signature(varlen.varlen_attn)),
        "doctor_exit": done.returncode,
        "doctor": json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout[-500:],
    }  # fmt: skip


def ceiling(setting: Setting) -> dict[str, Any]:
    """TFLOP/s of the model's matrix shapes alone: forward, gradient of the input, gradient of the weight."""
    found: dict[str, Any] = {}
    for T in [64] if setting.dry else [13000, 16384, 16896, 25344]:
        for rows, columns in ((1024, 2048), (1024, 1024), (2048, 1024), (1024, 3072), (3072, 1024)):
            if setting.dry:
                rows, columns = rows // 32, columns // 32
            x, w = (torch.randn(*s, device=DEVICE, dtype=DTYPE) for s in ((T, rows), (rows, columns)))
            y = torch.randn(T, columns, device=DEVICE, dtype=DTYPE)
            for name, work in (
                ("y=xw", lambda x=x, w=w: x @ w),
                ("dx", lambda y=y, w=w: y @ w.T),
                ("dw", lambda x=x, y=y: x.T @ y),
            ):
                seconds = seconds_of(work, setting.repeats)
                found[f"{T}x{rows}x{columns} {name}"] = round(2 * T * rows * columns / seconds / 1e12, 1)
    return {"tflops": found}


def attention(setting: Setting) -> dict[str, Any]:
    """Seconds of each kernel that can be chosen here, forward and with backward pass; grouped heads and repeated."""
    from anchor_cli.model.attention import KERNELS, Packing, choose_kernel

    sizes = [n for pair in up_to(setting.pairs(), setting.tokens(16384)) for n in (len(pair[0]), len(pair[1]))]
    bounds = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).to(torch.int32).to(DEVICE)
    found: dict[str, Any] = {"tokens": sum(sizes), "auto": choose_kernel("auto", DEVICE, DTYPE)}
    for name in KERNELS:
        if choose_kernel(name, DEVICE, DTYPE) != name:
            found[name] = "cannot be chosen here"
            continue
        for repeated in (False, True):
            heads = (16, 16, 16) if repeated else (16, 8, 8)
            parts = [torch.randn(sum(sizes), h, 128, device=DEVICE, dtype=DTYPE, requires_grad=True) for h in heads]
            packing = Packing(bounds, tuple(sizes), name)

            weight = torch.randn(sum(sizes), 16, 128, device=DEVICE, dtype=DTYPE)

            def forward(parts: Any = parts, packing: Any = packing, name: str = name) -> Any:
                return KERNELS[name](*parts, packing, 128**-0.5)

            def both(parts: Any = parts, weight: Any = weight, forward: Any = forward) -> None:
                torch.autograd.grad(forward(), parts, weight)

            label = f"{name}{' repeated' if repeated else ''}"
            try:
                found[label] = [seconds_of(work, setting.repeats) for work in (forward, both)]
            except Exception as error:
                found[label] = str(error)[:200]
    return found


def output(setting: Setting) -> dict[str, Any]:
    """The output layer: plain, and the kernel with chunks of 2,048 and 4,096 targets; seconds and peak memory."""
    from anchor_cli.model.output_layer import OutputLayer, kernel_works

    V, D, K = (500, 32, 64) if setting.dry else (151936, 1024, 16000)
    weight = torch.nn.Parameter(torch.randn(V, D, device=DEVICE, dtype=DTYPE) * 0.02)
    hidden = torch.randn(K, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    targets, weights = torch.randint(V, (K,), device=DEVICE), torch.full((K,), 1 / K, device=DEVICE)
    forms: list[tuple[str, int | None, bool]] = [("plain", None, False)]
    works = kernel_works(DEVICE, DTYPE)
    forms += [(f"kernel {c}", c, True) for c in ((16,) if setting.dry else (2048, 4096))] if works else []
    found: dict[str, Any] = {"kernel_works": works}
    for name, chunk, fused in forms:
        layer = OutputLayer(weight, chunk, fused)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

        def both(layer: Any = layer) -> None:
            layer(hidden, targets, weights)[0].backward()

        found[name] = {"seconds": seconds_of(both, setting.repeats), **memory_gb()}
    return found


def micro_batch(setting: Setting, path: str, tokens: int, profile: bool = False) -> dict[str, Any]:
    """Forward and backward of one micro-batch: seconds, MFU, memory against the plan's."""
    from anchor_cli.model.attention import choose_kernel
    from anchor_cli.model.backbone import load_backbone
    from anchor_cli.model.fusing import fuse
    from anchor_cli.model.reconstruction import ReconstructionModel
    from anchor_cli.plan.flops import ModelShape, objective_flops

    backbone = load_backbone(setting.model(), dtype=DTYPE).train()
    if path != "stock":
        backend = "eager" if setting.dry else "inductor"
        applied = fuse(backbone, path == "compile", path == "liger", DEVICE, DTYPE, backend=backend)
        if path == "liger" and not applied:
            return {"path": path, "skipped": "liger-kernel is not installed"}
    backbone.to(DEVICE)  # type: ignore[arg-type]
    model = ReconstructionModel(backbone, kernel=choose_kernel("auto", DEVICE, DTYPE))
    pairs = up_to(setting.pairs(), tokens)
    batch = packed(pairs)
    batch = batch.pin().to(DEVICE) if CUDA else batch

    def both() -> None:
        model(batch, 1e-4, 1e-4).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    start = synchronised()
    both()
    first = synchronised() - start
    seconds = seconds_of(both, setting.repeats)
    shape = ModelShape.from_config(json.loads((setting.model() / "config.json").read_text()))
    useful = objective_flops(shape, [len(q) for q, _ in pairs], [len(d) for _, d in pairs], len(batch.target_ids))
    made: dict[str, Any] = {"path": path, "tokens": len(batch.texts.input_ids), "kernel": model.kernel,
                            "first_s": first, "seconds": seconds, "mfu": useful / seconds / PEAK,
                            **memory_gb()}  # fmt: skip
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]) as trace:
            both()
            synchronised()
        order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
        made["profile"] = trace.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60).splitlines()
    return made


def stock(setting: Setting) -> dict[str, Any]:
    """Part 4: transformers' own layers."""
    return micro_batch(setting, "stock", setting.tokens(16384))


def liger(setting: Setting) -> dict[str, Any]:
    """Part 4: Liger's kernels, with what `anchor train` applies besides: queries and keys, the pruned last layer."""
    return micro_batch(setting, "liger", setting.tokens(16384))


def compiled(setting: Setting) -> dict[str, Any]:
    """Part 4: each layer by torch.compile, and one trace: where the time goes."""
    return micro_batch(setting, "compile", setting.tokens(16384), profile=True)


# -- call 2 ----------------------------------------------------------------------------------------------------------


def large(setting: Setting) -> dict[str, Any]:
    """The default path at 25k tokens, and one trace of the profiler."""
    return micro_batch(setting, "compile", setting.tokens(25344), profile=True)


def written_spec(setting: Setting, name: str, **keys: Any) -> Path:
    """A spec of its own output folder over the kit's pairs."""
    count, longest = (64, 48) if setting.dry else (4096, 512)
    steps = 3 if setting.dry else 30
    spec: dict[str, Any] = {
        "model_name_or_path": str(setting.model()), "experiment_id": name,
        "dataset_file_path": str(pairs_file(setting.scratch / "pairs.jsonl", count, longest)),
        "output_dir": str(setting.scratch / "out"), "max_seq_length": longest,
        "global_batch_size": 8 if setting.dry else 64,
        "max_steps": steps, "warmup_steps": 2, "eval_steps": 0, "save_steps": 0, "report_to": "none",
        "precision": "bfloat16" if CUDA else "float32", "deepspeed": "zero2_bf16" if CUDA else "zero2_fp32",
    }  # fmt: skip
    path = setting.scratch / f"{name}.json"
    path.write_text(json.dumps(spec | keys))
    return path


def trained(setting: Setting, name: str, processes: int = 1, environment: dict[str, str] | None = None,
            **keys: Any) -> dict[str, Any]:  # fmt: skip
    """One `anchor train` run and what its metrics say: medians after the first five steps."""
    spec = written_spec(setting, name, **keys)
    start = time.perf_counter()
    done = anchor("train", str(spec), "--nproc-per-node", str(processes), environment=environment)
    file = setting.scratch / "out" / name / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = [line for line in lines if "train/loss" in line]
    made: dict[str, Any] = {
        "exit": done.returncode,
        "wall_s": round(time.perf_counter() - start, 1),
        "steps": len(steps),
    }
    if done.returncode:
        return made | {"stderr": done.stderr.strip().splitlines()[-5:]}
    for key in ("perf/tokens_per_s", "perf/mfu", "perf/peak_memory_gb"):
        values = [line[key] for line in steps[len(steps) // 6 :] if line.get(key) is not None]
        if values:
            made[key] = statistics.median(values)
    return made | {"first_loss": steps[0]["train/loss"], "last_loss": steps[-1]["train/loss"]}


def ds_config(setting: Setting, name: str, **changes: Any) -> str:
    """A shipped config with changes, as a file."""
    raw = json.loads(
        (Path(__file__).parents[2] / f"ds_configs/{'zero2_bf16' if CUDA else 'zero2_fp32'}.json").read_text()
    )
    for path, value in changes.items():
        section, key = path.split("__")
        raw[section][key] = value
    file = setting.scratch / f"{name}-deepspeed.json"
    file.write_text(json.dumps(raw))
    return str(file)


def train(setting: Setting) -> dict[str, Any]:
    """`anchor train`, 30 steps of varying T: configs as they are, timers and check on, overlap on, fixed segments."""
    variants: dict[str, dict[str, Any]] = {
        "as_is": {},
        "timers_and_check": {"deepspeed": ds_config(setting, "timers", timers__throughput={"enabled": True},
                                                    **({"bf16__check_grad_overflow": True} if CUDA else {}))},
        "overlap": {"deepspeed": ds_config(setting, "overlap", zero_optimization__overlap_comm=True)},
        "fixed_segments": {"environment": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}},
    }  # fmt: skip
    if setting.dry:
        variants = {name: variants[name] for name in ("as_is",)}
    return {name: trained(setting, name, **keys) for name, keys in variants.items()}


def padded(setting: Setting) -> dict[str, Any]:
    """The padded baseline once, 16 rows of 512, in a process where nothing has been patched."""
    script = Path(__file__).parents[1] / "train_throughput.py"
    rows, length, size = (2, 48, ["--hidden", "64", "--layers", "1"]) if setting.dry else (16, 512, ["--full-size"])
    file = setting.scratch / "padded.json"
    data = pairs_file(setting.scratch / "rows.jsonl", 64, length, ("query", "document"))
    done = subprocess.run(
        [sys.executable, str(script), "--data", str(data), "--tokenizer", str(setting.model()), "--rows", str(rows),
         "--max-seq-length", str(length), "--steps", "1", "--repeats", "1", "--no-memory", "--json", str(file), *size],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not file.exists():
        raise SystemExit(f"train_throughput.py: {(done.stdout + done.stderr)[-400:]}".replace("\n", " | "))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def curve(setting: Setting) -> dict[str, Any]:
    """A small model's losses on the card and on the CPU, and a run that is resumed."""
    model = str(model_folder(setting.scratch / "small", small=True))
    keys: dict[str, Any] = {"model_name_or_path": model, "max_steps": 4 if setting.dry else 20, "max_seq_length": 48,
                            "precision": "float32", "deepspeed": "zero2_fp32", "global_batch_size": 8}  # fmt: skip
    made = {"card": trained(setting, "curve", **keys)}
    if CUDA:
        made["cpu"] = trained(setting, "curve-cpu", environment={"CUDA_VISIBLE_DEVICES": ""}, **keys)
    half = trained(setting, "resumed", stop_after_n_steps=keys["max_steps"] // 2, **keys)
    whole = trained(setting, "resumed", **keys)
    ends = [run.get("last_loss") for run in (whole, made["card"])]
    apart = None if None in ends else abs(ends[0] - ends[1])
    return made | {"half": half, "resumed": whole, "resumed_difference": apart}


def encode(setting: Setting) -> dict[str, Any]:
    """Texts encoded a second, by batches of 64 texts and by batches of tokens."""
    from anchor_cli.evaluate.embedder import load_embedder

    file = pairs_file(setting.scratch / "pairs.jsonl", 64 if setting.dry else 4096, 48 if setting.dry else 512)
    texts = [json.loads(line)["positive"] for line in file.read_text().splitlines()][: 16 if setting.dry else 2000]
    found = {}
    for tokens in (1024, 16384, 65536) if not setting.dry else (256,):
        embedder: Any = load_embedder(setting.model(), batch_tokens=tokens, device=DEVICE.type)
        found[f"{tokens} tokens a batch"] = len(texts) / seconds_of(lambda e=embedder: e.encode(texts, None), 1, warm=1)
    return {"texts": len(texts), "texts_per_s": found}


# -- two cards -------------------------------------------------------------------------------------------------------


def zero2(setting: Setting) -> dict[str, Any]:
    """KURE's cards: the shipped config."""
    return trained(setting, "zero2", 2)


def overlap(setting: Setting) -> dict[str, Any]:
    """The same with the reduction overlapped."""
    return trained(
        setting, "overlap2", 2, deepspeed=ds_config(setting, "overlap2", zero_optimization__overlap_comm=True)
    )


def zero1(setting: Setting) -> dict[str, Any]:
    """Gradients reduced once a step."""
    if not CUDA:
        return trained(setting, "zero1", 2, deepspeed=ds_config(setting, "zero1", zero_optimization__stage=1))
    return trained(setting, "zero1", 2, deepspeed="zero1_bf16")


def killed(setting: Setting) -> dict[str, Any]:
    """A rank that dies ends the run with an error, and soon; what was saved stands."""
    spec = written_spec(setting, "killed", max_steps=2000, save_steps=2, save_total_limit=1)
    command = [sys.executable, "-m", "anchor_cli", "train", str(spec), "--nproc-per-node", "2"]
    with (setting.scratch / "killed.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    folder, start = setting.scratch / "out/killed", time.monotonic()
    while not list(folder.glob("checkpoint-*")) and time.monotonic() - start < 300 and process.poll() is None:
        time.sleep(0.2)
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    victims = [int(line.split()[0]) for line in children.stdout.splitlines() if "anchor" in line or "python" in line]
    if victims:
        os.kill(victims[-1], 9)
    died = time.monotonic()
    try:
        code: int | None = process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        code = None
    return {"killed": bool(victims), "exit": code, "ended_after_s": round(time.monotonic() - died, 1),
            "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*"))}  # fmt: skip


def resume(setting: Setting) -> dict[str, Any]:
    """Two cards, then one: the losses go on."""
    steps = 4 if setting.dry else 30
    first = trained(setting, "elastic", 2, max_steps=steps, stop_after_n_steps=steps // 2)
    return {"two": first, "one": trained(setting, "elastic", 1, max_steps=steps)}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "host": host, "ceiling": ceiling, "attention": attention, "output": output, "stock": stock, "liger": liger,
    "compile": compiled, "large": large, "train": train, "padded": padded, "curve": curve, "encode": encode,
    "zero2": zero2, "overlap": overlap, "zero1": zero1, "killed": killed, "resume": resume,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    args = parser.parse_args()
    print(json.dumps(PARTS[args.part](Setting(args.dry, args.kit, args.scratch)), default=str))


if __name__ == "__main__":
    main()
