"""Pictures of a run as inline SVG: matplotlib draws, text stays text so that the browser's fonts render Korean."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from anchor_cli.report.read import Event, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, SOFT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
EVENT_COLOURS = {"resume": "#7048e8", "stop": "#868e96", "incident": "#c92a2a", "checkpoint_failed": "#e67700"}
_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
MAX_POINTS = 900
"""Points drawn of one line; longer ones are thinned, extremes kept (a panel is some 560 pixels wide)."""


@dataclass(frozen=True)
class Line:
    """One drawn line. `label` goes into the page's own legend, never into the SVG."""

    series: Series
    label: str
    colour: str
    bold: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """What one panel shows. `smooth` adds a running mean (`log`: median) over the faint raw line; `scale` multiplies
    values; `clock` (unix s) makes the x axis time since then, and `lines` then hold seconds since it for steps."""

    lines: Sequence[Line]
    unit: str
    events: Sequence[Event] = ()
    smooth: bool = False
    mark_best: bool = False
    from_zero: bool = False
    log: bool = False
    reference: tuple[float, str] | None = None
    scale: float = 1.0
    last_step: int = 0
    wide: bool = False
    clock: float | None = None

    @property
    def clock_unit(self) -> tuple[float, str]:
        """Seconds of one unit of the clock axis, and its name: hours, or minutes below two hours."""
        return (3600.0, "hours") if self.last_step >= 7200 else (60.0, "minutes")


def thin(steps: Sequence[int], values: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most about `limit` points that keep each bucket's lowest and highest, so that no spike disappears."""
    if len(steps) <= limit:
        return [float(step) for step in steps], list(values)
    num_buckets = limit // 2
    chosen: list[int] = []
    for bucket in range(num_buckets):
        start, stop = bucket * len(steps) // num_buckets, (bucket + 1) * len(steps) // num_buckets
        low = min(range(start, stop), key=values.__getitem__)
        high = max(range(start, stop), key=values.__getitem__)
        chosen.extend(sorted({low, high}))
    return [float(steps[i]) for i in chosen], [values[i] for i in chosen]


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over the `width` values around each place, fewer at the ends."""
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    half = width // 2
    means = []
    for place in range(len(values)):
        start, stop = max(0, place - half), min(len(values), place + half + 1)
        means.append((total[stop] - total[start]) / (stop - start))
    return means


def running_median(values: Sequence[float], width: int) -> list[float]:
    """Median over the `width` values around each place: a single spike leaves no trace."""
    half = width // 2
    return [statistics.median(values[max(0, place - half) : place + half + 1]) for place in range(len(values))]


def tick_label(value: float) -> str:
    """A tick: 12000 -> 12k, 0.00004 -> 4e-5, 0.25 -> 0.25."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if 0 < size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def svg(chart: Chart, name: str) -> Markup:
    """The chart as an `<svg>` element whose ids start with `name` (several SVGs share one page)."""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13.2, 3.6) if chart.wide else (6.4, 2.9))
        axes = figure.subplots()
        if chart.log:
            axes.set_yscale("log")
        for line in chart.lines:
            _draw_line(axes, chart, line)
        _frame(axes, chart)
        _draw_events(axes, chart)
        if chart.reference is not None:
            _draw_reference(axes, *chart.reference)
        if chart.mark_best:
            _mark_best(axes, chart)
        if chart.wide:
            figure.subplots_adjust(left=0.04, right=0.992, top=0.92, bottom=0.125)
        else:
            figure.subplots_adjust(left=0.085, right=0.985, top=0.9, bottom=0.15)
        return Markup(_inline(figure, name))


