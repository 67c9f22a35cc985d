"""What a person sees of a run: on a terminal two lines that redraw below the history, elsewhere plain lines.

The plain lines are in rank 0's log either way.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from anchor_cli.base import metric_names as names
from anchor_cli.base.checkpoints import checkpoint_step
from anchor_cli.base.console import say, screen, warn
from anchor_cli.base.runs import RunFolder, read_json_lines
from anchor_cli.processes.logs import log_only, on_restore, screen_lock, wait_until_shown

if TYPE_CHECKING:
    from anchor_cli.processes.signals import StopFlag
    from anchor_cli.train.run import Run

_LOG_LINE_EVERY_S = 10.0
_HISTORY_LINE_EVERY_S = 60.0  # on a terminal, where the newest numbers are on the screen anyway
_REDRAWS_PER_S = 2.0
_PACE_RECORDS = 100  # logged records over which the pace of the ETA is taken, evaluations and saves included
_EVAL_SCORE = names.EVAL_AVG_NDCG_10
_SAVED, _BEST, _TOTAL_GB = "saved", "best", "total_gb"
"""Beside the metrics' names: step of the newest checkpoint, best average nDCG@10, memory of the GPU."""


class Live:
    """The view of one run. Only rank 0's is `enabled`."""

    def __init__(self, run: Run, *, enabled: bool, flag: StopFlag | None = None) -> None:
        self._run = run
        self._enabled = enabled
        self._flag = flag
        self._progress: RunProgress | None = None
        self._newest: dict[str, float] = {}  # newest value of every metric
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_RECORDS)  # (monotonic time, step)
        self._last_log_line = self._last_history_line = 0.0

    def begin(self) -> None:
        """Say what will be done; on a terminal, show the bar."""
        if not self._enabled:
            return
        run, first = self._run, self._run.first_step
        self._pace.append((time.monotonic(), first))
        for record in read_json_lines(RunFolder(run.folder).metrics):  # of a run that goes on
            self._newest.update(record)
        checkpoint = run.checkpoint
        if checkpoint is not None and (step := checkpoint_step(checkpoint)) is not None:
            self._newest[_SAVED] = step
        if run.best:
            self._newest[_BEST] = run.best["value"]
        say(f"{run.folder}: steps {first}..{run.last_step} of {run.total_steps}, {self._setup()}")
        if not screen().is_terminal or screen().is_dumb_terminal:
            return
        self._progress = RunProgress(screen(), run.folder.name, first, run.last_step, self._newest, self._notice)
        on_restore(self.close)
        self._progress.start()
        # The cursor stays visible, so that a process killed by SIGKILL, too, leaves the terminal as it was.
        screen().show_cursor(True)

    def logged(self, record: Mapping[str, Any]) -> None:
        """A training record was appended to metrics.jsonl."""
        now, done = time.monotonic(), int(record[names.STEP])
        self._pace.append((now, done))
        before, since = self._pace[0]
        eta_s = (now - before) / max(1, done - since) * (self._run.last_step - done)
        self._newest.update(record)
        last = done == self._run.last_step
        if last or now - self._last_log_line >= _LOG_LINE_EVERY_S or not self._last_log_line:
            self._last_log_line = now
            (log_only if self._progress else say)(plain_line(record, self._run.last_step, eta_s))
        if self._progress is None:
            return
        self._progress.reached(done, eta_s)
        if last or now - self._last_history_line >= _HISTORY_LINE_EVERY_S:
            self._last_history_line = now
            with screen_lock:
                step = Text(f"step {done:,}")
                screen().print(fit([step, *measurements(self._newest)], screen().width))

    def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
        """Retrieval was measured."""
        self._newest.update(scores)
        best = self._run.best or {}
        self._newest[_BEST] = best.get("value", float("nan"))
        mark = " (best)" if best.get("step") == step else ""
        say(f"evaluation at step {step}: nDCG@10 {scores.get(_EVAL_SCORE, float('nan')):.4f}{mark}")
        health = {key: scores.get(names.eval_key("avg", key), 0.0) for key in names.HEALTH_KEYS}
        if reason := names.collapse(health):
            warn(f"step {step}: {reason}")

    def saved(self, folder: Path) -> None:
        """A checkpoint stands."""
        self._newest[_SAVED] = checkpoint_step(folder) or 0
        say(f"saved {folder}")

    def close(self) -> None:
        """Stop redrawing; the last frame stays on the terminal."""
        if self._progress:
            wait_until_shown()
        with screen_lock:
            shown, self._progress = self._progress, None
            if shown:
                with contextlib.suppress(OSError):  # a terminal that is gone (SIGHUP)
                    shown.stop()

    def _setup(self) -> str:
        """Devices, precision, kernels and batch, as one line."""
        run, plan, device, name = self._run, self._run.plan, self._run.ranks.device, "cpu"
        if device.type == "cuda":
            import torch

            name = torch.cuda.get_device_name(device)
            self._newest[_TOTAL_GB] = torch.cuda.get_device_properties(device).total_memory / 1e9
        return (
            f"{run.ranks.world_size} x {name}, {run.spec.precision},"
            f" attention {run.kernel}{', Liger' if run.liger else ''}, {plan.global_batch_size} pairs a step"
            f" in {run.ranks.world_size} x {plan.num_micro_batches} micro-batches, {plan.num_rows:,} rows"
        )

    def _notice(self) -> str | None:
        return stop_notice(self._flag.signal_name) if self._flag else None


