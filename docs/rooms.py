"""Draw the rooms of the package: `python docs/rooms.py` writes docs/rooms.svg from the imports as they are.

The floors are those of the import-linter contract in pyproject.toml; a room is a folder of `anchor_cli/`, an arrow is
an import of one room by another, as wide as the number of importing modules. A test keeps the picture current.
"""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "anchor_cli"
PICTURE = ROOT / "docs" / "rooms.svg"

WIDTH, MARGIN, GAP = 1240, 20, 16  # pixels
LINE, HEAD, FLOOR_GAP = 16, 30, 46  # height of a module's line, of a room's title, between floors
COLUMNS = 2  # columns of module names in a room

STYLE = """
  text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #24292f; }
  .room { fill: #f6f8fa; stroke: #8c959f; }
  .title { font-weight: 600; font-size: 14px; }
  .floor { fill: #8c959f; font-size: 11px; }
  .arrow { fill: none; stroke: #0969da; stroke-opacity: 0.35; }
"""


def floors() -> list[list[str]]:
    """Rooms by floor, top floor first, from the layers contract of import-linter."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(one["layers"] for one in settings["contracts"] if one.get("containers") == ["anchor_cli"])
    floors = [[room.strip() for room in layer.split("|")] for layer in layers]
    return [rooms for rooms in floors if (PACKAGE / rooms[0]).is_dir()]


def modules(room: str) -> list[str]:
    """The modules of a room, those of its inner rooms as `inner/module`."""
    files = sorted((PACKAGE / room).rglob("*.py"), key=lambda path: (len(path.parts), path))
    return [str(path.relative_to(PACKAGE / room).with_suffix("")) for path in files if path.name != "__init__.py"]


def imports() -> Counter[tuple[str, str]]:
    """How many modules of one room import another room."""
    arrows: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent == PACKAGE:
            continue  # the program's start, above all rooms
        room = path.relative_to(PACKAGE).parts[0]
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        targets = {name.split(".")[1] for name in names if name.startswith("anchor_cli.")}
        arrows.update((room, target) for target in sorted(targets - {room}))
    return arrows


def picture() -> str:
    """The drawing, as SVG text."""
    boxes: dict[str, tuple[float, float, float, float]] = {}  # room -> x, y, width, height
    parts: list[str] = []
    y = float(MARGIN)
    for number, rooms in zip(range(len(floors()), 0, -1), floors(), strict=True):
        lists = {room: modules(room) for room in rooms}
        weights = {room: max(1, min(3, (len(names) + 5) // 6)) for room, names in lists.items()}
        unit = (WIDTH - 2 * MARGIN - GAP * (len(rooms) - 1)) / sum(weights.values())
        columns = {room: max(1, int(unit * weights[room] // 190)) for room in rooms}
        height = HEAD + 8 + LINE * max(-(-len(names) // columns[room]) for room, names in lists.items())
        x = float(MARGIN)
        for room, names in lists.items():
            width = unit * weights[room]
            boxes[room] = (x, y, width, height)
            parts.append(f'<rect class="room" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height}" rx="6"/>')
            parts.append(f'<text class="title" x="{x + 10:.0f}" y="{y + 20:.0f}">{escape(room)}/</text>')
            rows = -(-len(names) // columns[room])
            for index, name in enumerate(names):
                left, top = x + 10 + index // rows * (width - 10) / columns[room], y + HEAD + 10 + LINE * (index % rows)
                parts.append(f'<text x="{left:.0f}" y="{top:.0f}">{escape(name)}</text>')
            x += width + GAP
        parts.append(f'<text class="floor" x="{MARGIN}" y="{y - 6:.0f}">floor {number}</text>')
        y += height + FLOOR_GAP
    arrows = [
        arrow(boxes[source], boxes[target], count)
        for (source, target), count in sorted(imports().items())
        if source in boxes and target in boxes
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - FLOOR_GAP + MARGIN:.0f}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join([*arrows, *parts]) + "\n</svg>\n"
    )


def arrow(source: tuple[float, float, float, float], target: tuple[float, float, float, float], count: int) -> str:
    """A curve from the lower edge of one room to the upper edge of another."""
    x1, y1 = source[0] + source[2] / 2, source[1] + source[3]
    x2, y2 = target[0] + target[2] / 2, target[1]
    middle = (y1 + y2) / 2
    return (
        f'<path class="arrow" stroke-width="{min(6, 1 + count / 2):.1f}" '
        f'd="M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}"/>'
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
