"""DeepSpeed under one thin adapter: processes, engine, the frame of an update. The steps are the objectives'."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.model.encoder import PackedEncoder
from anchor_cli.processes.gpus import on_gpu
from anchor_cli.processes.ranks import Ranks, complete_rendezvous, environment_ranks
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed_versions import TESTED, refused_deepspeed


def start_processes(timeout_s: float = 1800.0) -> Ranks:
    """Join the process group: NCCL on CUDA, gloo on CPU. Silences DeepSpeed's start-up chatter.

    Raises:
        InputError: more processes on this host than GPUs, or GPUs that torch cannot use.
    """
    rank, local_rank, world_size = environment_ranks() or (0, 0, 1)
    cuda = on_gpu()
    if cuda and local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(
            f"local rank {local_rank} has no GPU: this process sees {count}",
            hint=f"start {count} process{'es' if count > 1 else ''} on this host (--nproc-per-node, SLURM's"
            " --ntasks-per-node), and let each see all its GPUs (--gpus-per-node, not --gpus-per-task)",
        )
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    complete_rendezvous()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(world_size))
    with quiet_deepspeed() as deepspeed:
        if not cuda:
            # The shm all-reduce op would be compiled at first use (20-100 s, needs a compiler, and a build killed
            # midway leaves a lock on which every later start hangs); gloo alone does the same work on a CPU.
            # https://github.com/deepspeedai/DeepSpeed: comm/torch.py build_shm_op reads this table.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if cuda:
            torch.cuda.set_device(local_rank)
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
        )
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world_size > 1 else None
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(rank, local_rank, world_size, device, group)


def leave_processes() -> None:
    """Leave the process group in good order, at the end of a run."""
    dist.destroy_process_group()


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[Any]:
    """deepspeed, imported, with its prints on stderr and its log at warnings (stdout is for results)."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # DeepSpeed's calls of what torch renames: nothing that a user could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("ANCHOR_DEBUG") else open(os.devnull, "w")):
        import deepspeed

        with compiled_when_called(), contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if refusal := refused_deepspeed(deepspeed.__version__):
            raise InputError(refusal, hint=f"pip install deepspeed=={TESTED}")
        yield deepspeed


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """Functions decorated by torch.compile inside this block load the compiler at their first call, not at once.

    DeepSpeed decorates its Muon optimizer, which is not used here, at import: a third of the whole start-up (measured,
    docs/performance.md). https://github.com/deepspeedai/DeepSpeed: runtime/zero/muon/original_muon.py.
    """
    compile_now = torch.compile

    def later(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            compiled = compiled or compile_now(function)
            return compiled(*args, **kwargs)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


class NonFiniteGradient(RunError):
    """The gradient of a step is not finite; raised before the update, on every rank."""


def build_engine(
    model: PackedEncoder, spec: RunSpec, ds_config: dict[str, Any], device: torch.device
) -> tuple[Any, torch.optim.Optimizer]:
    """DeepSpeed's engine around the model, with AdamW, and the AdamW inside.

    Weight decay, where asked for, leaves out biases and norms (Hugging Face Trainer's rule).
    """
    stage = ds_config["zero_optimization"]["stage"]
    if stage == 0:
        raise InputError(
            f"deepspeed {spec.deepspeed}: ZeRO stage 0 is not supported: checkpoints are made of ZeRO's fp32 state",
            hint="use stage 1, which changes nothing on one GPU and saves memory on several",
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named], "weight_decay": spec.weight_decay}]
    if spec.weight_decay:
        decayed = [p for _, p in named if p.ndim > 1]
        rest = [p for _, p in named if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": spec.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]
    offloaded = "offload_optimizer" in ds_config["zero_optimization"]
    optimizer = torch.optim.AdamW(
        groups,
        lr=spec.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        # On the CPU, where offloaded states are updated: 12.9 -> 1.4 s for 596 M parameters (measured, 2 cores).
        fused=True if device.type == "cuda" or offloaded else None,
    )
    ds_config = {**ds_config, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    with quiet_deepspeed() as deepspeed:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    optimizer.register_step_pre_hook(lambda *_: refuse_non_finite(engine))
    return engine, optimizer


def refuse_non_finite(engine: Any) -> None:
    """Called by AdamW right before it changes weights: the norm of the whole gradient must be a number.

    DeepSpeed reports an infinite or NaN norm as -1 (stage_1_and_2.py, `scaled_global_norm`).
    """
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    if norm is not None and not (math.isfinite(value := float(norm)) and value >= 0):
        raise NonFiniteGradient(f"the gradient is not finite (norm {'inf or nan' if value == -1 else value})")


def begin_update(engine: Any, learning_rate: float) -> int:
    """Set the step's learning rate; the factor for each micro-batch's loss.

    DeepSpeed divides each backward by `gradient_accumulation_steps` and averages over ranks; one factor, world size x
    accumulation, undoes both, so what it accumulates is the plain sum of micro-batch losses, and those are shares of
    the step's loss already (tests/test_engine.py and `anchor doctor` compare with one plain backward).
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    undo: int = engine.world_size * engine.gradient_accumulation_steps()
    return undo


def finish_update(engine: Any) -> None:
    """After a step's last micro-batch. Raises NonFiniteGradient.

    DeepSpeed skips an update with such a gradient by itself, unless it is told not to look (bf16.check_grad_overflow):
    then the norm that `refuse_non_finite` sees stops it.
    """
    if getattr(engine.optimizer, "overflow", False):
        raise NonFiniteGradient("the gradient is not finite")
