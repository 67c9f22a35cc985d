"""From a spec to a run, top to bottom: contract, pairs, checkpoint, plan, model, engine, and the state to continue."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from anchor_cli.base.checkpoints import model_digest, newest_checkpoint, newest_whole, read_state
from anchor_cli.base.console import say, warn
from anchor_cli.base.contract import TextContract
from anchor_cli.base.cpu import SLOW_BFLOAT16, has_fast_bfloat16
from anchor_cli.base.errors import InputError
from anchor_cli.base.runs import lock_run
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.training_set import contract_for, require_contract_of, training_pairs
from anchor_cli.model.attention import choose_kernel, memory_kind
from anchor_cli.model.backbone import load_backbone
from anchor_cli.model.fusing import decide_fusing, fuse
from anchor_cli.plan.budget import Budget, choose_budget, fewest_micro_batches
from anchor_cli.plan.inputs import shape_of
from anchor_cli.plan.memory import Fused
from anchor_cli.plan.zero import state_options
from anchor_cli.processes.ranks import Ranks
from anchor_cli.processes.watchdog import Watchdog
from anchor_cli.spec import schedule
from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
from anchor_cli.spec.spec import NOT_OF_THE_RESULT, RunSpec
from anchor_cli.train.deepspeed import build_engine
from anchor_cli.train.optimizer_state import load_optimizer_state
from anchor_cli.train.run import Run
from anchor_cli.train.saving import require_room, sweep_partials
from anchor_cli.train.stages.objective import Objective, objective_of

_PATHS = frozenset({"model_name_or_path", "dataset_file_path"})  # moved folders are harmless: both have fingerprints
_BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"})


def start_run(spec: RunSpec, ranks: Ranks, spec_folder: Path, watchdog: Watchdog) -> Run:
    """The run of a spec, fresh or resumed. Data are prepared already; rank 0 chooses the checkpoint for all.

    Raises:
        InputError: on every rank, whatever of spec, data or checkpoint cannot work for any of them; before the model
            is loaded where possible.
    """
    watchdog.phase("start-up (data and checkpoint)", None)
    checkpoint: Path | None = None
    with ranks.refuse_together():
        contract = _contract(spec)
        pairs = training_pairs(spec, contract)
        if ranks.rank == 0:
            lock_run(spec.run_folder)
            sweep_partials(spec.run_folder)
            checkpoint = checkpoint_to_continue(spec, contract, pairs.fingerprint)
    chosen = ranks.broadcast(str(checkpoint) if checkpoint else None)
    run = build_run(spec, ranks, spec_folder, contract, pairs, Path(chosen) if chosen else None, watchdog)
    with ranks.refuse_together():
        if run.is_first:
            require_room(run)
    return run


def checkpoint_to_continue(spec: RunSpec, contract: TextContract, data_fingerprint: str) -> Path | None:
    """The newest whole checkpoint of this experiment, if any; newer damaged ones are named.

    Raises:
        InputError: it was made under another spec, contract or data set, or is further than the run shall go.
    """
    checkpoint, damaged = newest_whole(spec.run_folder)
    for line in damaged:
        warn(line)
    if checkpoint is None:
        if damaged:
            warn("no whole checkpoint is left; training starts from the beginning")
        return None
    state = read_state(checkpoint)
    changed = differences_that_matter(state["spec"], spec.model_dump(), state["global_batch_size"])
    if is_another_model(spec, state):
        changed.append(f"model_name_or_path: {spec.model_name_or_path} is another model than it began with")
    if state["data_fingerprint"] != data_fingerprint:
        changed.append("the training data are not the ones it began with")
    if changed:
        raise InputError(
            f"{checkpoint}: this experiment began with another spec: {'; '.join(changed)}",
            hint="put the values back, or give the new run its own experiment_id",
        )
    require_contract_of(checkpoint, contract)
    refuse_to_stop_before(spec, checkpoint, int(state["step"]))
    return checkpoint


def _contract(spec: RunSpec) -> TextContract:
    """`contract_for`; a run whose start model is gone goes on from its own checkpoint. Raises InputError."""
    try:
        return contract_for(spec)
    except InputError as error:
        own = newest_checkpoint(spec.run_folder)
        if own is None or Path(spec.model_name_or_path).expanduser().exists():
            raise
        raise InputError(error.message, f"to go on without it, set model_name_or_path to {own}") from error


def is_another_model(spec: RunSpec, state: dict[str, Any]) -> bool:
    """Whether the spec names another start model than that of the checkpoint; a checkpoint of the same run is none."""
    model = Path(spec.model_name_or_path).expanduser()
    if "start_model" in state and spec.run_folder.resolve() not in model.resolve().parents:
        return bool(state["start_model"] != model_digest(spec.model_name_or_path))
    return False


def differences_that_matter(old: dict[str, Any], new: dict[str, Any], global_batch_size: int) -> list[str]:
    """`key: old -> new` for every key the result depends on. The global batch stays what the run began with."""
    changed = []
    for key in new:
        if key in NOT_OF_THE_RESULT | _PATHS | _BATCH:
            continue
        was = old.get(key, RunSpec.model_fields[key].default)  # a key that was not there yet had its default
        if was != new[key]:
            before, after = (json.dumps(value, ensure_ascii=False) for value in (was, new[key]))
            changed.append(f"{key}: {before} -> {after}")
    if new["global_batch_size"] is not None:
        if new["global_batch_size"] != global_batch_size:
            changed.append(f"global_batch_size: {global_batch_size} -> {new['global_batch_size']}")
    elif old["global_batch_size"] is None:
        before, after = (
            keys["per_device_train_batch_size"] * keys["gradient_accumulation_steps"] for keys in (old, new)
        )
        if before != after:
            changed.append(f"per_device_train_batch_size x gradient_accumulation_steps: {before} -> {after}")
    else:
        changed.append(f"global_batch_size: {global_batch_size} -> null")
    return changed


def refuse_to_stop_before(spec: RunSpec, checkpoint: Path, step: int) -> None:
    """A run that is further than `stop_after_n_steps` has nothing to do. Raises InputError."""
    if spec.stop_after_n_steps and spec.stop_after_n_steps < step:
        raise InputError(
            f"stop_after_n_steps: {spec.stop_after_n_steps}, but {checkpoint} has {step} steps already",
            hint=f"take it out, or set it to more than {step}",
        )


def build_run(
    spec: RunSpec,
    ranks: Ranks,
    spec_folder: Path,
    contract: TextContract,
    pairs: PreparedPairs,
    checkpoint: Path | None,
    watchdog: Watchdog,
) -> Run:
    """Plan, model, engine; with a `checkpoint`, its weights and its optimizer's state."""
    state = read_state(checkpoint) if checkpoint else {}
    raw = load_ds_config(spec.deepspeed, spec_folder)
    if spec.precision == "bfloat16" and ranks.device.type == "cpu" and ranks.rank == 0 and not has_fast_bfloat16():
        warn(f"{SLOW_BFLOAT16}; precision: float32 is for this host")
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    kernel = choose_kernel(spec.attn_implementation, ranks.device, dtype)
    objective = objective_of(spec, contract, pairs, ranks)
    split = (raw.get("zero_optimization") or {}).get("stage") == 3
    host = ranks.device, dtype
    fusing = decide_fusing(spec.torch_compile, spec.liger, spec.model_name_or_path, *host, split_weights=split)
    global_batch = state.get("global_batch_size", spec.global_batch(ranks.world_size))
    fused: Fused = "compiled" if fusing[0] else "liger" if fusing[1] else "none"
    budget = budget_of(spec, objective, global_batch, ranks, raw, kernel, fused=fused)
    total = schedule.total_steps(pairs.num_rows, global_batch, spec.num_train_epochs, spec.max_steps)
    keys = {"seed": spec.seed, "global_batch_size": global_batch, "world_size": ranks.world_size, "total_steps": total}
    plan_for = cache(partial(objective.plan, **keys))  # a plan of millions of rows takes seconds
    budget = fewest_micro_batches(budget, lambda tokens: plan_for(token_budget=tokens).num_micro_batches)
    budget = as_it_was(budget, spec, state, ranks.world_size)
    plan = plan_for(token_budget=budget.tokens)
    watchdog.phase("start-up (model)", None)
    language_model = load_backbone(
        checkpoint or spec.model_name_or_path,
        dtype=dtype,
        gradient_checkpointing=budget.checkpointing,
        max_seq_length=contract.max_seq_length,
        reconstructs=spec.stage == "I",
    )
    liger = fuse(language_model, *fusing, *host, split_weights=split, selective=budget.selective)
    model = objective.module(language_model, kernel, contract.pooling_mode)
    model.train()
    watchdog.phase("start-up (engine)", None)
    ds_config = resolve_ds_config(
        raw,
        spec,
        gradient_accumulation_steps=plan.num_micro_batches,
        micro_batch_size=1,
        world_size=ranks.world_size,
        global_batch_size=global_batch,
    )
    engine, optimizer = build_engine(model, spec, ds_config, ranks.device)
    feed = objective.feed(plan)
    made = (spec, ranks, contract, pairs, plan, engine, optimizer, objective, feed, kernel, liger, raw, budget.tokens)
    start_model = state.get("start_model") or model_digest(spec.model_name_or_path)
    run = Run(*made, checkpoint=checkpoint, start_model=start_model, state=state)
    if checkpoint is not None:
        watchdog.phase("start-up (optimizer state)", None)
        restore(run, checkpoint)
    return run


