"""The training loop: evaluate, save, stop, step, log. One extra turn, so that the last step needs no special code."""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from anchor_cli.base import metric_names as names
from anchor_cli.base.checkpoints import list_checkpoints
from anchor_cli.base.console import say, warn
from anchor_cli.base.errors import InputError, RunError, Stopped
from anchor_cli.base.files import free_bytes, in_units, write_json
from anchor_cli.base.runs import RunFolder
from anchor_cli.data.benchmarks.benchmarks import Benchmark, load_benchmarks
from anchor_cli.data.text import load_tokenizer
from anchor_cli.evaluate.embedder import PackedEmbedder
from anchor_cli.evaluate.evaluate import evaluate, logged
from anchor_cli.plan.flops import ModelShape, objective_flops
from anchor_cli.plan.hardware import gpu_of_device_name
from anchor_cli.processes.signals import StopFlag, stop_agreed
from anchor_cli.processes.watchdog import Watchdog
from anchor_cli.spec.schedule import interval_steps
from anchor_cli.train import saving as ckpt
from anchor_cli.train.deepspeed import NonFiniteGradient, StepResult, train_step
from anchor_cli.train.feed import StepBatches
from anchor_cli.train.live import Live
from anchor_cli.train.metrics_log import MetricsLog, start_trackers
from anchor_cli.train.run import Run, checkpoint_bytes, save


class StopAsked(Exception):
    """A stop was agreed on in the middle of an evaluation."""


