"""A training run put together: spec + data + plan + model + engine, fresh or continued. The loop is in train.py."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from anchor_cli.base.checkpoints import TRAINING_STATE
from anchor_cli.base.console import say, warn
from anchor_cli.base.contract import TextContract
from anchor_cli.base.errors import AnchorError, InputError, RunError
from anchor_cli.base.files import write_json
from anchor_cli.base.runs import lock_run
from anchor_cli.data.batches import BatchPlan, make_plan
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.training_set import contract_for, open_data, prepared_data, require_contract_of
from anchor_cli.model.attention import choose_kernel
from anchor_cli.model.backbone import apply_liger, compile_layers, liger_fits, load_backbone
from anchor_cli.model.reconstruction import ReconstructionModel, target_scales
from anchor_cli.plan.budget import Budget, choose_budget
from anchor_cli.plan.inputs import shape_of
from anchor_cli.plan.zero import state_options
from anchor_cli.processes.ranks import Ranks
from anchor_cli.processes.watchdog import Watchdog
from anchor_cli.spec import schedule
from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train import saving as ckpt
from anchor_cli.train.deepspeed import build_engine, train_step
from anchor_cli.train.feed import Feed, StepBatches
from anchor_cli.train.metrics_log import MetricsLog
from anchor_cli.train.optimizer_state import load_optimizer_state, save_optimizer_state
from anchor_cli.train.start import resume_point


@dataclass(frozen=True)
class Settled:
    """What rank 0 found and every rank was told."""

    contract: TextContract
    pairs: PreparedPairs
    global_batch_size: int
    checkpoint: Path | None
    state: dict[str, Any] | None

    @property
    def first_step(self) -> int:
        return int(self.state["step"]) if self.state else 0


@dataclass
class Run:
    """Everything the loop holds. `state` is what a checkpoint remembers besides weights."""

    spec: RunSpec
    ranks: Ranks
    folder: Path
    settled: Settled
    plan: BatchPlan
    engine: Any
    optimizer: torch.optim.Optimizer
    feed: Feed
    kernel: str
    liger: bool
    raw_ds_config: dict[str, Any]
    token_budget: int
    best: dict[str, Any] | None = None
    evaluated_step: int | None = None
    skipped_steps: set[int] = field(default_factory=set)

    @property
    def model(self) -> ReconstructionModel:
        module: ReconstructionModel = self.engine.module
        return module

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    @property
    def last_step(self) -> int:
        """Updates after which this run ends."""
        return min(self.total_steps, self.spec.stop_after_n_steps or self.total_steps)

    def updates_before(self, step: int) -> int:
        """Optimizer updates made before `step`: all steps but the skipped ones."""
        return step - sum(skipped < step for skipped in self.skipped_steps)

    def skip(self, steps: tuple[int, ...]) -> None:
        """Make no update at these steps. One that lies before the checkpoint is done already, and said to be."""
        for step in sorted(set(steps) - self.skipped_steps):
            if step >= self.settled.first_step:
                self.skipped_steps.add(step)
            elif self.ranks.rank == 0:
                warn(f"--skip-step {step}: nothing to skip, the run continues at step {self.settled.first_step}")

    def target_scales(self, step: StepBatches) -> tuple[float, float]:
        """Weight of one D2Q and one Q2D target in the step's loss."""
        spec = self.spec
        return target_scales(spec.d2q_weight, spec.q2d_weight, step.query_targets, step.document_targets)

    def learning_rate(self, step: int) -> float:
        spec = self.spec
        warmup = schedule.warmup_steps_of(self.total_steps, spec.warmup_steps, spec.warmup_ratio)
        return schedule.learning_rate(
            step, peak=spec.learning_rate, warmup=warmup, total=self.total_steps, kind=spec.lr_scheduler_type
        )


def settle(spec: RunSpec, ranks: Ranks, watchdog: Watchdog) -> Settled:
    """Rank 0 prepares data and finds the checkpoint to continue from; all ranks get the answer or the same error."""
    with watchdog.without_deadline("start-up (data and checkpoint)") if ranks.rank == 0 else nullcontext():
        answer = ranks.from_first(lambda: _settle_first(spec), lambda: watchdog.phase("start-up", None))
    if "error" in answer:
        message, hint, code = answer["error"]
        raise (InputError if code == 2 else RunError)(message, hint)
    contract = TextContract.model_validate(answer["contract"])
    state = answer["state"]
    batch = state["global_batch_size"] if state else spec.global_batch(ranks.world_size)
    return Settled(
        contract,
        PreparedPairs.open(answer["data"]),
        batch,
        Path(answer["checkpoint"]) if answer["checkpoint"] else None,
        state,
    )