def _draw_line(axes: Axes, chart: Chart, line: Line) -> None:
    if not len(line.series):
        return
    values = [value * chart.scale for value in line.series.values]
    style = "--" if line.dashed else "-"
    width = 2.2 if line.bold else 1.5
    few = len(values) <= 60
    if chart.smooth and len(values) > 60:
        axes.plot(*thin(line.series.steps, values), color=line.colour, alpha=0.22, linewidth=0.8)
        width_of_mean = min(max(5, len(values) // 60), 101)
        values = (running_median if chart.log else running_mean)(values, width_of_mean)
    steps, thinned = thin(line.series.steps, values)
    if chart.clock is not None:
        steps = [second / chart.clock_unit[0] for second in steps]
    axes.plot(steps, thinned, style, color=line.colour, linewidth=width, marker="o" if few else None, markersize=3.5)


def _frame(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    unit, unit_name = chart.clock_unit if chart.clock is not None else (1.0, "")
    last = max([chart.last_step, *(line.series.steps[-1] for line in chart.lines if len(line.series))], default=1)
    last_x = max(last / unit, 1e-3)
    axes.set_xlim(-0.01 * last_x, 1.015 * last_x)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=chart.clock is None))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:,.0f}"))
    axes.set_xlabel("step" if chart.clock is None else f"{unit_name} since the start, pauses included")
    axes.set_title(chart.unit, loc="left")
    if not chart.log:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
        low, high = axes.get_ylim()
        shown = [value * chart.scale for line in chart.lines for value in line.series.values]
        if chart.from_zero or (shown and min(shown) >= 0.0 > low):
            axes.set_ylim(0.0, max([high, *(1.06 * value for value in shown)]) or 1.0)
    else:
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))


def _draw_events(axes: Axes, chart: Chart) -> None:
    for event in chart.events:
        place = float(event.step) if chart.clock is None else (event.time - chart.clock) / chart.clock_unit[0]
        colour = EVENT_COLOURS.get(event.kind, SOFT)
        axes.axvline(place, color=colour, linewidth=1.1, linestyle=(0, (3, 2)), zorder=0.5)
        marker = {"incident": "X", "checkpoint_failed": "X", "stop": "s"}.get(event.kind, "^")
        axes.plot(
            [place], [1.0], marker=marker, markersize=6, color=colour, transform=axes.get_xaxis_transform(),
            clip_on=False, zorder=5,
        )  # fmt: skip


def _draw_reference(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color=SOFT, linewidth=1.0, linestyle=":")
    axes.annotate(
        label, (1.0, value), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
        ha="right", va="bottom", color=SOFT, fontsize=8, zorder=8, bbox=_PLATE,
    )  # fmt: skip


def _mark_best(axes: Axes, chart: Chart) -> None:
    """A star at the highest point of every line, and the value at the bold ones (all, when there is no bold line)."""
    some_bold = any(line.bold for line in chart.lines)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.14 * (high - low))
    for line in chart.lines:
        if not len(line.series):
            continue
        step, value = line.series.best()
        axes.plot([step], [value], marker="*", markersize=12, color=line.colour, markeredgecolor="white", zorder=6)
        if line.bold or not some_bold:
            left = step > 0.9 * axes.get_xlim()[1]
            axes.annotate(
                f"{value:.3f}", (step, value), xytext=(-2 if left else 0, 8), textcoords="offset points",
                ha="right" if left else "center", va="bottom", fontsize=9, fontweight="bold", color=line.colour,
                zorder=7, bbox=_PLATE,
            )  # fmt: skip


@contextmanager
def _style() -> Iterator[None]:
    import logging

    import matplotlib

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "anchor",
        "font.family": "DejaVu Sans",  # measures only: comes with matplotlib; the page names its own fonts
        "font.size": 9,
        "axes.edgecolor": "#cbd2d9",
        "axes.labelcolor": SOFT,
        "axes.titlecolor": SOFT,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "ytick.major.size": 0,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings):
        yield


def _inline(figure: Any, name: str) -> str:
    """Inline `<svg>`: no XML head, no fixed size, ids prefixed, the page's fonts."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # `*{…}` would style the whole page
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return head + ' role="img">' + re.sub(r"\n\s*", "\n", rest)
