"""Bytes and launches of one micro-batch of the real training step, counted without a card.

    python benchmarks/step_traffic.py [--path stock|compile|liger] [--json]

Qwen3-0.6B, bf16, 40 pairs, 16,384 tokens. The model's own forward and backward run on fake tensors, and every operator
that reaches PyTorch's dispatcher is counted: each tensor it reads and each it writes once, views nothing. A model of
one layer and one of two are traced; their difference is one layer, exactly, and 28 of them are added up.

*Counted*: operators, tensor sizes, DeepSpeed's synchronisations and launches (its real engine, two ranks that do not
exist, 28 narrow layers on a CPU: launches depend on the number of parameter tensors, bytes are linear in their size).
Not seen by a trace, and so taken from the kernel's own documentation: attention (q, k, v, output and log-sum-exp once),
the output layer's kernel (two reads, one write: anchor_cli/model/softmax_kernel.py), Liger's kernels (LIGER below).
With `--path compile` a layer's operators are replaced by the kernels that inductor's scheduler makes of them for CUDA
(compiled_traffic.py; needs triton, no card). *Estimated*: launches a library operator hides, and the time: a roofline
with the assumptions of RATES. Nothing here is measured on a card.

The fake tensors live on the CPU device, because a CPU build of torch cannot run autograd for CUDA ones; CUDA's kernels
are asked for by name. Device memory only: an operator that would hit in the L2 cache is counted all the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from anchor_cli.model.attention import PACKED_ATTENTION, register  # noqa: E402
from anchor_cli.model.output_layer import CHUNK_BYTES_CUDA  # noqa: E402
from anchor_cli.model.packed import PairBatch, pack_pairs  # noqa: E402
from anchor_cli.model.pooling import prune_last_layer  # noqa: E402
from anchor_cli.model.reconstruction import ReconstructionModel  # noqa: E402
from anchor_cli.plan.flops import ModelShape, attention_flops, causal_pairs, objective_flops  # noqa: E402

QWEN3_0_6B = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "model_type": "qwen3",
}  # fmt: skip
LENGTHS = (42, 367)
"""Mean query and document at length 512 (docs/performance.md); 40 such pairs and 24 tokens more are 16,384 tokens."""
GROUPS = ("matrix products", "attention", "elementwise", "softmax and table")


@dataclass(frozen=True)
class Rates:
    """Assumptions of the time estimate, for an H100 SXM; none is measured here (benchmarks/gpu measures them)."""

    peak_tflops: float = 989.0
    matrix_share: float = 0.72  # of the peak, for products of 16k rows and 1,024 to 3,072 columns
    attention_tflops: float = 250.0  # causal, texts of some hundred tokens, forward and backward together
    memory_tb_s: float = 2.85  # 85% of 3.35
    launch_s: float = 3e-6  # shortest time between two kernels on the device
    link_gb_s: float = 300.0  # NVLink bridge, one direction; the reduction is not hidden (overlap_comm false)


@dataclass
class Traffic:
    """Bytes and launches by group, matrix FLOPs, and bytes and launches by operator."""

    bytes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    matrix_flops: float = 0.0
    operators: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def plus(self, other: Traffic, times: float) -> Traffic:
        made = Traffic(matrix_flops=self.matrix_flops + times * other.matrix_flops)
        for name in ("bytes", "launches"):
            ours, theirs, out = getattr(self, name), getattr(other, name), getattr(made, name)
            for key in {*ours, *theirs}:
                out[key] = ours.get(key, 0.0) + times * theirs.get(key, 0.0)
        for key in {*self.operators, *other.operators}:
            pairs = zip(self.operators.get(key, [0, 0]), other.operators.get(key, [0, 0]), strict=True)
            made.operators[key] = [a + times * b for a, b in pairs]
        return made


# -- counting --------------------------------------------------------------------------------------------------------

LAUNCHES = {  # of operators that are several kernels on CUDA; estimated from their sources
    "aten.embedding_dense_backward": 8,  # sort of the ids (radix, several passes), segments, gradient
    "torch_attn._varlen_attn": 2, "torch_attn._varlen_attn_backward": 4,  # forward, zeros; dO·O, dq dk dv, two casts
    "aten.cat": 1, "aten.sum": 1, "aten.index_add": 2, "aten.index_put": 4,
}  # fmt: skip
FREE = {"aten.detach", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "prim.device",
        "aten._unsafe_view", "aten.alias"}  # fmt: skip
WRITE_ONLY = {"aten.zero_", "aten.fill_", "aten.zeros", "aten.zeros_like", "aten.new_zeros", "aten.ones_like",
              "aten.ones", "aten.full", "aten.arange", "aten.copy_"}  # fmt: skip
ROWS_ONLY = {"aten.embedding", "aten.index", "aten.gather", "aten.index_select"}  # read as much as they write
MATRIX = ("aten.mm", "aten.addmm", "aten.bmm", "anchor.add_product_")
OURS = {"anchor.softmax_gradient_": (2, 1)}  # (reads, writes) of the first argument


def touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return int(count) * tensor.element_size()


def is_view(function: Any) -> bool:
    """Outputs that alias inputs and nothing written: no kernel runs."""
    schema = function._schema
    aliased = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return aliased and not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)


def operator_bytes(name: str, function: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes read and written, every distinct tensor once each way."""
    leaves = torch.utils._pytree.tree_leaves
    written = [t for t in leaves(out) if isinstance(t, torch.Tensor)]
    inputs = {id(t): t for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    if name in OURS:
        reads, writes = OURS[name]
        return (reads + writes) * touched(args[0])
    for argument, value in zip(function._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
            written.append(value)
    outputs = {id(t): t for t in [*written, *leaves(kwargs.get("out"))] if isinstance(t, torch.Tensor)}
    total = sum(touched(t) for t in outputs.values())
    if name in WRITE_ONLY:
        return total + sum(touched(t) for key, t in inputs.items() if key not in outputs)
    if name in ROWS_ONLY:
        return 2 * total + touched(args[1] if isinstance(args[1], torch.Tensor) else written[0])
    only_out = {id(t) for t in leaves(kwargs.get("out"))} if name != "anchor.add_product_" else set()
    return total + sum(touched(t) for key, t in inputs.items() if key not in only_out)


class Count(TorchDispatchMode):
    """Adds every operator to `traffic`. `group` is set while the output layer runs; tables are known by their size."""

    def __init__(self, table_numel: int) -> None:
        super().__init__()
        self.traffic, self.group, self.table_numel, self.paused = Traffic(), "", table_numel, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = f"{function.namespace}.{function._schema.name.split('::')[1]}"
        if not self.paused and name not in FREE and not is_view(function):
            self.add(name, function, args, kwargs, out)
        return out

    def add(self, name: str, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        moved = operator_bytes(name, function, args, kwargs, out)
        if not moved:
            return
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        group = "elementwise"
        if name in MATRIX:
            group, factors = "matrix products", tensors[:2] if name in ("aten.mm", "aten.bmm") else tensors[1:3]
            self.traffic.matrix_flops += 2 * math.prod(factors[0].shape) * factors[1].shape[-1]
        elif "varlen_attn" in name:
            group = "attention"
        elif self.group or any(t.numel() == self.table_numel for t in tensors):
            group = "softmax and table"
        self.count(name, group, moved, LAUNCHES.get(name, 1))

    def count(self, name: str, group: str, moved: float, launches: float = 1) -> None:
        self.traffic.bytes[group] += moved
        self.traffic.launches[group] += launches
        self.traffic.operators[name][0] += moved
        self.traffic.operators[name][1] += launches


# -- the step --------------------------------------------------------------------------------------------------------


def batch_of_pairs(num_pairs: int, lengths: tuple[int, int], extra: int) -> PairBatch:
    """Pairs of equal length, the last document longer by `extra` tokens."""
    chance = np.random.default_rng(0)
    queries = [chance.integers(3, 999, lengths[0]).astype(np.int32) for _ in range(num_pairs)]
    documents = [chance.integers(3, 999, lengths[1]).astype(np.int32) for _ in range(num_pairs)]
    documents[-1] = chance.integers(3, 999, lengths[1] + extra).astype(np.int32)
    starts = np.zeros(num_pairs, np.int32)
    return pack_pairs(queries, documents, starts, starts, eos_token_id=2, targets="text")


def trace(num_layers: int, path: str, batch: PairBatch, pruned: bool = False) -> Traffic:
    """Forward and backward of a model with so many layers, the last pruned in the encode pass or not."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    register()
    config = Qwen3Config(**{k: v for k, v in QWEN3_0_6B.items() if k != "model_type"} | {
        "num_hidden_layers": num_layers, "use_cache": False, "attn_implementation": PACKED_ATTENTION,
        "bos_token_id": None, "eos_token_id": None})  # fmt: skip
    fake = FakeTensorMode()
    with fake:
        language_model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model = ReconstructionModel(language_model, kernel="varlen")
    model.output_layer.fused = path != "stock"
    if path == "compile":  # the final norm is counted as compiled, too
        language_model.get_decoder().norm = torch.nn.Identity()
    if path == "stock":
        model.output_layer.chunk_targets = CHUNK_BYTES_CUDA // (4 * config.vocab_size)
    moved = batch.texts.map(fake.from_tensor), batch.recon.map(fake.from_tensor)
    if pruned:
        prune_last_layer(language_model)
    tensors = [batch.first_slots, batch.content_starts, batch.target_slots, batch.target_ids]
    packed = PairBatch(*moved, *(fake.from_tensor(t) for t in tensors), batch.num_query_targets)
    counter = Count(config.vocab_size * config.hidden_size)
    with ExitStack() as stack:
        if path == "liger":
            stack.enter_context(liger_kernels(language_model, counter))
        stack.enter_context(fake)
        stack.enter_context(marked(model.output_layer, counter))
        stack.enter_context(counter)
        model(packed, 0.01, 0.01).loss.backward()
    return counter.traffic


@contextmanager
def marked(output_layer: torch.nn.Module, counter: Count) -> Iterator[None]:
    """Everything that the output layer's forward runs belongs to the softmax."""
    forward = output_layer.forward

    def run(*args: Any) -> Any:
        counter.group = "softmax"
        try:
            return forward(*args)
        finally:
            counter.group = ""

    output_layer.forward = run  # type: ignore[method-assign]
    yield
    output_layer.forward = forward  # type: ignore[method-assign]


LIGER = {  # kernel: names of the tensors that it reads and writes, read off liger-kernel 0.8.5
    "_rms_norm_forward_kernel": ("X_ptr", "Y_ptr"), "_block_rms_norm_forward_kernel": ("X_ptr", "Y_ptr"),
    "_rms_norm_backward_kernel": ("dY_ptr", "X_ptr", "dX_ptr"),
    "_block_rms_norm_backward_kernel": ("dY_ptr", "X_ptr", "dX_ptr"),
    "_triton_rope": ("q_ptr", "k_ptr", "q_ptr", "k_ptr"),
    "_swiglu_forward_kernel": ("a_ptr", "b_ptr", "c_ptr"),
    "_swiglu_backward_kernel": ("dc_ptr", "a_ptr", "b_ptr", "a_ptr", "b_ptr"),
}  # fmt: skip


@contextmanager
def liger_kernels(model: Any, counter: Count) -> Iterator[None]:
    """Liger applied as `anchor train` does; its launches are counted by their arguments and not made."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from anchor_cli.model.backbone import apply_liger

    def launcher(self: Any, grid: Any) -> Any:
        name = getattr(self, "__name__", None) or self.fn.__name__

        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            counter.count(f"liger.{name}", "elementwise", sum(touched(given[n]) for n in LIGER[name]))

        return launch

    kept = {kind: kind.__getitem__ for kind in (JITFunction, InterpretedFunction)}
    for kind in kept:
        kind.__getitem__ = launcher
    try:
        if not apply_liger(model):
            raise SystemExit("liger-kernel is not installed")
        yield
    finally:
        for kind, original in kept.items():
            kind.__getitem__ = original


def step_traffic(path: str, batch: PairBatch) -> Traffic:
    """The whole model's micro-batch: one layer's share added up, less what the pruned last layer leaves out."""
    one, two = (trace(count, path, batch) for count in (1, 2))
    layer = two.plus(one, -1)
    rest = one.plus(layer, -1)
    left_out = Traffic() if path == "stock" else trace(1, path, batch, pruned=True).plus(one, -1)
    if path == "compile":
        from compiled_traffic import compiled_traffic

        from anchor_cli.model.rotary_kernel import ROWS

        tokens = len(batch.texts.input_ids), len(batch.recon.input_ids)
        fused, passes = compiled_traffic(QWEN3_0_6B, tokens[0]), sum(tokens) / tokens[0]
        # both passes; and autograd's own sum of the two gradients of a layer's input, which no graph sees
        gradient_sum = 3 * 2 * tokens[0] * QWEN3_0_6B["hidden_size"]  # type: ignore[operator]
        # and what norm_rotate_backward adds up outside: a row of d fp32 values a program, written and read
        rows = tokens[0] * (QWEN3_0_6B["num_attention_heads"] + QWEN3_0_6B["num_key_value_heads"])  # type: ignore[operator]
        partial_sums = 2 * 4 * QWEN3_0_6B["head_dim"] * rows / ROWS  # type: ignore[operator]
        layer.bytes["elementwise"] = passes * (fused["layer"][0] + gradient_sum + partial_sums)
        layer.launches["elementwise"] = 2 * (fused["layer"][1] + 1 + 2)
        rest.bytes["elementwise"] += passes * fused["norm"][0]
        rest.launches["elementwise"] += 2 * fused["norm"][1]
        last = compiled_traffic(QWEN3_0_6B, tokens[0], len(batch.texts.lengths))
        left_out.bytes["elementwise"], left_out.launches["elementwise"] = (
            sum(last[part][at] - fused[part][at] for part in fused) for at in (0, 1)
        )
        layer.operators.clear()
        left_out.operators.clear()
    return rest.plus(layer, QWEN3_0_6B["num_hidden_layers"]).plus(left_out, 1)  # type: ignore[arg-type]


def estimate(
    traffic: Traffic, engine: dict[str, float], batch: PairBatch, rates: Rates, world_size: int
) -> dict[str, Any]:
    """Milliseconds of a step of one micro-batch by part, and the MFU that follows: a roofline, no measurement."""
    shape = ModelShape.from_config(QWEN3_0_6B)
    lengths = np.array(batch.texts.lengths)
    half = len(lengths) // 2
    useful = objective_flops(shape, lengths[:half], lengths[half:], len(batch.target_ids))
    memory = rates.memory_tb_s * 1e12
    scores = 3 * (attention_flops(shape, causal_pairs(lengths)) + attention_flops(shape, causal_pairs(lengths - 1)))
    parameters = shape.num_parameters
    state_bytes = (engine["reduction_bytes_per_parameter"] + engine["boundary_bytes_per_parameter"]) * parameters
    seconds = {
        "matrix products": traffic.matrix_flops / (rates.matrix_share * rates.peak_tflops * 1e12),
        "attention": max(scores / (rates.attention_tflops * 1e12), traffic.bytes["attention"] / memory),
        "elementwise": traffic.bytes["elementwise"] / memory,
        "softmax and table": traffic.bytes["softmax and table"] / memory,
        "optimizer and reduction": state_bytes / memory,
        "network": 2 * 4 * parameters * (world_size - 1) / world_size / (rates.link_gb_s * 1e9),
    }
    launches = (
        sum(traffic.launches.values()) + engine["boundary_launches"] + engine["reduction_launches_per_micro_batch"]
    )
    seconds["between launches"] = launches * rates.launch_s
    total = sum(seconds.values())
    work = useful / (rates.peak_tflops * 1e12)
    return {
        "milliseconds": {part: value * 1e3 for part, value in seconds.items()},
        "step_ms": total * 1e3,
        "estimated_mfu": work / total,
        "estimated_mfu_without_network": work / (total - seconds["network"]),
    }


def report(path: str, config: str) -> dict[str, Any]:
    """Everything that `--json` prints."""
    from engine_traffic import engine_traffic

    batch = batch_of_pairs(40, LENGTHS, 24)
    engine = engine_traffic(config)  # first: --path compile patches a card into this process
    traffic = step_traffic(path, batch)
    rates = Rates()
    made: dict[str, Any] = {
        "path": path,
        "tokens": len(batch.texts.input_ids),
        "elementwise_gb": traffic.bytes["elementwise"] / 1e9,
        "softmax_gb": traffic.bytes["softmax and table"] / 1e9,
        "launches": int(sum(traffic.launches.values())),
        "device_syncs_per_micro_batch": engine["device_syncs_per_micro_batch"],
        "boundary_launches": engine["boundary_launches"],
        "gb": {group: traffic.bytes[group] / 1e9 for group in GROUPS},
        "launches_by_group": {group: int(traffic.launches[group]) for group in GROUPS},
        "matrix_tflop": traffic.matrix_flops / 1e12,
        "engine": engine,
        "assumptions": asdict(rates),
    }
    return made | estimate(traffic, engine, batch, rates, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--path",
        choices=("compile", "liger", "fused-output", "stock"),
        default="compile",
        help="compile: the default on CUDA; fused-output: stock layers, the output layer's kernel",
    )
    parser.add_argument("--deepspeed", default="zero2_bf16", help="a name in ds_configs/ or a file")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--operators", action="store_true", help="the 30 operators that move most, of layers not compiled"
    )
    args = parser.parse_args()
    if args.operators:
        traffic = step_traffic(args.path, batch_of_pairs(40, LENGTHS, 24))
        for name, (moved, launches) in sorted(traffic.operators.items(), key=lambda item: -item[1][0])[:30]:
            print(f"{name:42s} {moved / 1e9:8.1f} GB {launches:6.0f} launches")
        return
    found = report(args.path, args.deepspeed)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(
        f"{args.path}: {found['tokens']} tokens, {found['launches']} launches, counted; nothing was measured on a card"
    )
    for group in GROUPS:
        print(f"  {group:24s} {found['gb'][group]:8.1f} GB {found['launches_by_group'][group]:6d} launches"
              f" {found['milliseconds'][group]:7.1f} ms (estimated)")  # fmt: skip
    for part in ("optimizer and reduction", "network", "between launches"):
        print(f"  {part:24s} {'':27s}{found['milliseconds'][part]:7.1f} ms (estimated)")
    print(f"  DeepSpeed: {found['device_syncs_per_micro_batch']:.0f} synchronisations a micro-batch,"
          f" {found['boundary_launches']} launches at the boundary")  # fmt: skip
    print(
        f"  estimated MFU {found['estimated_mfu']:.1%} of {Rates().peak_tflops:g} TFLOP/s,"
        f" step {found['step_ms']:.0f} ms"
    )


if __name__ == "__main__":
    main()