class Training:
    """One process's part of a run, first step to last. `train()` is the story; the rest are its sentences."""

    def __init__(self, run: Run, flag: StopFlag, watchdog: Watchdog) -> None:
        self.run = run
        self.flag = flag
        self.watchdog = watchdog
        self.is_first = run.ranks.rank == 0
        self.eval_every = interval_steps(run.spec.eval_steps, run.total_steps)
        self.save_every = interval_steps(run.spec.save_steps, run.total_steps)
        self.saved_step: int | None = run.settled.first_step if run.settled.checkpoint else None
        self.tried_step: int | None = self.saved_step
        self.retry_step: int | None = None  # after a save that failed
        self.log: MetricsLog | None = None
        self.peak_flops = peak_flops(run.ranks.device)
        self.watch = Live(run, enabled=self.is_first, flag=flag)
        self.benchmarks: list[Benchmark] | None = None
        self.embedder: PackedEmbedder | None = None
        self.evaluating_step = 0
        self.window_start, self.window_tokens, self.window_pairs, self.window_flops = time.monotonic(), 0, 0, 0
        self.wandb_run_id: str | None = (run.settled.state or {}).get("wandb_run_id")

    def train(self) -> None:
        """Run to the last step.

        Raises:
            Stopped: a signal asked for it; everything is saved.
            NonFiniteGradient: before the update that would have spoilt the weights.
        """
        run, first, last = self.run, self.run.settled.first_step, self.run.last_step
        self.begin()
        batches = run.feed.steps(first, last)
        for step in range(first, last + 1):
            self.watchdog.phase("step", step)
            self.evaluate_if_due(step)
            self.save_if_due(step)
            self.stop_if_asked(step)
            if step == last:
                break
            result, ready = self.step(step, batches)
            self.log_if_due(step, result, ready)
        self.end()

    # -- the five sentences ------------------------------------------------------------------------------------------

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate before the step's update: every eval_steps, at the end, and at the start if asked."""
        spec, run = self.run.spec, self.run
        due = self.eval_every and (step % self.eval_every == 0 or step == run.last_step) and step > 0
        if not (due or (spec.eval_on_start and step == 0)) or run.evaluated_step == step:
            return
        self.watchdog.phase("evaluation", step)
        try:
            scores = self.scores(step)
        except StopAsked:
            return  # the next turn's sentence, stop_if_asked, saves; the evaluation is done after resuming
        finally:
            run.model.train()
        run.evaluated_step = step
        average = scores.get(names.EVAL_AVG_NDCG_10)
        if average is not None and (run.best is None or average > run.best["value"]):
            run.best = {"step": step, "value": average}
        if self.log:
            self.log.write({names.STEP: step, names.EPOCH: self.epoch(step), **scores})
            self.log.event("evaluation", step, **{"ndcg@10": average})
            self.watch.evaluated(step, scores)
        self.restart_window()

    def save_if_due(self, step: int) -> None:
        """Checkpoint every save_steps and at the end. A full disk costs the checkpoint, not the run."""
        by_plan = self.save_every and step % self.save_every == 0 and step > 0
        due = by_plan or step in (self.run.last_step, self.retry_step)
        if due and self.saved_step != step and self.tried_step != step:
            self.save(step)

    def stop_if_asked(self, step: int) -> None:
        """Save and leave with 75 when any rank was asked to stop."""
        if not stop_agreed(self.flag, self.run.ranks.cpu_group):
            return
        saved = self.saved_step == step or self.save(step)
        if self.log:
            self.log.event("stop", step, signal=self.flag.signal_name)
            self.log.close()
        self.watch.close()
        where = self.run.folder / f"checkpoint-{self.saved_step}" if self.saved_step is not None else "nothing yet"
        remedy = "run the same command again to continue"
        raise Stopped(
            f"stopped at step {step} by {self.flag.signal_name or 'another rank'}; saved: {where}",
            hint=remedy if saved else f"the disk could not hold a checkpoint of this step; {remedy}",
        )

    def step(self, step: int, batches: Iterator[StepBatches]) -> tuple[StepResult | None, StepBatches]:
        """One optimizer update over the step's rows; a step that was skipped on request changes nothing."""
        run, ready = self.run, next(batches)
        if step in run.skipped_steps:
            say(f"step {step}: skipped as asked") if self.is_first else None
            return None, ready
        d2q_scale, q2d_scale = run.target_scales(ready)
        try:
            result = train_step(
                run.engine,
                (batch.to(run.ranks.device) for batch in ready.micro_batches),
                d2q_scale=d2q_scale,
                q2d_scale=q2d_scale,
                learning_rate=run.learning_rate(step),
            )
        except NonFiniteGradient as error:
            raise self.incident(step, ready, error) from error
        return result, ready

    def log_if_due(self, step: int, result: StepResult | None, ready: StepBatches) -> None:
        """A line of metrics.jsonl for step + 1 updates, every logging_steps: losses of this step over all ranks."""
        self.window_tokens += ready.tokens
        self.window_pairs += len(ready.rows)
        self.window_flops += self.useful_flops(ready) if self.peak_flops else 0
        done = step + 1
        if result is None or (done % self.run.spec.logging_steps and done != self.run.last_step):
            return
        sums = torch.stack([result.d2q_sum, result.q2d_sum]).double().cpu()
        if self.run.ranks.cpu_group is not None:
            dist.all_reduce(sums, group=self.run.ranks.cpu_group)
        d2q, q2d = sums[0].item() / max(1, ready.query_targets), sums[1].item() / max(1, ready.document_targets)
        if self.log is None:
            return
        spec, seconds = self.run.spec, max(1e-9, time.monotonic() - self.window_start)
        record = {
            names.STEP: done,
            names.EPOCH: self.epoch(done),
            names.LOSS: spec.d2q_weight * d2q + spec.q2d_weight * q2d,
            names.D2Q_LOSS: d2q,
            names.Q2D_LOSS: q2d,
            names.LEARNING_RATE: self.run.learning_rate(step),
            names.GRAD_NORM: float(self.run.engine.get_global_grad_norm()),
            names.PAIRS_PER_S: self.window_pairs / seconds,
            names.TOKENS_PER_S: self.window_tokens / seconds,
            names.PEAK_MEMORY_GB: peak_memory_gb(self.run.ranks.device),
        }
        if self.peak_flops:
            record[names.MFU] = self.window_flops / (seconds * self.peak_flops * self.run.ranks.world_size)
        self.log.write(record)
        self.watch.logged(record)
        self.restart_window()

    # -- what they are made of ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        run, spec = self.run, self.run.spec
        self.shape = ModelShape.from_config(run.model.language_model.config.to_dict())
        if spec.eval_steps or spec.eval_on_start:
            self.benchmarks = load_benchmarks(spec.eval_data or [])
        if self.is_first:
            state = run.settled.state or {}
            self.log = MetricsLog(run.folder, keep_bytes=int(state.get("metrics_bytes", 0)))
            trackers = start_trackers(spec, run.folder, self.wandb_run_id, run.settled.first_step)
            self.wandb_run_id = next((t.run_id for t in trackers if t.run_id), self.wandb_run_id)
            self.log.track(trackers)
            self.log.event("resume" if run.settled.checkpoint else "start", run.settled.first_step,
                           world_size=run.ranks.world_size)  # fmt: skip
        self.on_first(self.check_disk)
        self.watch.begin()
        run.ranks.barrier()
        self.flag.poll_from_now_on()
        self.restart_window()

    def on_first(self, check: Callable[[], None]) -> None:
        """Rank 0 checks; what it refuses, all ranks refuse."""
        refused: InputError | None = None
        if self.is_first:
            try:
                check()
            except InputError as error:
                refused = error
        message = self.run.ranks.first_text(refused.message if refused else None)
        if message:
            raise refused or InputError(message)

    def end(self) -> None:
        """The last checkpoint must stand: without it the run has failed, and the same command tries again."""
        if self.saved_step != self.run.last_step:
            raise RunError(
                f"{self.run.folder}: checkpoint-{self.run.last_step} could not be written",
                hint="free some space and run the same command again",
            )
        if self.log:
            self.log.event("end", self.run.last_step)
            self.log.close()
        self.watch.close()
        if self.is_first:
            self.report()

    def report(self) -> None:
        """The run as a page. The run is done and saved: whatever fails here costs the page and a warning."""
        from anchor_cli.report.report import write_report

        try:
            say(f"curves and scores: {write_report([self.run.folder])}")
        except Exception as error:
            warn(f"report.html could not be written ({type(error).__name__}: {error}); anchor report tries again")

    def scores(self, step: int) -> dict[str, float]:
        """Every rank encodes its share; every rank gets the same scores, under the names of metrics.jsonl."""
        run = self.run
        if self.embedder is None:
            self.embedder = PackedEmbedder(
                run.model.encode,
                load_tokenizer(run.spec.model_name_or_path),
                run.settled.contract,
                name=run.spec.experiment,
                dimension=int(run.model.language_model.config.hidden_size),
                device=run.ranks.device,
                batch_texts=run.spec.eval_batch_size,
                group=run.ranks.cpu_group,
                between=self.between_batches,
            )
        self.evaluating_step = step
        run.model.eval()
        found = evaluate(self.embedder, self.benchmarks or [])
        return logged(found)

    def between_batches(self) -> None:
        """Before each batch of an evaluation: alive, and not asked to stop."""
        self.watchdog.phase("evaluation", self.evaluating_step)
        if stop_agreed(self.flag, self.run.ranks.cpu_group):
            raise StopAsked

    def save(self, step: int) -> bool:
        """True when checkpoint-{step} stands; False when the disk could not hold it (said, and tried again later)."""
        self.watchdog.phase("saving", step)
        self.tried_step = step
        try:
            folder = save(self.run, step, self.log, self.wandb_run_id)
        except OSError as error:
            self.retry_step = step + max(1, (self.save_every or self.run.total_steps) // 10)
            if self.log:
                self.log.event("checkpoint_failed", step, reason=str(error))
                kept = f"checkpoint-{self.saved_step} stays" if self.saved_step is not None else "there is none yet"
                again = f"; next try at step {self.retry_step}" if self.retry_step <= self.run.last_step else ""
                warn(f"checkpoint-{step} could not be written ({error}); {kept}{again}")
            return False
        self.retry_step = None
        self.saved_step = step
        if self.log:
            self.log.event("checkpoint", step)
            try:
                ckpt.prune(self.run.folder, self.run.spec.save_total_limit)
            except OSError as error:  # the new one stands: not a reason to lose the run
                warn(f"older checkpoints could not be removed ({error}); the next save tries again")
            self.watch.saved(folder)
        self.restart_window()
        return True

    def incident(self, step: int, ready: StepBatches, error: NonFiniteGradient) -> NonFiniteGradient:
        """What is left of a step that was refused: its rows, in a file and in the message."""
        path = RunFolder(self.run.folder).incident(step)
        if self.log:
            with contextlib.suppress(OSError):  # a full disk is no reason to hide the incident
                write_json(path, {"step": step, "reason": error.message, "rows": ready.rows.tolist()})
            self.log.event("incident", step, reason=error.message)
            self.log.close()
        self.watch.close()
        return NonFiniteGradient(
            f"step {step}: {error.message}; no weight was changed; its {len(ready.rows)} rows are in {path}",
            hint=f"look: anchor replay {self.run.folder} --step {step}; go on without it: --skip-step {step}",
        )

    def check_disk(self) -> None:
        """Before the first step: room for one checkpoint, and a word when there is none for all this run will keep.

        Raises:
            InputError: not even one fits.
        """
        run = self.run
        one = checkpoint_bytes(run)
        done = run.settled.first_step
        planned = 1 + ((run.last_step - done - 1) // self.save_every if self.save_every else 0)
        limit = run.spec.save_total_limit
        count = planned if limit is None else min(planned, max(1, limit + 1 - len(list_checkpoints(run.folder))))
        free = free_bytes(run.folder)
        if free < one and done < run.last_step:
            raise InputError(
                f"{run.folder}: {in_units(free)} free, but one checkpoint needs {in_units(one)}",
                hint="free some space, or set output_dir to another disk",
            )
        if free < count * one:
            warn(
                f"{run.folder}: {in_units(free)} free, but the {count} checkpoints of {in_units(one)} to come"
                f" need {in_units(count * one)}; set save_total_limit or free some space"
            )

    def useful_flops(self, ready: StepBatches) -> int:
        pairs = self.run.settled.pairs
        return objective_flops(
            self.shape,
            pairs.query_lengths[ready.rows],
            pairs.document_lengths[ready.rows],
            ready.query_targets + ready.document_targets,
        )

    def epoch(self, step: int) -> float:
        return step / self.run.plan.steps_per_epoch

    def restart_window(self) -> None:
        self.window_start, self.window_tokens, self.window_pairs, self.window_flops = time.monotonic(), 0, 0, 0


def peak_flops(device: torch.device) -> float | None:
    """Peak bf16 FLOPs of one GPU per second; None on a CPU and for a GPU that is not in the table."""
    gpu = gpu_of_device_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.bf16_tflops * 1e12 if gpu else None


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes): of the GPU, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return peak if math.isfinite(peak) else 0.0
