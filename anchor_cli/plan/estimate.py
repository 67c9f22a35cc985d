"""What a run will do, by arithmetic: steps, tokens, memory, time, communication, disk. Nothing is started, no torch.

Every figure is counted (steps, tokens, FLOPs, bytes of states), modelled (activation memory: plan/memory.py), or rests
on a named assumption, which can be replaced by a measurement (`--mfu`, `--tokens-per-second`, `--probe`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from anchor_cli.base.checkpoints import checkpoint_bytes
from anchor_cli.base.errors import InputError
from anchor_cli.data.batches import epoch_order, fill_bins, make_plan
from anchor_cli.plan import flops
from anchor_cli.plan import memory as memory_model
from anchor_cli.plan.budget import choose_budget, expected_fused, expected_kernel, fewest_micro_batches
from anchor_cli.plan.contrast import ContrastWork, loss_bytes, work_of
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.memory import LayerOptions
from anchor_cli.plan.result import Disk, Estimate, Hardware, MicroBatches, Steps, Throughput, Time, Tokens
from anchor_cli.plan.rows import IntArray, Rows
from anchor_cli.plan.zero import StateOptions, communication_bytes, state_options
from anchor_cli.spec import schedule
from anchor_cli.spec.spec import RunSpec

FP32_TFLOPS = 20.0
"""Rate of the float32 loss of Stage II on a card; assumption, a third of an H100's."""
CHECKPOINT_REST_BYTES = 32 * 2**20
"""Tokenizer, configs, manifest of a checkpoint (measured: 11 MB of tokenizer; rounded up)."""


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
        fused = expected_fused(spec, options, liger)
        layers = LayerOptions(cut.gradient_checkpointing, expected_kernel(spec), fused, cut.selective)
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
    fused = expected_fused(spec, options, liger)
    budget = choose_budget(spec, shape, options, device_bytes, longest, fused=fused, loss_bytes=held)
    tokens = float((rows.query_lengths + documents).mean()) * steps.global_batch_size
    budget = fewest_micro_batches(budget, lambda each: max(1, -(-int(tokens) // (each * world))))
    count = max(1, -(-int(tokens) // (budget.tokens * world)))
    heaviest = min(budget.tokens, int(tokens / (world * count)) + longest)
    switch = budget.checkpointing, budget.checkpointing_source
    cut = MicroBatches(budget.tokens, budget.source, count, heaviest, *switch, budget.selective)
    memory = None
    if hardware.gpu is not None:
        layers = LayerOptions(cut.gradient_checkpointing, expected_kernel(spec), fused, cut.selective, False, held)
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
    again = forward * (work.encoded_again + int(cut.gradient_checkpointing))
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
    fused = expected_fused(spec, options, liger)
    budget = choose_budget(spec, shape, options, device_bytes, int(row_lengths.max()), fused=fused)

    @cache
    def count(tokens: int) -> int:
        return make_plan(
            row_lengths, seed=spec.seed, global_batch_size=steps.global_batch_size, world_size=hardware.num_gpus,
            token_budget=tokens, total_steps=steps.total_steps,
        ).num_micro_batches  # fmt: skip

    budget = fewest_micro_batches(budget, count)
    micro_batches = count(budget.tokens)
    heaviest = heaviest_micro_batch(row_lengths, spec.seed, steps, hardware.num_gpus * micro_batches)
    switch = budget.checkpointing, budget.checkpointing_source
    return MicroBatches(budget.tokens, budget.source, micro_batches, heaviest, *switch, budget.selective)


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
