"""The optimizer's state, elastic: fp32 weights and both moments by parameter name, never by rank.

DeepSpeed's own checkpoints are pickled, cut by rank and refused at another world size. Through its public
`safe_get_full_*` / `safe_set_full_*` calls the state is read and written one whole parameter at a time, so any
world size (and ZeRO stage) reads what any other wrote. Peak memory beyond training: one shard a rank, at most
`SHARD_BYTES` of state or one parameter's, whichever is larger.

Files: optimizer-00001-of-0000S.safetensors, tensors `{parameter}.fp32`, `.exp_avg`, `.exp_avg_sq`. S depends on
the model alone; shards are written by the ranks in turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from anchor_cli.base.checkpoints import OPTIMIZER_BYTES
from anchor_cli.base.errors import InputError

SHARD_BYTES = 2 * 2**30  # of fp32 state (12 bytes a weight)
MOMENTS = ("exp_avg", "exp_avg_sq")


def shards(names_and_sizes: list[tuple[str, int]]) -> list[list[str]]:
    """Parameters, in order, cut into shards of at most SHARD_BYTES of state (one larger parameter: its own shard)."""
    out: list[list[str]] = [[]]
    filled = 0
    for name, numel in names_and_sizes:
        size = OPTIMIZER_BYTES * numel
        if out[-1] and filled + size > SHARD_BYTES:
            out.append([])
            filled = 0
        out[-1].append(name)
        filled += size
    return out


def shard_name(index: int, count: int) -> str:
    return f"optimizer-{index + 1:05d}-of-{count:05d}.safetensors"


def parameters_of(engine: Any) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by their name in the language model (shared ones once)."""
    return {n: p for n, p in engine.module.language_model.named_parameters() if p.requires_grad}


def _full_numel(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves an empty tensor and the true size


def save_optimizer_state(engine: Any, folder: Path, rank: int, world_size: int) -> None:
    """Write the shards into `folder`. Every rank calls it; each writes its turn's shards."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameters = parameters_of(engine)
    problem: str | None = None
    plan = shards([(name, _full_numel(p)) for name, p in parameters.items()])
    for first in range(0, len(plan), world_size):
        mine: dict[str, torch.Tensor] = {}
        for turn, names in enumerate(plan[first : first + world_size]):
            for name in names:  # every rank takes part in putting a parameter together; its writer keeps it
                parameter = parameters[name]
                state = {"fp32": safe_get_full_fp32_param(parameter)}
                state |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                if turn == rank and problem is None:
                    mine |= {f"{name}.{key}": t.detach().cpu().contiguous().clone() for key, t in state.items()}
        if mine:
            try:
                save_file(mine, folder / shard_name(first + rank, len(plan)), metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                problem = str(error)
    if problem is not None:
        raise OSError(problem)


def load_optimizer_state(engine: Any, optimizer: torch.optim.Optimizer, folder: Path, step: int) -> None:
    """Put a checkpoint's state into an engine that has taken one step at learning rate 0 (so that state exists).

    Raises:
        InputError: a shard or a parameter is missing, or has another shape.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    files = sorted(folder.glob("optimizer-*-of-*.safetensors"))
    where: dict[str, Any] = {}
    for path in files:
        opened = safe_open(path, framework="pt")
        where |= dict.fromkeys(opened.keys(), opened)
    for name, parameter in parameters_of(engine).items():
        for key in ("fp32", *MOMENTS):
            if f"{name}.{key}" not in where:
                lacks = f"{folder}: the optimizer state lacks {name}.{key}"
                raise InputError(lacks, hint="resume from another checkpoint")
            value = where[f"{name}.{key}"].get_tensor(f"{name}.{key}").to(engine.device)
            if value.numel() != _full_numel(parameter):
                raise InputError(
                    f"{folder}: {name}.{key} has {value.numel()} numbers, the model {_full_numel(parameter)}",
                    hint="was the model replaced? resume with the model that the run began with",
                )
            if key == "fp32":
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(step)
        else:
            state["step"] = step
