"""The training loop: evaluate, save, stop, step, log. One extra turn, so that the last step needs no special code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from anchor_cli.base import metric_names as names
from anchor_cli.base.console import say, warn
from anchor_cli.base.errors import RunError, Stopped
from anchor_cli.base.files import write_json
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.text import load_tokenizer
from anchor_cli.evaluate.embedder import PackedEmbedder
from anchor_cli.evaluate.evaluate import evaluate, logged
from anchor_cli.processes.signals import StopFlag, stop_agreed
from anchor_cli.processes.watchdog import Watchdog
from anchor_cli.spec.schedule import interval_steps
from anchor_cli.train.deepspeed import NonFiniteGradient
from anchor_cli.train.live import Live
from anchor_cli.train.metrics_log import MetricsLog, start_trackers
from anchor_cli.train.run import Run
from anchor_cli.train.saving import Checkpoints
from anchor_cli.train.throughput import Throughput


class Training:
    """The training loop of one rank, first step to last."""

    def __init__(self, run: Run, flag: StopFlag, watchdog: Watchdog) -> None:
        self.run, self.flag, self.watchdog = run, flag, watchdog
        self.eval_every = interval_steps(run.spec.eval_steps, run.total_steps)
        self.evaluation = Evaluation(run, self.between_batches) if self.eval_every or run.spec.eval_on_start else None
        sources = self.evaluation.sources if self.evaluation else {}
        self.log = open_log(run, sources) if run.is_first else None
        self.checkpoints = Checkpoints(run, self.log)
        self.throughput = Throughput(run)
        self.live = Live(run, enabled=run.is_first, flag=flag)

    def train(self) -> None:
        """Run to the last step.

        Raises:
            Stopped: a signal asked for it; everything is saved.
            NonFiniteGradient: before the update that would have spoilt the weights.
        """
        run, first, last = self.run, self.run.first_step, self.run.last_step
        self.begin()
        batches = run.feed.steps(first, last)
        for step in range(first, last + 1):
            self.watchdog.phase("step", step)
            self.evaluate_if_due(step)
            self.save_if_due(step)
            self.stop_if_asked(step)
            if step == last:
                break
            ready = next(batches)
            result = self.update_if_kept(step, ready)
            self.log_if_due(step, ready, result)
        self.end()

    def begin(self) -> None:
        """From here on a signal stops the loop instead of the process."""
        self.live.begin()
        self.run.ranks.barrier()
        self.flag.poll_from_now_on()
        self.throughput.restart()

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate before the step's update: every eval_steps, at the end, and at the start if the spec says so."""
        run = self.run
        due = self.eval_every and (step % self.eval_every == 0 or step == run.last_step) and step > 0
        due = due or (run.spec.eval_on_start and step == 0)
        if self.evaluation is None or not due or run.evaluated_step == step:
            return
        self.watchdog.phase("evaluation", step)
        try:
            scores = self.evaluation.scores()
        except StopAsked:
            return  # stop_if_asked, next in the loop, saves; the evaluation is done after resuming
        run.evaluated_step = step
        average = scores.get(names.EVAL_AVG_NDCG_10)
        if average is not None and (run.best is None or average > run.best["value"]):
            run.best = {"step": step, "value": average}
        if self.log:
            self.log.write({names.STEP: step, names.EPOCH: run.epoch(step), **scores})
            self.log.event("evaluation", step, **{"ndcg@10": average})
            self.live.evaluated(step, scores)
        self.throughput.restart()

    def between_batches(self) -> None:
        """Before each batch of an evaluation: it makes progress, and stops where a signal asks for it."""
        self.watchdog.alive()
        if stop_agreed(self.flag, self.run.ranks.cpu_group):
            raise StopAsked

    def save_if_due(self, step: int) -> None:
        """Checkpoint every save_steps and at the end."""
        if self.checkpoints.due(step):
            self.save(step)

    def save(self, step: int) -> bool:
        """Whether checkpoint-{step} stands now."""
        self.watchdog.phase("saving", step)
        saved = self.checkpoints.save(step)
        if saved and self.run.is_first:
            self.live.saved(self.run.files.checkpoint(step))
        self.throughput.restart()
        return saved

    def stop_if_asked(self, step: int) -> None:
        """Save and leave with 75 when any rank received a stop signal."""
        if not stop_agreed(self.flag, self.run.ranks.cpu_group):
            return
        saved = self.checkpoints.saved_step == step or self.save(step)
        self.close("stop", step, signal=self.flag.signal_name)
        remedy = "run the same command again to continue"
        raise Stopped(
            f"stopped at step {step} by {self.flag.signal_name or 'another rank'};"
            f" saved: {self.checkpoints.newest or 'nothing yet'}",
            hint=remedy if saved else f"the disk could not hold a checkpoint of this step; {remedy}",
        )

    def update_if_kept(self, step: int, ready: Any) -> Any:
        """One optimizer update over the step's rows; None for a step of `--skip-step`, which changes nothing."""
        run = self.run
        if step in run.skipped_steps:
            say(f"step {step}: skipped as asked") if run.is_first else None
            return None
        try:
            return run.update(ready)
        except NonFiniteGradient as error:
            raise self.incident(step, ready, error) from error

    def log_if_due(self, step: int, ready: Any, result: Any) -> None:
        """A line of metrics.jsonl for step + 1 updates, every logging_steps: losses of this step over all ranks."""
        run, spec, done = self.run, self.run.spec, step + 1
        self.throughput.add(ready)
        if result is None or (done % spec.logging_steps and done != run.last_step):
            return
        metrics = run.objective.metrics(result, ready)
        if self.log is None:
            return
        record = {
            names.STEP: done,
            names.EPOCH: run.epoch(done),
            **metrics,
            names.LEARNING_RATE: run.learning_rate(step),
            names.GRAD_NORM: float(run.engine.get_global_grad_norm()),
            **self.throughput.record(),
        }
        self.log.write(record)
        self.live.logged(record)

    def incident(self, step: int, ready: Any, error: NonFiniteGradient) -> NonFiniteGradient:
        """The error of a step that was refused, with its rows in a file."""
        path = self.run.files.incident(step)
        if self.log:
            with contextlib.suppress(OSError):  # a full disk is no reason to hide the incident
                write_json(path, {"step": step, "reason": error.message, "rows": ready.rows.tolist()})
        self.close("incident", step, reason=error.message)
        since = sorted({step} | {skipped for skipped in self.run.skipped_steps if skipped >= self.run.first_step})
        options = " ".join(f"--skip-step {each}" for each in since)  # those before it are in no checkpoint yet
        return NonFiniteGradient(
            f"step {step}: {error.message}; no weight was changed; its {len(ready.rows)} rows are in {path}",
            hint=f"look: anchor replay {self.run.folder} --step {step}; go on without it: {options}",
        )

    def end(self) -> None:
        """The last checkpoint must stand: without it the run has failed, and the same command tries again."""
        run = self.run
        if self.checkpoints.saved_step != run.last_step:
            raise RunError(
                f"{run.folder}: checkpoint-{run.last_step} could not be written",
                hint="free some space and run the same command again",
            )
        self.close("end", run.last_step)
        if run.is_first:
            write_page(run)

    def close(self, event: str, step: int, **details: Any) -> None:
        """The last line of events.jsonl; trackers end, the terminal is given back."""
        if self.log:
            self.log.event(event, step, **details)
            self.log.close()
        self.live.close()


