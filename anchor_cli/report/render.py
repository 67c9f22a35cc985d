"""Pages from the templates in `templates/`, and how they write numbers. Whatever a template is given is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anchor_cli.report.lengths import HEIGHT, WIDTH, histogram

COLOURS = ("#0b69c7", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0c8599", "#846358", "#5c940d")
"""Line colours in order of use, each with contrast 4:1 or more on white."""
SIDE_COLOURS = {"query": COLOURS[0], "document": COLOURS[2]}


def render(template: str, **context: Any) -> str:
    """The page that `templates/{template}` makes of `context`; a name it does not have is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": lambda value: f"{value:,}", "short": short_count, "g": lambda value: f"{value:,g}"}
    environment.globals |= {
        "histogram": histogram,
        "key_rows": key_rows,
        "side_colours": SIDE_COLOURS,
        "svg_width": WIDTH,
        "svg_height": HEIGHT,
    }
    return environment.get_template(template).render(**context)


def short_count(count: int) -> str:
    """1,862.9 M for millions, 12,345 below."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def number(value: float) -> str:
    """A number for a person: 21,600 · 196 · 41.0 · 1.25 · 0.0125 · 4.0e-05."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 1:
        return f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    if size == 0:
        return "0"
    return f"{value:.4f}" if size >= 1e-3 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Seconds as "3 d 4 h", "2 h 05 min", "4 min 10 s" or "9 s"; empty for none."""
    if seconds <= 0:
        return ""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}; lists of plain values stay on one line."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                flat.update(flatten(item, f"{name}.{index}."))
        elif isinstance(value, str):
            flat[name] = value
        else:
            flat[name] = json.dumps(value, ensure_ascii=False)
    return flat


def key_rows(sides: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Nested keys, dotted, each with its value in every side."""
    flats = [flatten(values) for values in sides]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    return [(key, [flat.get(key, "–") for flat in flats]) for key in keys]