def _settle_first(spec: RunSpec) -> dict[str, Any]:
    """Rank 0's part of `settle`, as JSON can say it."""
    try:
        lock_run(spec.run_folder)
        contract = contract_for(spec)
        data = prepared_data(spec, contract)
        pairs = open_data(data, contract)
        ckpt.sweep_partials(spec.run_folder)
        answer: dict[str, Any] = {"data": str(data.absolute()), "contract": contract.model_dump()}
        begun = resume_point(spec, pairs.fingerprint)
        if begun["checkpoint"]:
            require_contract_of(Path(begun["checkpoint"]), contract)
            refuse_to_stop_before(spec, Path(begun["checkpoint"]), int(begun["state"]["step"]))
        return answer | begun
    except AnchorError as error:
        return {"error": [error.message, error.hint, error.exit_code]}
    except OSError as error:
        return {"error": [f"{error.filename or spec.output_dir}: {error.strerror}", "check path and rights", 2]}


def refuse_to_stop_before(spec: RunSpec, checkpoint: Path, step: int) -> None:
    """A run that is further than `stop_after_n_steps` has nothing to do. Raises InputError."""
    if spec.stop_after_n_steps and spec.stop_after_n_steps < step:
        raise InputError(
            f"stop_after_n_steps: {spec.stop_after_n_steps}, but {checkpoint} has {step} steps already",
            hint=f"take it out, or set it to more than {step}",
        )


def open_run(spec: RunSpec, ranks: Ranks, spec_folder: Path, skip_steps: tuple[int, ...], watchdog: Watchdog) -> Run:
    """Settle what is to be done, and build what does it.

    Raises:
        InputError: anything of spec, data or checkpoint that cannot work; before the model is loaded where possible.
    """
    run = build_run(spec, ranks, spec_folder, settle(spec, ranks, watchdog), watchdog)
    run.skip(skip_steps)
    return run


def build_run(spec: RunSpec, ranks: Ranks, spec_folder: Path, settled: Settled, watchdog: Watchdog) -> Run:
    """Plan, load the model, build the engine and restore the optimizer's state."""
    raw = load_ds_config(spec.deepspeed, spec_folder)
    dtype = torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    kernel = choose_kernel(spec.attn_implementation, ranks.device, dtype)
    budget = budget_of(spec, settled.pairs, ranks, raw, kernel)
    plan = plan_of(spec, settled.pairs, settled.global_batch_size, ranks, budget.tokens)
    config = resolve_ds_config(
        raw,
        spec,
        gradient_accumulation_steps=plan.num_micro_batches,
        micro_batch_size=1,
        world_size=ranks.world_size,
    )
    source = settled.checkpoint or spec.model_name_or_path
    watchdog.phase("start-up (model)", None)
    language_model = load_backbone(
        source,
        dtype=dtype,
        gradient_checkpointing=budget.checkpointing,
        max_seq_length=settled.contract.max_seq_length,
        reconstructs=True,
    )
    liger = ranks.device.type == "cuda" and apply_liger(language_model)
    model = ReconstructionModel(language_model, kernel=kernel, pooling_mode=settled.contract.pooling_mode)
    model.train()
    if spec.torch_compile:
        compile_layers(language_model)
    watchdog.phase("start-up (engine)", None)
    engine, optimizer = build_engine(model, spec, config, ranks.device)
    feed = Feed(settled.pairs, plan, ranks.rank, spec.reconstruction_targets, ranks.device)
    run = Run(spec, ranks, spec.run_folder, settled, plan, engine, optimizer, feed, kernel, liger, raw, budget.tokens)
    if settled.checkpoint is not None and settled.state is not None:
        watchdog.phase("start-up (optimizer state)", None)
        restore(run, settled.checkpoint, settled.state)
    return run


def restore(run: Run, checkpoint: Path, state: dict[str, Any]) -> None:
    """Continue exactly: one step at learning rate 0 makes the optimizer's state exist, then it is replaced.

    Elastic: nothing in a checkpoint depends on the number of processes.
    """
    run.skipped_steps = set(state["skipped_steps"])
    updates = run.updates_before(run.settled.first_step)
    if updates:
        one = run.feed.pack(np.array([int(np.argmin(run.plan.row_lengths))]))
        micro_batches = [one.to(run.ranks.device)] * run.plan.num_micro_batches
        train_step(run.engine, micro_batches, d2q_scale=1e-3, q2d_scale=1e-3, learning_rate=0.0)
        load_optimizer_state(run.engine, run.optimizer, checkpoint, updates)
    run.best = state["best"]
    run.evaluated_step = state["evaluated_step"]
    if run.ranks.rank == 0:
        before, now = state["world_size"], run.ranks.world_size
        changed = f", written by {before} processes, going on with {now}" if before != now else ""
        say(f"resuming from {checkpoint} (step {run.settled.first_step}{changed})")


