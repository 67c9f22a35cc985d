"""What a run will do, by arithmetic: steps, tokens, memory, time, communication, disk. Nothing is started, no torch.

Every figure is counted (steps, tokens, FLOPs, bytes of states), modelled (activation memory: plan/memory.py), or rests
on a named assumption, which can be replaced by a measurement (`--mfu`, `--tokens-per-second`, `--probe`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.checkpoints import checkpoint_bytes
from anchor_cli.base.errors import InputError
from anchor_cli.data.batches import epoch_order, fill_bins, make_plan
from anchor_cli.plan import flops
from anchor_cli.plan import memory as memory_model
from anchor_cli.plan.budget import choose_budget, expected_kernel
from anchor_cli.plan.contrast import ContrastWork, Negatives, assumed_negatives, loss_bytes, work_of
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.hardware import Gpu
from anchor_cli.plan.memory import LayerOptions, Memory
from anchor_cli.plan.zero import StateOptions, communication_bytes, state_options
from anchor_cli.spec import schedule
from anchor_cli.spec.spec import RunSpec

IntArray = npt.NDArray[np.int32]
ASSUMED_MFU = 0.40
"""Share of the card's peak spent on useful work; assumption: no GPU was measured (docs/benchmarks.md)."""
ASSUMED_MEAN_SHARE, ASSUMED_DOCUMENT_TOKENS = 0.72, 493
"""Mean document length where no data are at hand: a share of max_seq_length, and not more than what documents have that
are hardly cut (measured on 9,821 Korean and English rows: 368 at 512, 493 at 2,048)."""
ASSUMED_QUERY_TOKENS = 42
"""Mean query length with KURE's instruction (measured on 9,827 rows)."""
FP32_TFLOPS = 20.0
"""Rate of the float32 loss of Stage II on a card; assumption, a third of an H100's."""
CHECKPOINT_REST_BYTES = 32 * 2**20
"""Tokenizer, configs, manifest of a checkpoint (measured: 11 MB of tokenizer; rounded up)."""


@dataclass(frozen=True)
class Rows:
    """Lengths in tokens, [EOS] included. `source`: where they come from, as it is printed."""

    query_lengths: IntArray  # (R,)
    document_lengths: IntArray  # (R,)
    num_targets: int
    truncated_share: float | None
    source: str
    negatives: Negatives | None = None
    """Of Stage II."""

    @property
    def num_rows(self) -> int:
        return len(self.query_lengths)


@dataclass(frozen=True)
class Hardware:
    """What the run is planned for. `gpu` None: CPU processes, whose speed and memory are not modelled."""

    gpu: Gpu | None
    num_gpus: int
    memory_bytes: float | None


@dataclass(frozen=True)
class Throughput:
    """`tokens_per_s` of the whole run where measured, else the assumed share of peak."""

    mfu: float = ASSUMED_MFU
    tokens_per_s: float | None = None
    basis: str = "assumed"


@dataclass(frozen=True)
class Steps:
    num_rows: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int
    last_step: int
    warmup_steps: int
    rows_dropped_per_epoch: int


@dataclass(frozen=True)
class Tokens:
    """Texts' own tokens, each counted once."""

    mean_query: float
    mean_document: float
    longest_row: int
    per_step: float
    whole_run: float
    truncated_share: float | None
    source: str


@dataclass(frozen=True)
class MicroBatches:
    """How a step is divided on every rank."""

    token_budget: int
    budget_source: str
    micro_batches_per_step: int
    heaviest_tokens: int
    gradient_checkpointing: bool
    checkpointing_source: str


@dataclass(frozen=True)
class Time:
    """Seconds; `step_s` of computing, `communication_s` of it hidden or not, `total_s` from first step to last."""

    step_s: float
    communication_s: float
    communication_gb: float
    total_s: float
    model_tflop_per_step: float
    basis: str


