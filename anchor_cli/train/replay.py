"""One step of a run again, from the nearest checkpoint before it, each micro-batch looked at. The run stays as it is
(raw data whose prepared form is gone are prepared again).

The state at step N is made as training made it: the checkpoint is loaded and the steps between are trained again, in
one process, so that sums of several ranks are rounded in another order. Then every micro-batch, cut as the run cut it,
is run alone, forward and backward; one whose loss or gradient is not a finite number is taken apart row by row.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from anchor_cli.base.checkpoints import newest_whole
from anchor_cli.base.console import progress, warn
from anchor_cli.base.errors import InputError
from anchor_cli.base.runs import RunFolder, read_json_lines
from anchor_cli.data.batches import StepRows
from anchor_cli.data.training_set import contract_for, prepare_raw, training_pairs
from anchor_cli.processes.watchdog import Watchdog
from anchor_cli.spec.deepspeed import load_ds_config
from anchor_cli.spec.load import load_spec
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.deepspeed import start_processes
from anchor_cli.train.run import Run
from anchor_cli.train.stages.contrast import Contrast
from anchor_cli.train.stages.contrast_feed import ContrastFeed
from anchor_cli.train.stages.guide import gather_texts
from anchor_cli.train.stages.reconstruct import Reconstruction
from anchor_cli.train.start import build_run


@dataclass(frozen=True)
class RowFinding:
    """One row run alone, with the loss weights of the step."""

    row: int
    d2q_loss: float | None
    """Mean over its query targets, nats; None in Stage II, as the next two: a row has no loss of its own there."""
    q2d_loss: float | None
    grad_norm: float | None
    finite: bool
    query: str
    """Its first 80 characters."""
    document: str


@dataclass(frozen=True)
class MicroBatchFinding:
    """One micro-batch run alone."""

    rank: int
    index: int
    rows: list[int]
    loss: float | None
    """Its share of the step's loss; None in Stage II, where it has none."""
    grad_norm: float
    finite: bool
    non_finite_rows: list[RowFinding]


@dataclass(frozen=True)
class Replay:
    """A step looked at again."""

    run: str
    step: int
    checkpoint: str | None
    loss: float
    """Of the whole step."""
    micro_batches: list[MicroBatchFinding]

    @property
    def finite(self) -> bool:
        """Every micro-batch gave numbers."""
        return all(one.finite for one in self.micro_batches)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can say it: what is not a number is null."""
        text = json.dumps(asdict(self) | {"finite": self.finite})
        record: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return record


def replay(run_folder: Path, step: int) -> Replay:
    """Replay `step` (0-based: the update after `step` updates) of a run, in this process alone.

    Raises:
        InputError: no such run, or the step is not of its schedule.
    """
    spec = with_ds_config_for_one(load_spec(RunFolder(run_folder).spec), run_folder)
    prepare_raw(spec)
    contract = contract_for(spec)
    pairs = training_pairs(spec, contract)
    checkpoint, damaged = newest_whole(run_folder, up_to=step)
    for line in damaged:
        warn(line)
    if checkpoint is None:
        world_size = int(last_start(run_folder).get("world_size", 1))
        spec = spec.model_copy(update={"global_batch_size": spec.global_batch(world_size)})
    ranks = start_processes()
    run = build_run(spec, ranks, run_folder, contract, pairs, checkpoint, Watchdog(run_folder, 0))
    if not 0 <= step < run.total_steps:
        raise InputError(f"--step {step}: the run has steps 0 to {run.total_steps - 1}")
    first = run.first_step
    run.skip(tuple(each for each in last_start(run_folder).get("skipped_steps", ()) if each >= first))
    with progress(f"steps {first} to {step} again", step - first, "steps") as done:
        for ready in run.feed.steps(first, step):
            if ready.step not in run.skipped_steps:
                run.update(ready)
            done.advance()
    loss, findings = look(run, as_cut(run, step)) if spec.stage == "I" else look_at_texts(run, step)
    return Replay(str(run_folder), step, str(checkpoint) if checkpoint else None, loss, findings)


def with_ds_config_for_one(spec: RunSpec, run_folder: Path) -> RunSpec:
    """The spec with the run's own DeepSpeed config; for ZeRO-3 with ZeRO-2's, which has every parameter whole in this
    one process and gives the same numbers."""
    written = RunFolder(run_folder).ds_config.absolute()
    name = str(written) if written.is_file() else spec.deepspeed  # runs of older versions have the name only
    if (load_ds_config(name, run_folder).get("zero_optimization") or {}).get("stage") == 3:
        name = "zero2_bf16" if spec.precision == "bfloat16" else "zero2_fp32"
    return spec.model_copy(update={"deepspeed": name})


def last_start(run_folder: Path) -> dict[str, Any]:
    """What events.jsonl says of the last time the run was started; empty where it says nothing."""
    starts = [line for line in read_json_lines(RunFolder(run_folder).events) if "world_size" in line]
    return starts[-1] if starts else {}


def as_cut(run: Run, step: int) -> StepRows:
    """The step's micro-batches as the run cut them when its checkpoint was written, else as one process does."""
    return replace(run.plan, **cut_of(run)).step(step)