def plan_of(spec: RunSpec, pairs: PreparedPairs, global_batch_size: int, ranks: Ranks, token_budget: int) -> BatchPlan:
    """The plan of the whole run under a token budget."""
    row_lengths = pairs.query_lengths + pairs.document_lengths
    total = schedule.total_steps(len(row_lengths), global_batch_size, spec.num_train_epochs, spec.max_steps)
    return make_plan(
        row_lengths,
        seed=spec.seed,
        global_batch_size=global_batch_size,
        world_size=ranks.world_size,
        token_budget=token_budget,
        total_steps=total,
    )


def budget_of(spec: RunSpec, pairs: PreparedPairs, ranks: Ranks, ds_config: dict[str, Any], kernel: str) -> Budget:
    """Token budget and checkpointing for the fullest of the run's devices, as `anchor plan` chooses them."""
    longest = int((pairs.query_lengths + pairs.document_lengths).max())
    options = state_options(spec, ds_config, ranks.world_size)
    if ranks.device.type != "cuda":
        return choose_budget(spec, None, options, None, longest)
    free = torch.tensor([torch.cuda.mem_get_info(ranks.device)[0]])
    if ranks.cpu_group is not None:
        dist.all_reduce(free, op=dist.ReduceOp.MIN, group=ranks.cpu_group)
    shape, _ = shape_of(spec.model_name_or_path)
    liger = liger_fits(spec.model_name_or_path)
    return choose_budget(spec, shape, options, float(free.item()), longest, kernel=kernel, liger=liger)


def save(run: Run, step: int, log: MetricsLog | None, wandb_run_id: str | None) -> Path:
    """Write checkpoint-{step}; every rank calls it. It appears whole, by one rename, or not at all.

    Raises:
        OSError: on every rank, when any rank could not write; what was written is removed.
    """
    partial, final = ckpt.partial_folder(run.folder, step), run.folder / f"checkpoint-{step}"
    metrics_bytes = 0

    def begin() -> None:
        nonlocal metrics_bytes
        ckpt.sweep_partials(run.folder)
        ckpt.require_space(run.folder, checkpoint_bytes(run))
        partial.mkdir()
        metrics_bytes = log.flushed_bytes() if log else 0

    def write_model() -> None:
        source = run.spec.model_name_or_path
        ckpt.write_model_files(partial, run.engine, source, run.settled.contract)

    def write_optimizer() -> None:
        if run.updates_before(step):
            save_optimizer_state(run.engine, partial, run.ranks.rank, run.ranks.world_size)

    def finish() -> None:
        write_json(partial / TRAINING_STATE, training_state(run, step, metrics_bytes, wandb_run_id))
        ckpt.commit(partial, final)

    is_first = run.ranks.rank == 0
    for part, by_all in ((begin, False), (write_model, True), (write_optimizer, True), (finish, False)):
        problem: str | None = None
        try:
            if by_all or is_first:
                part()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        first = run.ranks.first_text(problem)
        if first:
            if is_first:
                ckpt.sweep_partials(run.folder)
            raise OSError(first)
    return final


def checkpoint_bytes(run: Run) -> int:
    """Bytes of one checkpoint of this run."""
    weights = sum(int(getattr(p, "ds_numel", p.numel())) for p in run.model.parameters())
    return ckpt.needed_bytes(weights, 2 if run.spec.precision == "bfloat16" else 4, run.spec.model_name_or_path)


def training_state(run: Run, step: int, metrics_bytes: int, wandb_run_id: str | None) -> dict[str, Any]:
    """training_state.json: everything besides tensors that the same command needs to continue."""
    return {
        "step": step,
        "epoch": step / run.plan.steps_per_epoch,
        "total_steps": run.total_steps,
        "global_batch_size": run.plan.global_batch_size,
        "world_size": run.ranks.world_size,
        "num_micro_batches": run.plan.num_micro_batches,
        "spec": run.spec.model_dump(),
        "spec_fingerprint": run.spec.fingerprint,
        "data_fingerprint": run.settled.pairs.fingerprint,
        "metrics_bytes": metrics_bytes,
        "best": run.best,
        "evaluated_step": run.evaluated_step,
        "skipped_steps": sorted(run.skipped_steps),
        "wandb_run_id": wandb_run_id,
    }