@dataclass(frozen=True)
class Disk:
    checkpoint_bytes: int
    checkpoints_kept: int
    total_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What `anchor plan` prints; None where nothing is known."""

    parameters: int
    steps: Steps
    tokens: Tokens
    cut: MicroBatches
    memory: Memory | None
    device_bytes: float | None
    time: Time | None
    disk: Disk
    contrast: ContrastWork | None = None
    """Of Stage II."""

    def as_dict(self) -> dict[str, Any]:
        made = asdict(self)
        if self.memory is not None:
            made["memory"]["total"] = self.memory.total
        return made


def assumed_rows(num_rows: int, spec: RunSpec, mean_query: int | None = None, mean_document: int | None = None) -> Rows:
    """Lengths where the data are not at hand: the means given or assumed, and one longest row."""
    usual = min(round(ASSUMED_MEAN_SHARE * spec.max_seq_length), ASSUMED_DOCUMENT_TOKENS)
    document = min(max(4, mean_document or usual), spec.max_seq_length)
    query = min(max(4, mean_query or ASSUMED_QUERY_TOKENS), spec.max_seq_length)
    lengths = np.full(num_rows, document, dtype=np.int32)
    lengths[0] = spec.max_seq_length
    queries = np.full(num_rows, query, dtype=np.int32)
    targets = int(queries.sum(dtype=np.int64) + lengths.sum(dtype=np.int64)) - 2 * num_rows
    negatives = assumed_negatives(num_rows, document, spec) if spec.stage == "II" else None
    kind = "given" if mean_query and mean_document else "assumed"
    source = f"{kind}: queries of {query}, documents of {document} tokens on average"
    return Rows(queries, lengths, targets, None, source, negatives)


def scaled(rows: Rows, num_rows: int) -> Rows:
    """A sample of the data, drawn with replacement to the rows of the whole."""
    drawn = np.random.default_rng(0).integers(rows.num_rows, size=num_rows)
    targets = round(rows.num_targets * num_rows / rows.num_rows)
    source = f"{rows.source}, {rows.num_rows:,} rows taken as a sample of {num_rows:,}"
    negatives = rows.negatives
    if negatives is not None:
        negatives = Negatives(negatives.counts[drawn], negatives.tokens[drawn], negatives.longest)
    lengths = rows.query_lengths[drawn], rows.document_lengths[drawn]
    return Rows(*lengths, targets, rows.truncated_share, source, negatives)


def estimate(
    spec: RunSpec,
    shape: ModelShape,
    rows: Rows,
    hardware: Hardware,
    ds_config: dict[str, Any],
    throughput: Throughput,
    *,
    liger: bool = False,
) -> Estimate:
    """Everything about a run that arithmetic can tell. `ds_config`: the DeepSpeed config as written.

    Raises:
        InputError: fewer rows than one global batch, or a token budget that cannot hold a row.
    """
    if spec.stage == "II":
        return estimate_contrast(spec, shape, rows, hardware, ds_config, throughput, liger=liger)
    world = hardware.num_gpus
    steps = steps_of(spec, rows.num_rows, world)
    options = state_options(spec, ds_config, world)
    row_lengths = rows.query_lengths + rows.document_lengths
    cut = cut_of(spec, shape, options, hardware, row_lengths, steps, liger)
    memory = None
    if hardware.gpu is not None:
        layers = LayerOptions(cut.gradient_checkpointing, expected_kernel(spec), liger)
        memory = memory_model.training_memory(shape, options, layers, cut.heaviest_tokens)
    return Estimate(
        parameters=shape.num_parameters,
        steps=steps,
        tokens=tokens_of(rows, steps),
        cut=cut,
        memory=memory,
        device_bytes=hardware.memory_bytes,
        time=time_of(shape, rows, steps, cut, hardware, options, throughput),
        disk=disk_of(spec, shape, steps),
    )


def estimate_contrast(
    spec: RunSpec,
    shape: ModelShape,
    rows: Rows,
    hardware: Hardware,
    ds_config: dict[str, Any],
    throughput: Throughput,
    *,
    liger: bool,
) -> Estimate:
    """`estimate` of Stage II: texts are divided, not rows, and every text is encoded twice where a rank has several
    micro-batches. The number of micro-batches is that of steps of average length."""
    world, negatives = hardware.num_gpus, rows.negatives
    steps = steps_of(spec, rows.num_rows, world)
    options = state_options(spec, ds_config, world)
    documents = rows.document_lengths.astype(np.int64)
    mean_negatives = 0.0
    longest = int(max(rows.query_lengths.max(), documents.max()))
    if negatives is not None:
        documents, mean_negatives = documents + negatives.tokens, float(negatives.counts.mean())
        longest = max(longest, negatives.longest)
    device_bytes = hardware.memory_bytes if hardware.gpu is not None else None
    texts = round(steps.global_batch_size * (2 + mean_negatives))
    held = loss_bytes(texts, shape.hidden_size)
    budget = choose_budget(spec, shape, options, device_bytes, longest, liger=liger, loss_bytes=held)
    tokens = float((rows.query_lengths + documents).mean()) * steps.global_batch_size
    count = max(1, -(-int(tokens) // (budget.tokens * world)))
    heaviest = min(budget.tokens, int(tokens / (world * count)) + longest)
    switch = budget.checkpointing, budget.checkpointing_source
    cut = MicroBatches(budget.tokens, budget.source, count, heaviest, *switch)
    memory = None
    if hardware.gpu is not None:
        layers = LayerOptions(cut.gradient_checkpointing, expected_kernel(spec), liger, False, held)
        memory = memory_model.training_memory(shape, options, layers, heaviest)
    work = work_of(spec, steps.global_batch_size, mean_negatives, shape.hidden_size, world, count)
    return Estimate(
        parameters=shape.num_parameters,
        steps=steps,
        tokens=replace(
            tokens_of(replace(rows, document_lengths=documents.astype(np.int32)), steps), longest_row=longest
        ),
        cut=cut,
        memory=memory,
        device_bytes=hardware.memory_bytes,
        time=contrast_time(shape, rows, tokens, work, steps, cut, hardware, options, throughput),
        disk=disk_of(spec, shape, steps),
        contrast=work,
    )


def contrast_time(
    shape: ModelShape,
    rows: Rows,
    tokens: float,
    work: ContrastWork,
    steps: Steps,
    cut: MicroBatches,
    hardware: Hardware,
    options: StateOptions,
    throughput: Throughput,
) -> Time | None:
    """Seconds of a step: encoding forward and backward, the first encoding, recomputation, and the loss."""
    mean_length = tokens / work.texts_per_step
    forward = flops.forward_flops(shape, np.full(work.texts_per_step, round(mean_length), dtype=np.int64))
    useful = (1 + flops.BACKWARD) * forward
    again = forward * (int(work.encoded_twice) + int(cut.gradient_checkpointing))
    if throughput.tokens_per_s is not None:
        step_s, basis = tokens / throughput.tokens_per_s, throughput.basis
    elif hardware.gpu is not None:
        peak = throughput.mfu * hardware.gpu.bf16_tflops * 1e12
        step_s = (useful + again) / (peak * hardware.num_gpus) + work.loss_tflop / FP32_TFLOPS
        basis = f"{throughput.basis}: {throughput.mfu:.0%} of {hardware.gpu.bf16_tflops:g} TFLOP/s a card"
    else:
        return None
    sent = communication_bytes(shape, options, cut.micro_batches_per_step) + work.gathered_bytes
    link = hardware.gpu.link_gb_s if hardware.gpu is not None else float("inf")
    return Time(step_s, sent / (link * 1e9), sent / 1e9, step_s * steps.last_step, useful / 1e12, basis)


def steps_of(spec: RunSpec, num_rows: int, world_size: int) -> Steps:
    """Steps of the run. Raises InputError when the rows do not fill one global batch."""
    batch = spec.global_batch(world_size)
    per_epoch = schedule.steps_per_epoch(num_rows, batch)
    if per_epoch == 0:
        raise InputError(
            f"the data set has {num_rows} rows, fewer than one global batch of {batch}",
            hint="lower per_device_train_batch_size or global_batch_size, or give more rows",
        )
    total = schedule.total_steps(num_rows, batch, spec.num_train_epochs, spec.max_steps)
    return Steps(
        num_rows=num_rows,
        global_batch_size=batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        last_step=min(total, spec.stop_after_n_steps or total),
        warmup_steps=schedule.warmup_steps_of(total, spec.warmup_steps, spec.warmup_ratio),
        rows_dropped_per_epoch=num_rows - per_epoch * batch,
    )


def cut_of(
    spec: RunSpec,
    shape: ModelShape,
    options: StateOptions,
    hardware: Hardware,
    row_lengths: IntArray,
    steps: Steps,
    liger: bool,
) -> MicroBatches:
    """Token budget, checkpointing and the number of micro-batches, as the engine will choose them."""
    device_bytes = hardware.memory_bytes if hardware.gpu is not None else None
    budget = choose_budget(spec, shape, options, device_bytes, int(row_lengths.max()), liger=liger)
    plan = make_plan(
        row_lengths, seed=spec.seed, global_batch_size=steps.global_batch_size, world_size=hardware.num_gpus,
        token_budget=budget.tokens, total_steps=steps.total_steps,
    )  # fmt: skip
    heaviest = heaviest_micro_batch(row_lengths, spec.seed, steps, hardware.num_gpus * plan.num_micro_batches)
    switch = budget.checkpointing, budget.checkpointing_source
    return MicroBatches(budget.tokens, budget.source, plan.num_micro_batches, heaviest, *switch)


def heaviest_micro_batch(row_lengths: IntArray, seed: int, steps: Steps, num_bins: int) -> int:
    """Tokens of the heaviest micro-batch of the first epoch: what sets the peak. At most the budget."""
    order = epoch_order(len(row_lengths), seed, 0)[: steps.steps_per_epoch * steps.global_batch_size]
    lengths = row_lengths[order].astype(np.int64).reshape(-1, steps.global_batch_size)
    return max(int(fill_bins(block, num_bins)[1].max()) for block in np.array_split(lengths, -(-len(lengths) // 4096)))


def tokens_of(rows: Rows, steps: Steps) -> Tokens:
    query, document = float(rows.query_lengths.mean()), float(rows.document_lengths.mean())
    per_step = (query + document) * steps.global_batch_size
    return Tokens(
        mean_query=query,
        mean_document=document,
        longest_row=int((rows.query_lengths + rows.document_lengths).max()),
        per_step=per_step,
        whole_run=per_step * steps.last_step,
        truncated_share=rows.truncated_share,
        source=rows.source,
    )


def time_of(
    shape: ModelShape,
    rows: Rows,
    steps: Steps,
    cut: MicroBatches,
    hardware: Hardware,
    options: StateOptions,
    throughput: Throughput,
) -> Time | None:
    """Seconds of a step and of the run; None on a CPU without a measured rate.

    An assumed MFU counts useful work, so the recomputed forward pass of checkpointing is added on top.
    """
    needed = flops.objective_flops(shape, rows.query_lengths, rows.document_lengths, rows.num_targets)
    per_step = needed / rows.num_rows * steps.global_batch_size
    tokens_per_step = float((rows.query_lengths.mean() + rows.document_lengths.mean()) * steps.global_batch_size)
    if throughput.tokens_per_s is not None:
        step_s, basis = tokens_per_step / throughput.tokens_per_s, throughput.basis
    elif hardware.gpu is not None:
        peak = hardware.gpu.bf16_tflops * 1e12 * hardware.num_gpus
        step_s = per_step / (throughput.mfu * peak)
        if cut.gradient_checkpointing:
            step_s *= flops.recompute_factor(shape, rows.query_lengths, rows.document_lengths, rows.num_targets)
        basis = f"{throughput.basis}: {throughput.mfu:.0%} of {hardware.gpu.bf16_tflops:g} TFLOP/s a card"
    else:
        return None
    sent = communication_bytes(shape, options, cut.micro_batches_per_step)
    link = hardware.gpu.link_gb_s if hardware.gpu is not None else float("inf")
    return Time(
        step_s=step_s,
        communication_s=sent / (link * 1e9),
        communication_gb=sent / 1e9,
        total_s=step_s * steps.last_step,
        model_tflop_per_step=per_step / 1e12,
        basis=basis,
    )


def disk_of(spec: RunSpec, shape: ModelShape, steps: Steps) -> Disk:
    """Checkpoints: weights, and the optimizer's fp32 weights and two moments. One more while the next is written."""
    weight_bytes = 2 if spec.precision == "bfloat16" else 4
    one = checkpoint_bytes(shape.num_parameters, weight_bytes, CHECKPOINT_REST_BYTES)
    every = schedule.interval_steps(spec.save_steps, steps.total_steps)  # a share is one of the whole schedule
    written = 1 + ((steps.last_step - 1) // every if every else 0)
    limit = spec.save_total_limit
    kept = written if limit is None else min(written, limit + 1)
    return Disk(one, kept, one * kept)
