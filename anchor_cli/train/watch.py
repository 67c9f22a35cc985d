"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere (and, either way, in rank 0's log)."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_cli.base import metric_names as names
from anchor_cli.base.checkpoints import checkpoint_step
from anchor_cli.base.console import say, screen
from anchor_cli.base.runs import RunFolder, read_json_lines
from anchor_cli.plan.hardware import gpu_of_device_name
from anchor_cli.processes.logs import before_giving_back, let_through, log_only, printing
from anchor_cli.train.panel import State, clock

if TYPE_CHECKING:
    from rich.live import Live

    from anchor_cli.processes.signals import StopFlag
    from anchor_cli.train.run import Run

_PLAIN_LINE_EVERY_S = 10.0
_REDRAWS_PER_S = 2.0
_PACE_RECORDS = 100  # logged records over which the pace of the ETA is taken, evaluations and saves included


class Watch:
    """Rank 0's voice. The other ranks have one too and never use it."""

    def __init__(self, run: Run, *, enabled: bool, flag: StopFlag | None = None) -> None:
        import torch

        self._run = run
        self._enabled = enabled
        self._last_line = 0.0
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_RECORDS)  # (monotonic time, step)
        self._live: Live | None = None
        cuda = run.ranks.device.type == "cuda"
        self._device = torch.cuda.get_device_name(run.ranks.device) if cuda else "cpu"
        gpu = gpu_of_device_name(self._device) if cuda else None
        self.peak_flops = gpu.bf16_tflops * 1e12 if gpu else None
        total = torch.cuda.get_device_properties(run.ranks.device).total_memory / 1e9 if cuda else None
        self._state = State("", "", run.settled.first_step, run.last_step, total_memory_gb=total)
        if flag is not None:
            self._state.notice = lambda: stopping(flag.signal_name)

    def begin(self) -> None:
        """Say what will be done, and show the panel where there is a terminal."""
        if not self._enabled:
            return
        run, plan = self._run, self._run.plan
        what = (
            f"{run.ranks.world_size} x {self._device}, {run.spec.precision},"
            f" attention {run.kernel}{', Liger' if run.liger else ''}, {plan.global_batch_size} pairs a step"
            f" in {run.ranks.world_size} x {plan.num_micro_batches} micro-batches, {plan.num_rows:,} rows"
        )
        first = run.settled.first_step
        self._pace.append((time.monotonic(), first))
        self._state.start_s = time.monotonic()
        self._state.title = run.folder.name
        self._state.subtitle = what
        if not screen().is_terminal:
            say(f"{run.folder}: steps {first}..{run.last_step} of {run.total_steps}, {what}")
            return
        log_only(f"{run.folder}: steps {first}..{run.last_step} of {run.total_steps}, {what}")
        self._remember()
        self._show()

    def logged(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl was written."""
        now, done = time.monotonic(), int(record[names.STEP])
        self._pace.append((now, done))
        (before, since) = self._pace[0]
        self._state.learn(record)
        self._state.eta_s = (now - before) / max(1, done - since) * (self._run.last_step - done)
        if now - self._last_line < _PLAIN_LINE_EVERY_S and done != self._run.last_step and self._last_line:
            return
        self._last_line = now
        (log_only if self._live else say)(plain_line(record, self._run.last_step, self._state.eta_s))

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Retrieval was measured."""
        self._state.learn({names.STEP: step, **scores})
        best = self._run.best or {}
        mark = " (best)" if best.get("step") == step else ""
        say(f"evaluation at step {step}: nDCG@10 {scores.get(names.EVAL_AVG_NDCG_10, float('nan')):.4f}{mark}")

    def saved(self, folder: Path) -> None:
        """A checkpoint stands."""
        self._state.checkpoint, self._state.checkpoint_s = folder.name, time.monotonic()
        say(f"saved {folder}")

    def close(self) -> None:
        """Leave the panel as it is and give the terminal back."""
        if self._live:
            let_through()
        with printing:
            live, self._live = self._live, None
            if live:
                with contextlib.suppress(OSError):  # a terminal that is gone (SIGHUP) needs nothing back
                    live.stop()

    def _show(self) -> None:
        from rich.live import Live

        self._live = Live(
            self._state,
            console=screen(),
            refresh_per_second=_REDRAWS_PER_S,
            redirect_stdout=False,  # what others write comes through rank_log and is printed above
            redirect_stderr=False,
        )
        before_giving_back(self.close)
        self._live.start(refresh=True)
        # The cursor stays visible, so that a process killed by SIGKILL, too, leaves the terminal as it was.
        screen().show_cursor(True)

    def _remember(self) -> None:
        """What earlier parts of a resumed run left: curves, scores, the last checkpoint."""
        for record in read_json_lines(RunFolder(self._run.folder).metrics):
            self._state.learn(record)
        checkpoint = self._run.settled.checkpoint
        if checkpoint is not None and checkpoint_step(checkpoint) is not None:
            self._state.checkpoint, self._state.checkpoint_s = checkpoint.name, time.monotonic()


def stopping(signal_name: str | None) -> str | None:
    """What the panel says once a stop was asked for."""
    if signal_name is None:
        return None
    return f"{signal_name}: finishing this step, then saving" + (
        "; Ctrl-C again ends at once, unsaved" if signal_name == "SIGINT" else ""
    )


def plain_line(record: dict[str, Any], last_step: int, eta_s: float) -> str:
    """One logged step as a line for logs and pipes."""
    mfu = f"  MFU {record[names.MFU]:.1%}" if names.MFU in record else ""
    return (
        f"step {record[names.STEP]}/{last_step}  epoch {record[names.EPOCH]:.2f}"
        f"  loss {record[names.LOSS]:.4f} (d2q {record[names.D2Q_LOSS]:.4f}, q2d {record[names.Q2D_LOSS]:.4f})"
        f"  lr {record[names.LEARNING_RATE]:.2e}  norm {record[names.GRAD_NORM]:.3f}"
        f"  {record[names.PAIRS_PER_S]:,.1f} pairs/s  {record[names.TOKENS_PER_S]:,.0f} tokens/s{mfu}"
        f"  {record[names.PEAK_MEMORY_GB]:.1f} GB  ETA {clock(eta_s)}"
    )