def budget_of(
    spec: RunSpec,
    objective: Objective,
    global_batch: int,
    ranks: Ranks,
    ds_config: dict[str, Any],
    kernel: str,
    *,
    fused: Fused,
) -> Budget:
    """Token budget and checkpointing for the fullest of the run's devices, as `anchor plan` chooses them."""
    options = state_options(spec, ds_config, ranks.world_size)
    if ranks.device.type != "cuda":
        return choose_budget(spec, None, options, None, objective.longest)
    free = torch.tensor([torch.cuda.mem_get_info(ranks.device)[0]])
    if ranks.cpu_group is not None:
        dist.all_reduce(free, op=dist.ReduceOp.MIN, group=ranks.cpu_group)
    shape, _ = shape_of(spec.model_name_or_path)
    kind = memory_kind(kernel)
    held = objective.loss_bytes(global_batch, shape.hidden_size)
    longest = objective.longest
    return choose_budget(spec, shape, options, float(free.item()), longest, kernel=kind, fused=fused, loss_bytes=held)


def as_it_was(budget: Budget, spec: RunSpec, state: dict[str, Any], world_size: int) -> Budget:
    """The token budget of the checkpoint, on as many processes: what is free on a GPU differs from start to start, and
    another cut of a step rounds otherwise. One that does not fit now, or that a spec states, is not taken over."""
    tokens = state.get("token_budget")
    stated = spec.max_tokens_per_micro_batch or state.get("spec", {}).get("max_tokens_per_micro_batch")
    if tokens is None or stated or tokens > budget.tokens or state["world_size"] != world_size:
        return budget
    return replace(budget, tokens=tokens, source="as before")


def restore(run: Run, checkpoint: Path) -> None:
    """Continue exactly: one step at learning rate 0 makes the optimizer's state exist, then it is replaced.

    Elastic: nothing in a checkpoint depends on the number of processes.
    """
    updates = run.updates_before(run.first_step)
    if updates:
        run.objective.update(run.engine, run.objective.smallest_step(run.plan), learning_rate=0.0)
        load_optimizer_state(run.engine, run.optimizer, checkpoint, updates)
    if run.is_first:
        before, now = run.state["world_size"], run.ranks.world_size
        changed = f", written by {before} processes, going on with {now}" if before != now else ""
        say(f"resuming from {checkpoint} (step {run.first_step}{changed})")
