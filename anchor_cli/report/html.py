"""Pieces of the report page: cards, panels, legends, tables and the style sheet. Everything is escaped here."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
:root{--ink:#1f2933;--soft:#616e7c;--line:#e4e7eb;--paper:#fff;--back:#f5f7fa;--accent:#0b69c7}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.55 'Pretendard','Inter','Noto Sans KR','Noto Sans CJK KR',
'Apple SD Gothic Neo','Malgun Gothic',system-ui,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1220px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:30px;line-height:1.2;margin:2px 0 12px;overflow-wrap:anywhere}
h2{font-size:20px;margin:40px 0 14px;display:flex;gap:10px;align-items:baseline}
h3{font-size:15px;margin:0;font-weight:650}
h2 span,h3 span{color:var(--soft);font-weight:400;font-size:.82em}
.kicker{color:var(--accent);font-weight:600;margin:0;font-size:13px;letter-spacing:.02em}
.run{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:14px 0 10px}
.run i{width:14px;height:14px;border-radius:4px}
.run span,.run em{font-style:normal;font-size:13px;padding:2px 10px;border-radius:99px;background:#e9edf2;color:#3e4c59;
overflow-wrap:anywhere}
.run em{font-weight:600;background:#dbeafe;color:#0b4a8f}
.run em.finished{background:#d3f9d8;color:#1b5e28}.run em.failed{background:#ffe3e3;color:#a61e1e}
.run em.stopped{background:#fff3bf;color:#7c5300}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(135px,1fr));gap:12px}
.card,.panel{background:var(--paper);border:1px solid var(--line);border-radius:12px}
.card{padding:12px 14px}
.card b{display:block;font-size:23px;line-height:1.25;font-weight:650}
.card small{display:block;color:var(--soft);font-size:12px;line-height:1.4}
.card.good b{color:#2b8a3e}.card.bad b{color:#c92a2a}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.wide{display:grid;gap:16px}
.panel{padding:16px 18px;min-width:0;margin:0}
.panel.full{grid-column:1/-1}
.panel svg{display:block;width:100%;height:auto;margin-top:4px;font-family:inherit}
.panel svg *{stroke-linejoin:round}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0 0;padding:0;list-style:none;font-size:13px}
.legend li{display:flex;gap:7px;align-items:center;overflow-wrap:anywhere}
.legend i{flex:none;width:18px;height:4px;border-radius:2px}
.legend small,.note{color:var(--soft);font-size:12.5px}
.note{margin:8px 0 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13px;margin-top:6px}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
th{color:var(--soft);font-weight:600;white-space:pre-line;vertical-align:bottom}
td:first-child,th:first-child{text-align:left;padding-left:0}
table.text td,table.text th{text-align:left}
table.text td:last-child,table.keys td{white-space:normal;overflow-wrap:anywhere}
table.keys td,table.keys th{text-align:left}
table.keys td:first-child{color:var(--soft);white-space:nowrap;width:1%;padding-right:24px}
tr.differs td{background:#fff9db}
td.best{font-weight:700;color:#2b8a3e}
tbody tr:last-child td{border-bottom:0}
code,.mono{font-family:ui-monospace,'SF Mono','D2Coding','Noto Sans Mono CJK KR',monospace;font-size:.93em}
summary{cursor:pointer;font-weight:650}
.swatch{display:inline-block;width:12px;height:12px;border-radius:4px;margin-right:8px;vertical-align:-1px}
h2 small.key{margin-left:auto;font-size:13px;font-weight:400;display:flex;gap:14px}
h2 small.key b{font-weight:600}
footer{margin-top:36px;color:var(--soft);font-size:12.5px}
details.panel .panel{border:0;padding:0}
.halves{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:8px 28px}
.halves>*{min-width:0}
@media(max-width:820px){.grid,details.panel .panel{border:0;padding:0}
.halves{grid-template-columns:1fr}main{padding:20px 14px}}
@media print{body{background:#fff}.panel,.card{break-inside:avoid}}
"""


def card(title: str, value: str, note: str, kind: str = "") -> str:
    """One number with its name above and where it comes from below."""
    return (
        f'<div class="card {kind}"><small>{html.escape(title)}</small><b>{html.escape(value)}</b>'
        f"<small>{html.escape(note)}</small></div>"
    )


def panel(title: str, korean: str, picture: str, under: str, note: str = "", wide: bool = False) -> str:
    """A chart with its title above, and its legend and a remark below."""
    side = f' <span lang="ko">{html.escape(korean)}</span>' if korean else ""
    foot = f'<p class="note">{html.escape(note)}</p>' if note else ""
    kind = "panel full" if wide else "panel"
    return f'<figure class="{kind}"><h3>{html.escape(title)}{side}</h3>{picture}{under}{foot}</figure>'


def legend(labels: Sequence[tuple[str, str, str, bool]]) -> str:
    """(label, colour, remark, bold) of each line; a line without a label has its remark only."""
    items = []
    for label, colour, remark, bold in labels:
        name = f"<b>{html.escape(label)}</b>" if bold else html.escape(label)
        items.append(f'<li><i style="background:{colour}"></i>{name} <small>{html.escape(remark)}</small></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def cell_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    wide: bool = False,
    note: str = "",
    folded: bool = False,
    text_columns: bool = False,
    html_column: int | None = None,
) -> str:
    """A table in a panel. A cell that starts with `*` is the best of its column; `html_column` is not escaped."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = []
    for row in rows:
        cells = []
        for index, text in enumerate(row):
            best = text.startswith("*") and not text_columns
            shown = text if index == html_column else html.escape(text[1:] if best else text)
            cells.append(f'<td class="best">★ {shown}</td>' if best else f"<td>{shown}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="text"' if text_columns else ""
    table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    table = f'<div class="scroll">{table}</div>'
    foot = f'<p class="note">{html.escape(note)}</p>' if note else ""
    if folded:
        table = f"<details><summary>{html.escape(title)} ({len(rows)})</summary>{table}</details>"
        title = ""
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f'<div class="panel{" full" if wide else ""}">{heading}{table}{foot}</div>'


def key_table(sides: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Keys and values, nested keys dotted; several sides get a column each and differing rows a colour."""
    flats = [(name, flatten(values)) for name, values in sides]
    keys: dict[str, None] = {}
    for _, flat in flats:
        for key in flat:
            keys.setdefault(key)
    if not keys:
        return ""
    rows = []
    for key in keys:
        values = [flat.get(key, "–") for _, flat in flats]
        kind = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f'<td class="mono">{html.escape(value)}</td>' for value in values)
        rows.append(f'<tr{kind}><td class="mono">{html.escape(key)}</td>{cells}</tr>')
    head = ""
    if len(flats) > 1:
        head = "<thead><tr><th></th>" + "".join(f"<th>{html.escape(name)}</th>" for name, _ in flats) + "</tr></thead>"
    table = f'<table class="keys">{head}<tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="panel"><div class="scroll">{table}</div></div>'


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