class StopAsked(Exception):
    """A stop was agreed on in the middle of an evaluation."""


class Evaluation:
    """The run's benchmarks, and its model as an embedder: every rank encodes a share and gets all scores."""

    def __init__(self, run: Run, between_batches: Callable[[], None]) -> None:
        self._run = run
        self._benchmarks = load_benchmarks(run.spec.eval_data or [])
        self.sources = {benchmark.name: benchmark.source for benchmark in self._benchmarks}
        """Where each set is from: folder, or Hub id and commit."""
        self._embedder = PackedEmbedder(
            run.model.encode,
            load_tokenizer(run.spec.model_name_or_path),
            run.contract,
            name=run.spec.experiment,
            dimension=int(run.model.language_model.config.hidden_size),
            device=run.ranks.device,
            batch_texts=None if run.ranks.device.type == "cuda" else run.spec.eval_batch_size,
            group=run.ranks.cpu_group,
            between=between_batches,
        )

    def scores(self) -> dict[str, float]:
        """Scores under the names of metrics.jsonl."""
        self._run.model.eval()
        try:
            return logged(evaluate(self._embedder, self._benchmarks))
        finally:
            self._run.model.train()


def open_log(run: Run, eval_data: dict[str, str]) -> MetricsLog:
    """Rank 0's log with the run's trackers, cut back to where the run continues; `eval_data`: sources of its sets."""
    log = MetricsLog(run.folder, keep_bytes=int(run.state.get("metrics_bytes", 0)))
    trackers = start_trackers(run.spec, run.folder, run.wandb_run_id, run.first_step)
    run.wandb_run_id = next((tracker.run_id for tracker in trackers if tracker.run_id), run.wandb_run_id)
    log.track(trackers)
    details: dict[str, Any] = {"world_size": run.ranks.world_size}
    details |= {"eval_data": eval_data} if eval_data else {}
    details |= {"skipped_steps": sorted(run.skipped_steps)} if run.skipped_steps else {}
    log.event("resume" if run.checkpoint else "start", run.first_step, **details)
    return log


def write_page(run: Run) -> None:
    """The run as a page. The run is done and saved: whatever fails here costs the page and a warning."""
    from anchor_cli.report.report import write_report

    try:
        say(f"curves and scores: {write_report([run.folder])}")
    except Exception as error:
        warn(f"report.html could not be written ({type(error).__name__}: {error}); anchor report tries again")
