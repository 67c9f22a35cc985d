"""A histogram of text lengths as `anchor prepare` counts it: bins for a terminal, and the geometry of its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anchor_cli.report.charts import tick_label

WIDTH, HEIGHT = 480, 210
_LEFT, _TOP, _BOTTOM = 40, 20, 34  # room for the axes' labels, pixels of the picture
_MAX_LABELS = 8


@dataclass(frozen=True)
class Bin:
    """Texts of `start` to `stop` tokens, both included."""

    start: int
    stop: int
    count: int
    open_ended: bool
    """It holds everything that is longer than the bins of equal width before it."""

    @property
    def label(self) -> str:
        return f"{self.start:,}+" if self.open_ended else f"{self.start:,}"


@dataclass(frozen=True)
class Bar:
    """One bin as a rectangle."""

    x: float
    y: float
    width: float
    height: float
    label: str
    hint: str
    open_ended: bool


@dataclass(frozen=True)
class Histogram:
    """What the template draws; places are pixels from the upper left corner."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]
    """Of the count axis: (y, label)."""
    limit_x: float | None
    """Place of max_seq_length, if it is within the lengths."""


def bins_of(counted: Sequence[Sequence[int]]) -> list[Bin]:
    """Bins from the [from, to, texts] of a manifest."""
    last = len(counted) - 1
    return [
        Bin(start, stop, count, open_ended=at == last > 0 and stop - start > counted[0][1] - counted[0][0])
        for at, (start, stop, count) in enumerate(counted)
    ]


def histogram(counted: Sequence[Sequence[int]], limit: int | None) -> Histogram:
    """Bars of equal width, one a bin."""
    bins = bins_of(counted)
    step = (WIDTH - _LEFT) / max(len(bins), 1)
    room = HEIGHT - _TOP - _BOTTOM
    most = max((one.count for one in bins), default=0) or 1
    every = -(-len(bins) // _MAX_LABELS)
    bars, limit_x = [], None
    for at, one in enumerate(bins):
        x, height = _LEFT + at * step, room * one.count / most
        labelled = one.open_ended or (at % every == 0 and not (bins[-1].open_ended and at > len(bins) - 1 - every))
        hint = f"{one.start:,} to {one.stop:,} tokens: {one.count:,}"
        bars.append(
            Bar(x + 1, HEIGHT - _BOTTOM - height, step - 2, height, one.label if labelled else "", hint, one.open_ended)
        )
        if limit is not None and (one.start <= limit <= one.stop or (at == 0 and limit < one.start)):
            limit_x = x + step * max(limit - one.start, 0) / (one.stop - one.start + 1)
    tick = round_up(-(-most // 4))
    ticks = [(HEIGHT - _BOTTOM - room * value / most, tick_label(value)) for value in range(0, most + 1, tick)]
    return Histogram(bars, ticks, limit_x)


def round_up(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= number:
                return factor * step
        step *= 10
