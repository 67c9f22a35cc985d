"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchor_cli.engine.hardware import gpu_of_device_name
from anchor_cli.words import metric_names as names
from anchor_cli.words.console import console, say

if TYPE_CHECKING:
    from anchor_cli.engine.run import Run

_PLAIN_LINE_EVERY_S = 10.0


class Watch:
    """Rank 0's voice. The other ranks have one too and never use it."""

    def __init__(self, run: Run, *, enabled: bool) -> None:
        import torch

        self._run = run
        self._enabled = enabled
        self._start = time.monotonic()
        self._last_line = 0.0
        cuda = run.ranks.device.type == "cuda"
        gpu = gpu_of_device_name(torch.cuda.get_device_name(run.ranks.device)) if cuda else None
        self.peak_flops = gpu.bf16_tflops * 1e12 if gpu else None

    def begin(self) -> None:
        if not self._enabled:
            return
        run = self._run
        plan = run.plan
        say(
            f"{run.folder}: steps {run.settled.first_step}..{run.last_step} of {run.total_steps},"
            f" {plan.num_rows:,} rows, {plan.global_batch_size} pairs a step"
            f" in {run.ranks.world_size} x {plan.num_micro_batches} micro-batches,"
            f" {run.spec.precision}, attention {run.kernel}{', Liger' if run.liger else ''}, {run.ranks.device.type}"
        )
        self._start = time.monotonic()

    def logged(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        done = record[names.STEP]
        last = done == self._run.last_step
        if not console().is_terminal and now - self._last_line < _PLAIN_LINE_EVERY_S and not last and done > 1:
            return
        self._last_line = now
        first = self._run.settled.first_step
        left = (now - self._start) / max(1, done - first) * (self._run.last_step - done)
        say(
            f"step {done}/{self._run.last_step}  loss {record[names.LOSS]:.4f} (d2q {record[names.D2Q_LOSS]:.4f},"
            f" q2d {record[names.Q2D_LOSS]:.4f})  lr {record[names.LEARNING_RATE]:.2e}"
            f"  norm {record[names.GRAD_NORM]:.3f}"
            f"  {record[names.PAIRS_PER_S]:,.1f} pairs/s  {record[names.TOKENS_PER_S]:,.0f} tokens/s  ETA {clock(left)}"
        )

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        best = self._run.best or {}
        mark = " (best)" if best.get("step") == step else ""
        say(f"evaluation at step {step}: nDCG@10 {scores.get(names.EVAL_AVG_NDCG_10, float('nan')):.4f}{mark}")

    def saved(self, folder: Path) -> None:
        say(f"saved {folder}")

    def close(self) -> None:
        """Give the terminal back."""


def clock(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, seconds_left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours else f"{minutes}:{seconds_left:02d}"
