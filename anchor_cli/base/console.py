"""Messages for the user go to stderr, so that stdout holds results only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from anchor_cli.base.streams import write_result

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_LINE_EVERY_S = 10.0
_BAR_AFTER_S = 1.0


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
    """One line `warning: …`, yellow on a terminal."""
    console().print(f"warning: {line}", style="yellow")


def print_json(obj: Any) -> None:
    """The result, as one JSON document on stdout; in ASCII where its encoding lacks a character.

    Raises:
        RunError: stdout is closed or full.
    """
    plain, escaped = (json.dumps(obj, ensure_ascii=escape, indent=2) + "\n" for escape in (False, True))
    write_result(plain, ascii_text=escaped)


class Progress:
    """Counts finished units; `show` gets how many are done, in how many seconds."""

    def __init__(self, show: Callable[[float, float], None]) -> None:
        self._show = show
        self._done, self._start = 0.0, time.monotonic()

    def advance(self, num: float = 1) -> None:
        """`num` more units are done."""
        self._done += num
        self._show(self._done, max(time.monotonic() - self._start, 1e-9))


@contextmanager
def progress(description: str, total: float | None = None, unit: str = "rows") -> Iterator[Progress]:
    """Shows how far a long piece of work is, with rate and time left.

    A bar on a terminal after 1 s; otherwise a plain line about every 10 s. Shorter work shows nothing.
    """
    of = "" if total is None else f"/{total:,.0f}"
    if not screen().is_terminal:
        next_line_s = _PLAIN_LINE_EVERY_S

        def print_line(done: float, seconds: float) -> None:
            nonlocal next_line_s
            if seconds >= next_line_s and done:
                next_line_s = seconds + _PLAIN_LINE_EVERY_S
                left = "" if total is None else f", {seconds * (total - done) / done:,.0f} s left"
                say(f"{description}: {done:,.0f}{of} {unit}, {done / seconds:,.1f}/s{left}")

        yield Progress(print_line)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    bars = Bars(*columns, console=screen())
    task = bars.add_task(description, total=total, count="")

    def draw(done: float, seconds: float) -> None:
        bars.update(task, completed=done, count=f"{done:,.0f}{of} {unit} {done / seconds:,.1f}/s")
        if seconds >= _BAR_AFTER_S:
            bars.start()  # once; later calls do nothing

    try:
        yield Progress(draw)
    finally:
        bars.stop()
