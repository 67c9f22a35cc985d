"""docs/demo.svg: the screen of a terminal on which `anchor demo` has run.

    tmux -L demo new-session -x 92 -y 60       # in it: clear; anchor demo
    tmux -L demo capture-pane -e -p > screen.ansi
    python benchmarks/demo_picture.py screen.ansi docs/demo.svg FOLDER    # where it ran

Everything is as it was printed, from the command to the table, but for the path of the folder, which becomes `~`. The
picture loads no font.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 92
LAST_LINE = "└"
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px ui-monospace, 'SF Mono', 'D2Coding', monospace; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def main(screen: Path, picture: Path, folder: str) -> None:
    """Draw a captured screen (text with ANSI colours)."""
    terminal = Console(record=True, width=WIDTH, highlight=False, file=io.StringIO(), force_terminal=True)
    for line in screen.read_text(encoding="utf-8").splitlines():
        text = Text.from_ansi(line.replace(folder, "~"))
        terminal.print(text, overflow="crop", no_wrap=True)
        if LAST_LINE in text.plain:
            break
    terminal.save_svg(str(picture), title="anchor demo", code_format=SVG, unique_id="demo")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
