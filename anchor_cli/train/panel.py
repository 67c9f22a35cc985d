"""The picture of a run that a terminal shows: numbers in, a rich renderable out. Nothing here knows the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from anchor_cli.base import metric_names as names

_BARS = "▁▂▃▄▅▆▇█"
_HISTORY = 512  # values kept of each curve; beyond it neighbours are averaged, so a curve always spans the whole run
_NAME = "dim"
_BEST = "green"


class Curve:
    """Values of a quantity over the run, at most `_HISTORY` of them, evenly thinned."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._each = 1  # values averaged into one
        self._open: list[float] = []

    def add(self, value: float) -> None:
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self.values.append(sum(self._open) / len(self._open))
        self._open = []
        if len(self.values) >= _HISTORY:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(a + b) / 2 for a, b in pairs]
            self._each *= 2


def sparkline(values: list[float], width: int) -> str:
    """`values` as `width` or fewer block characters, lowest ▁ to highest █; means where there are more values."""
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    low, span = min(means), max(means) - min(means)
    if not span > 0:  # flat, or not numbers
        return _BARS[0] * count
    return "".join(_BARS[min(7, int(8 * (mean - low) / span))] for mean in means)


def clock(seconds: float) -> str:
    """`1:02:03`, `2:03`; days too: `3 d 4:05:06`."""
    days, rest = divmod(int(max(0.0, seconds)), 86400)
    minutes, seconds_left = divmod(rest, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{seconds_left:02d}" if hours or days else f"{minutes}:{seconds_left:02d}"
    return f"{days} d {text}" if days else text


@dataclass
class State:
    """What the panel shows."""

    title: str
    subtitle: str
    first_step: int
    last_step: int
    total_memory_gb: float | None = None
    record: dict[str, float] = field(default_factory=dict)  # the last line of metrics.jsonl
    d2q: Curve = field(default_factory=Curve)
    q2d: Curve = field(default_factory=Curve)
    scores: Curve = field(default_factory=Curve)
    last_score: tuple[int, float] | None = None  # (step, nDCG@10)
    best_score: tuple[int, float] | None = None
    checkpoint: str | None = None
    checkpoint_s: float = 0.0  # monotonic time at which it was saved
    start_s: float = field(default_factory=time.monotonic)
    eta_s: float | None = None
    notice: Callable[[], str | None] = lambda: None  # what goes on out of the ordinary, shown below

    def learn(self, record: dict[str, float]) -> None:
        """Take in a line of metrics.jsonl: of training, or of an evaluation."""
        if names.LOSS in record:
            self.record = record
            self.d2q.add(record[names.D2Q_LOSS])
            self.q2d.add(record[names.Q2D_LOSS])
        score = record.get(names.EVAL_AVG_NDCG_10)
        if score is not None:
            self.last_score = (int(record[names.STEP]), score)
            self.scores.add(score)
            if self.best_score is None or score > self.best_score[1]:
                self.best_score = self.last_score

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        notice = self.notice()
        yield Panel(
            _body(self, options.max_width - 4),
            title=_cut(self.title, options.max_width - 6, "bold"),
            subtitle=_cut(notice or self.subtitle, options.max_width - 6, "yellow" if notice else _NAME),
            title_align="left",
            subtitle_align="left",
            border_style="yellow" if notice else "cyan",
        )
        yield Text("")  # where the terminal echoes ^C, so that it does not push the panel out of place


def _cut(text: str, width: int, style: str) -> Text:
    """One line, never wider than the frame; `…` shows that it was."""
    line = Text(f" {text} ", style=style)
    line.truncate(width, overflow="ellipsis")
    return line


def _body(state: State, width: int) -> Table:
    rows = Table.grid(expand=True, padding=(0, 0))
    rows.add_row(_progress(state, width))
    rows.add_row(_losses(state, width))
    rows.add_row(_speed(state))
    rows.add_row(_results(state, width))
    return rows


def _progress(state: State, width: int) -> Table:
    done = int(state.record.get(names.STEP, state.first_step))
    grid = Table.grid(expand=True, padding=(0, 1))
    for column in range(4):
        grid.add_column(no_wrap=True, ratio=1 if column == 1 else None)
    share = done / max(1, state.last_step)
    count = Text.assemble(("step ", _NAME), (f"{done:,}", "bold"), f"/{state.last_step:,}")
    left = "…" if state.eta_s is None else clock(state.eta_s)
    epoch = state.record.get(names.EPOCH)
    where = Text.assemble(f"{share:.1%} ", ("epoch ", _NAME), "–" if epoch is None else f"{epoch:.2f}")
    times = Text.assemble((" run ", _NAME), clock(time.monotonic() - state.start_s), (" ETA ", _NAME), (left, "bold"))
    grid.add_row(count, ProgressBar(total=max(1, state.last_step), completed=done), where, times)
    return grid


def _losses(state: State, width: int) -> Table:
    record = state.record
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(no_wrap=True, style=_NAME, width=8)
    grid.add_column(no_wrap=True, justify="right", width=9)
    grid.add_column(no_wrap=True, ratio=1, style="cyan")
    grid.add_column(no_wrap=True, style=_NAME, width=9)
    grid.add_column(no_wrap=True, justify="right", width=10)
    line = max(8, width - 8 - 9 - 9 - 10 - 4)
    norm = record.get(names.GRAD_NORM)
    grid.add_row(
        "loss D2Q", _number(record.get(names.D2Q_LOSS), "{:.4f}"), sparkline(state.d2q.values, line),
        "lr", _number(record.get(names.LEARNING_RATE), "{:.2e}"),
    )  # fmt: skip
    grid.add_row(
        "loss Q2D", _number(record.get(names.Q2D_LOSS), "{:.4f}"), sparkline(state.q2d.values, line),
        "grad norm", _number(norm, "{:.3f}" if norm is None or norm < 1e5 else "{:.2e}"),
    )  # fmt: skip
    return grid


def _speed(state: State) -> Table:
    record = state.record
    grid = Table.grid(expand=True, padding=(0, 1))
    for _ in range(4):
        grid.add_column(no_wrap=True, ratio=1)
    memory = _number(record.get(names.PEAK_MEMORY_GB), "{:.1f}")
    memory += f"/{state.total_memory_gb:.0f} GB" if state.total_memory_gb else " GB"
    mfu = record.get(names.MFU)
    cells = (
        ("pairs/s", _number(record.get(names.PAIRS_PER_S), "{:,.1f}")),
        ("tokens/s", _number(record.get(names.TOKENS_PER_S), "{:,.0f}")),
        ("MFU", "–" if mfu is None else f"{mfu:.1%}"),
        ("memory", memory),
    )
    grid.add_row(*(Text.assemble((f"{name} ", _NAME), value) for name, value in cells))
    return grid


def _results(state: State, width: int) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("nDCG@10  ", _NAME)
    if state.last_score is None or state.best_score is None:
        line.append("–")
    else:
        line.append(f"{state.last_score[1]:.4f}", "bold").append(f" at {state.last_score[0]:,}")
        line.append("  best ", _NAME).append(f"{state.best_score[1]:.4f}", _BEST).append(f" at {state.best_score[0]:,}")
    line.append("  saved ", _NAME)
    if state.checkpoint is None:
        line.append("nothing yet")
    else:
        line.append(f"{state.checkpoint} {clock(time.monotonic() - state.checkpoint_s)} ago")
    room = width - line.cell_len - 2
    if room >= 4:
        line.append("  " + sparkline(state.scores.values, room), _BEST)
    return line


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