class RunProgress(Progress):
    """A bar with step and time left; below it the newest measurements, as many as fit, and a notice if there is one."""

    def __init__(
        self,
        console: Console,
        name: str,
        first: int,
        last: int,
        newest: Mapping[str, float],
        notice: Callable[[], str | None],
    ) -> None:
        """`newest` (newest value of every metric) and `notice` are asked at every redraw."""
        self._newest = newest
        self._notice = notice
        self._screen = console
        super().__init__(
            TextColumn("{task.description}", style="bold", markup=False,
                       table_column=Column(no_wrap=True, overflow="ellipsis", max_width=24)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            refresh_per_second=_REDRAWS_PER_S,
            redirect_stdout=False,  # what is written to them comes back through RankLog and is printed above
            redirect_stderr=False,
            expand=True,
        )  # fmt: skip
        self._task = self.add_task(name, total=max(1, last), completed=first, eta="…")

    def reached(self, step: int, eta_s: float) -> None:
        """So many steps are done."""
        self.update(self._task, completed=step, eta=clock(eta_s))

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield fit(measurements(self._newest), self._screen.width)
        if notice := self._notice():
            yield Text(notice, style="yellow")
        yield Text("")  # where the terminal echoes ^C, so that it does not push the bar out of place


def measurements(newest: Mapping[str, float]) -> Iterable[Text]:
    """Each measurement with its name, the most wanted first; those that were not made are left out."""

    def known(*keys: str) -> bool:
        return all(key in newest for key in keys)

    if known(names.D2Q_LOSS, names.Q2D_LOSS):
        yield _named("loss", f"D2Q {newest[names.D2Q_LOSS]:.3f} Q2D {newest[names.Q2D_LOSS]:.3f}")
    elif known(names.LOSS, names.ACCURACY):
        yield _named("loss", f"{newest[names.LOSS]:.3f}")
        yield _named("accuracy", f"{newest[names.ACCURACY]:.3f}")
    if known(names.LEARNING_RATE):
        yield _named("lr", f"{newest[names.LEARNING_RATE]:.1e}")
    if known(_EVAL_SCORE):
        yield _named("nDCG@10", f"{newest[_EVAL_SCORE]:.3f}", "green")
    if known(names.PAIRS_PER_S):
        pairs_per_s = newest[names.PAIRS_PER_S]
        yield Text(f"{pairs_per_s:,.0f} pairs/s" if pairs_per_s >= 1000 else f"{pairs_per_s:.1f} pairs/s")
    if known(names.MFU):
        yield _named("MFU", f"{newest[names.MFU]:.1%}")
    if known(names.GRAD_NORM):
        norm = newest[names.GRAD_NORM]
        yield _named("norm", f"{norm:.3f}" if norm < 1e5 else f"{norm:.1e}")
    if known(names.TOKENS_PER_S):
        yield Text(f"{newest[names.TOKENS_PER_S]:,.0f} tokens/s")
    if known(names.PEAK_MEMORY_GB):
        total = f"/{newest[_TOTAL_GB]:.0f}" if known(_TOTAL_GB) else ""
        yield Text(f"{newest[names.PEAK_MEMORY_GB]:.1f}{total} GB")
    if known(_SAVED):
        yield _named("saved", f"{newest[_SAVED]:,.0f}")
    if known(_BEST):
        yield _named("best nDCG@10", f"{newest[_BEST]:.3f}")


def _named(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{name} ", "dim"), (value, style))


def fit(parts: Iterable[Text], width: int) -> Text:
    """One line of the first parts, two spaces apart, that is never wider than `width`."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        gap = "  " if line else ""
        if line.cell_len + len(gap) + part.cell_len > width:
            break
        line.append(gap).append_text(part)
    return line


def clock(seconds: float) -> str:
    """`1:02:03`, `2:03`; days too: `3 d 4:05:06`."""
    days, rest = divmod(int(max(0.0, seconds)), 86400)
    minutes, seconds_left = divmod(rest, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours or days else f"{minutes}:{seconds_left:02d}"
    return f"{days} d {text}" if days else text


def stop_notice(signal_name: str | None) -> str | None:
    """What the view shows from a stop signal until the run has saved."""
    if signal_name is None:
        return None
    more = "; Ctrl-C again ends at once, unsaved" if signal_name == "SIGINT" else ""
    return f"{signal_name}: finishing this step, then saving{more}"


def plain_line(record: Mapping[str, Any], last_step: int, eta_s: float) -> str:
    """One training record as a line for logs and pipes."""
    mfu = f"  MFU {record[names.MFU]:.1%}" if names.MFU in record else ""
    if names.ACCURACY in record:  # Stage II
        parts = f"accuracy {record[names.ACCURACY]:.3f}, dropped {record[names.DROPPED_SHARE]:.1%}"
    else:
        parts = f"d2q {record[names.D2Q_LOSS]:.4f}, q2d {record[names.Q2D_LOSS]:.4f}"
    return (
        f"step {record[names.STEP]}/{last_step}  epoch {record[names.EPOCH]:.2f}"
        f"  loss {record[names.LOSS]:.4f} ({parts})"
        f"  lr {record[names.LEARNING_RATE]:.2e}  norm {record[names.GRAD_NORM]:.3f}"
        f"  {record[names.PAIRS_PER_S]:,.1f} pairs/s  {record[names.TOKENS_PER_S]:,.0f} tokens/s{mfu}"
        f"  {record[names.PEAK_MEMORY_GB]:.1f} GB  ETA {clock(eta_s)}"
    )
