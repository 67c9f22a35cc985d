"""Messages for the user go to stderr, so that stdout holds results only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_LINE_EVERY_S = 10.0


def console() -> Console:
    """A rich console on the current stderr; NO_COLOR is honoured by rich. Paths and brackets are left as they are."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


_screen: Console | None = None


def screen() -> Console:
    """Where progress is drawn: the terminal itself while stderr is redirected into a log, else stderr."""
    return _screen or console()


def draw_on(terminal: IO[str] | None) -> None:
    """From now on progress is drawn on `terminal`, wherever stderr leads; None: on stderr again."""
    global _screen
    from rich.console import Console, ConsoleDimensions

    class Terminal(Console):
        """Asks its own file for its size: rich asks descriptors 0 to 2, which are pipes in a worker."""

        @property  # type: ignore[misc]  # rich's has a setter, too, which nobody calls here
        def size(self) -> ConsoleDimensions:
            try:
                columns, lines = os.get_terminal_size(self.file.fileno())
            except OSError:  # the terminal is gone
                columns, lines = 0, 0
            return ConsoleDimensions(self._width or columns or 80, self._height or lines or 25)

    _screen = None if terminal is None else Terminal(file=terminal, highlight=False, markup=False, emoji=False)


def say(line: str) -> None:
    """One plain line."""
    console().print(line)


def warn(line: str) -> None:
    """One line that deserves a look: `warning: …`, yellow on a terminal."""
    console().print(f"warning: {line}", style="yellow")


def print_json(obj: Any) -> None:
    """The result, as one JSON document on stdout."""
    sys.stdout.write(json.dumps(obj, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, num: float = 1) -> None:
        """`num` more units are done."""


@contextmanager
def progress(description: str, total: float | None = None, unit: str = "rows") -> Iterator[Progress]:
    """Shows how far a long piece of work is, with rate and time left.

    A bar on a terminal; otherwise a plain line about every 10 s, and nothing at all for work shorter than that.
    """
    out = screen()
    if not out.is_terminal:
        yield _PlainProgress(description, total, unit)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    with RichProgress(*columns, console=out, transient=False) as bars:
        yield _BarProgress(bars, bars.add_task(description, total=total, count="", rate=""), total, unit)


def _count(done: float, total: float | None) -> str:
    return f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"


class _BarProgress:
    def __init__(self, bars: Any, task: Any, total: float | None, unit: str) -> None:
        self._bars, self._task, self._total, self._unit = bars, task, total, unit
        self._done, self._start = 0.0, time.monotonic()

    def advance(self, num: float = 1) -> None:
        self._done += num
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        self._bars.update(
            self._task,
            advance=num,
            count=f"{_count(self._done, self._total)} {self._unit}",
            rate=f"{rate:,.1f}/s",
        )


class _PlainProgress:
    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._start = 0.0, time.monotonic()
        self._next_line = self._start + _PLAIN_LINE_EVERY_S

    def advance(self, num: float = 1) -> None:
        self._done += num
        now = time.monotonic()
        if now < self._next_line:
            return
        self._next_line = now + _PLAIN_LINE_EVERY_S
        rate = self._done / (now - self._start)
        left = "" if self._total is None else f", {(self._total - self._done) / max(rate, 1e-9):,.0f} s left"
        say(f"{self._description}: {_count(self._done, self._total)} {self._unit}, {rate:,.1f}/s{left}")