def cut_of(run: Run) -> dict[str, Any]:
    """What the checkpoint says of ranks and micro-batches."""
    return {key: run.state[key] for key in ("world_size", "num_micro_batches") if key in run.state}


def look(run: Run, step: StepRows) -> tuple[float, list[MicroBatchFinding]]:
    """The step's loss; every micro-batch alone, with the rows of those that are not finite."""
    ready = run.feed.step(step.step)
    assert isinstance(run.objective, Reconstruction)
    weights = run.objective.scales(ready)
    total, findings = 0.0, []
    for rank, micro_batches in enumerate(step.micro_batches):
        for index, rows in enumerate(micro_batches):
            _, _, loss, norm = alone(run, rows, weights)
            total += loss
            finite = math.isfinite(loss) and math.isfinite(norm)
            one_by_one = [] if finite else [look_at_row(run, int(row), weights) for row in rows]
            bad = [row for row in one_by_one if not row.finite]
            findings.append(MicroBatchFinding(rank, index, rows.tolist(), loss, norm, finite, bad))
    return total, findings


def look_at_row(run: Run, row: int, weights: tuple[float, float]) -> RowFinding:
    """One row alone."""
    d2q, q2d, loss, norm = alone(run, np.array([row]), weights)
    query, document, _ = run.pairs.texts(row)
    return RowFinding(row, d2q, q2d, norm, math.isfinite(loss) and math.isfinite(norm), query[:80], document[:80])


def alone(run: Run, rows: npt.NDArray[np.int64], weights: tuple[float, float]) -> tuple[float, float, float, float]:
    """(mean D2Q loss, mean Q2D loss, share of the step's loss, gradient norm) of some rows.

    The gradient is taken with `torch.autograd.grad`, which passes by DeepSpeed's hooks: its buffers stay as they are.
    """
    batch = run.feed.pack(rows).to(run.ranks.device)
    parameters = trained(run)
    out = run.model(batch, *weights)
    norm = gradient_norm(out.loss, parameters)
    count = batch.num_query_targets
    means = float(out.d2q_sum) / max(1, count), float(out.q2d_sum) / max(1, len(batch.target_ids) - count)
    return *means, float(out.loss.detach()), norm


def look_at_texts(run: Run, step: int) -> tuple[float, list[MicroBatchFinding]]:
    """Stage II: the step's loss; every micro-batch of texts alone, under the gradient of that loss by their embeddings.

    Non-finite rows are those of texts whose embedding, or the gradient by it, is not finite.
    """
    assert isinstance(run.objective, Contrast)
    feed: ContrastFeed = run.feed
    cut = {"world_size": run.plan.world_size, "num_micro_batches": run.plan.num_micro_batches} | cut_of(run)
    texts, members = feed.divide(run.plan.rows_of(step), cut["world_size"], cut["num_micro_batches"])
    every = [batch for of_rank in members for batch in of_rank]
    with torch.no_grad():
        parts = [run.model(feed.pack(texts, batch).to(run.ranks.device))[: len(batch)] for batch in every]
    embeddings = gather_texts(torch.cat(parts), [np.concatenate(every)], run.ranks)
    loss, by_embedding, _ = run.objective.loss(embeddings, texts)
    finite = (torch.isfinite(embeddings) & torch.isfinite(by_embedding)).all(dim=1).cpu().numpy()
    findings = []
    for rank, of_rank in enumerate(members):
        for index, batch in enumerate(of_rank):
            encoded = run.model(feed.pack(texts, batch).to(run.ranks.device))[: len(batch)]
            weights = by_embedding[torch.from_numpy(batch).to(run.ranks.device)]
            norm = gradient_norm((encoded.to(weights.dtype) * weights).sum(), trained(run))
            rows = sorted({texts.places[text][0] for text in batch.tolist()})
            bad = sorted({texts.places[text][0] for text in batch[~finite[batch]].tolist()})
            lines = [text_finding(run, row) for row in bad]
            good = not bad and math.isfinite(norm) and math.isfinite(float(loss))
            findings.append(MicroBatchFinding(rank, index, rows, None, norm, good, lines))
    return float(loss), findings


def text_finding(run: Run, row: int) -> RowFinding:
    """A row with a text that is not finite."""
    query, document, _ = run.pairs.texts(row)
    return RowFinding(row, None, None, None, False, query[:80], document[:80])


def trained(run: Run) -> list[torch.nn.Parameter]:
    """The run's weights."""
    return [parameter for parameter in run.model.parameters() if parameter.requires_grad]


def gradient_norm(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> float:
    """L2 norm of the gradient. `torch.autograd.grad` passes by DeepSpeed's hooks: its buffers stay as they are."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
