"""`report.html` beside prepared data: lengths, languages, rejections and ten rows as the model sees them.

One file without scripts or outside resources. It is a function of the prepared folder alone, so it is the same bytes
whenever it is made.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.checks import REASONS
from anchor_cli.data.prepare.summary import SIDES, THRESHOLDS
from anchor_cli.data.text import Int32Array, load_tokenizer

NUM_SAMPLES = 10
_SHOWN_TOKENS = 90  # of a text: this many from its beginning, then [EOS]
_COLOURS = {"query": "#2f6fde", "document": "#1d9a6c"}

_STYLE = """
:root{--ink:#1f2933;--soft:#616e7c;--line:#e4e7eb;--back:#f5f7fa}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.55 'Pretendard','Inter','Noto Sans KR',
'Noto Sans CJK KR','Apple SD Gothic Neo','Malgun Gothic',system-ui,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:32px 24px 48px}
h1{font-size:28px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:36px 0 12px}
h2 small{font-weight:400;font-size:14px;color:var(--soft)}
p{margin:4px 0;color:var(--soft);overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:18px 0}
.card,.panel{background:#fff;border:1px solid var(--line);border-radius:12px;padding:12px 16px}
.card b{display:block;font-size:23px}
.card small{color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:16px}
svg{width:100%;height:auto;display:block}
svg text{font-size:11px;fill:var(--soft);font-family:inherit}
line.limit{stroke:#c92a2a;stroke-dasharray:4 3}
svg text.limit{fill:#c92a2a}
.bar{height:14px;border-radius:3px;margin-top:4px}
table{border-collapse:collapse;width:100%}
td,th{padding:4px 10px 4px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}
.row{margin:0 0 16px}
.row h3{font-size:13px;margin:8px 0 4px;color:var(--soft);font-weight:600}
.tokens{line-height:2.05;font-size:14px;overflow-wrap:anywhere}
.t{padding:2px 0;border-radius:3px;white-space:pre-wrap;margin-right:1px}
.frame{background:#e9edf2;color:#52606d}
.content{background:#d3f3e4}
.content.odd{background:#b9e9d3}
.eos{background:#7048e8;color:#fff;padding:2px 6px;font-weight:600}
.more{color:var(--soft);font-style:italic}
"""


def write_html(path: Path, pairs: PreparedPairs, tokenizer: str | Path) -> None:
    """Write the page for a prepared folder."""
    counts = pairs.manifest["counts"]
    limit = pairs.contract.max_seq_length
    body = [
        f"<h1>Prepared pairs: {pairs.num_rows:,}</h1>",
        f"<p>{_source_line(pairs.manifest)}</p>",
        f"<p>fingerprint <code>{pairs.fingerprint}</code>, anchor {_text(pairs.manifest['anchor_version'])}</p>",
        _cards(counts, limit),
        "<h2>Lengths <small>tokens with template and [EOS], before truncation</small></h2>",
        f'<div class="grid">{"".join(_length_panel(side, counts, limit) for side in SIDES)}</div>',
        "<h2>Languages</h2>",
        f'<div class="panel">{_bars(counts["languages"], "#7048e8")}</div>',
        "<h2>Rejected</h2>",
        f'<div class="panel">{_rejections(counts)}</div>',
        f"<h2>{min(NUM_SAMPLES, pairs.num_rows)} rows as the model sees them</h2>",
        '<p><span class="t frame">template and instruction</span> <span class="t content">content</span><span '
        'class="t content odd"> tokens</span> (the content mask; shades alternate from token to token) '
        '<span class="t eos">[EOS]</span></p>',
        _samples(pairs, load_tokenizer(tokenizer)),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Prepared pairs</title><style>{_STYLE}</style><main>{''.join(body)}</main></html>\n"
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _text(value: object) -> str:
    return html.escape(str(value))


def _source_line(manifest: dict[str, Any]) -> str:
    return " + ".join(_text(source["source"]) for source in manifest["sources"])


def _cards(counts: dict[str, Any], limit: int) -> str:
    rows, tokens = counts["rows"], counts["tokens"]
    shares = counts["share_longer_than"].get(str(limit))
    cards = [
        ("pairs in", f"{rows['in']:,}", f"{rows['left_out']:,} left out by weight" if rows["left_out"] else ""),
        ("kept", f"{rows['kept']:,}", f"{100 * rows['kept'] / max(rows['in'], 1):.2f} %"),
        ("rejected", f"{rows['rejected']:,}", f"{100 * rows['rejected'] / max(rows['in'], 1):.2f} %"),
        ("tokens to train on", f"{sum(tokens.values()):,}", f"{tokens['query']:,} of queries"),
        ("max_seq_length", f"{limit:,}", f"{100 * shares['document']:.1f} % of documents cut" if shares else ""),
    ]
    if "negatives" in counts:
        left_out = sum(counts["negatives"]["left_out"].values())
        cards.append(("hard negatives", f"{counts['negatives']['kept']:,}", f"{left_out:,} left out"))
    return f'<div class="cards">{"".join(_card(*card) for card in cards)}</div>'


def _card(name: str, value: str, note: str) -> str:
    return f'<div class="card"><small>{name}</small><b>{value}</b><small>{note}&nbsp;</small></div>'


def _length_panel(side: str, counts: dict[str, Any], limit: int) -> str:
    lengths = counts["lengths"][side]
    named = ", ".join(f"{name} {lengths[name]:,}" for name in ("mean", "p50", "p90", "p99", "max"))
    longer = [counts["share_longer_than"][str(threshold)][side] for threshold in THRESHOLDS]
    shares = "".join(f'<td class="n">{100 * share:.1f} %</td>' for share in longer)
    picture = _histogram_svg(counts["histogram"][side], _COLOURS[side], limit)
    heads = "".join(f'<th class="n">&gt; {threshold:,}</th>' for threshold in THRESHOLDS)
    return (
        f'<div class="panel"><b>{side}</b><p>{named}</p>{picture}'
        f"<table><tr><th>longer than</th>{heads}</tr><tr><td>share</td>{shares}</tr></table></div>"
    )


def _histogram_svg(bins: list[list[int]], colour: str, limit: int) -> str:
    """Columns of equal width, one a bin; the last may hold all that is longer. A line marks `limit`."""
    width, height, left, bottom = 480, 200, 8, 24
    step = (width - 2 * left) / max(len(bins), 1)
    most = max((num for _, _, num in bins), default=1)
    parts = []
    for at, (begin, end, num) in enumerate(bins):
        tall = (height - bottom - 20) * num / most
        x, y = left + at * step, height - bottom - tall
        hint = f"<title>{begin:,} to {end:,} tokens: {num:,}</title>"
        place = f'x="{x + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect {place} rx="2" fill="{colour}">{hint}</rect>')
        longer = at == len(bins) - 1 and at > 0 and end - begin > bins[0][1] - bins[0][0]
        if at % max(len(bins) // 8, 1) == 0 or longer:
            parts.append(f'<text x="{x + 1:.1f}" y="{height - 8}">{begin:,}{"+" if longer else ""}</text>')
        if begin <= limit <= end or limit < begin == bins[0][0]:
            x += step * max(limit - begin, 0) / (end - begin + 1)
            parts.append(
                f'<line x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="{height - bottom}" class="limit"/>'
                f'<text x="{x + 5:.1f}" y="14" class="limit">max_seq_length {limit:,}</text>'
            )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _bars(numbers: dict[str, int], colour: str, notes: dict[str, str] | None = None) -> str:
    most, total = max(numbers.values(), default=1), sum(numbers.values())
    rows = []
    for name, num in numbers.items():
        bar = f'<div class="bar" style="background:{colour};width:{max(100 * num / most, 0.5):.1f}%"></div>'
        note = f"<td>{_text(notes.get(name, ''))}</td>" if notes else ""
        share = f"{100 * num / total:.1f} %"
        rows.append(
            f'<tr><td>{_text(name)}</td><td class="n">{num:,}</td><td class="n">{share}</td>'
            f'<td style="width:35%">{bar}</td>{note}</tr>'
        )
    return f"<table>{''.join(rows)}</table>"


def _rejections(counts: dict[str, Any]) -> str:
    if not counts["rejected"]:
        return "<p>No row was rejected.</p>"
    return _bars(counts["rejected"], "#d9480f", REASONS) + "<p>Each of them is a line of rejected.jsonl.</p>"


def _samples(pairs: PreparedPairs, tokenizer: Tokenizer) -> str:
    rows = np.unique(np.linspace(0, pairs.num_rows - 1, NUM_SAMPLES).astype(np.int64))
    queries, documents = pairs.tokens(rows)
    parts = []
    for row, query, document in zip(rows.tolist(), queries, documents, strict=True):
        language = pairs.texts(row)[2]
        starts = pairs.content_starts(row)
        for side, ids, start in zip(SIDES, (query, document), starts, strict=True):
            head = f"row {row:,} ({_text(language)}), {side}: {len(ids)} tokens, content from token {start}"
            parts.append(f'<h3>{head}</h3><div class="tokens">{_chips(ids, start, tokenizer)}</div>')
        parts.append("</div><div class='panel row'>")
    return f"<div class='panel row'>{''.join(parts[:-1])}</div>"


def _chips(ids: Int32Array, content_start: int, tokenizer: Tokenizer) -> str:
    shown = ids[:-1][:_SHOWN_TOKENS].tolist()
    pieces, held, first = [], [], 0
    for at, token in enumerate(shown):
        held.append(token)
        text = tokenizer.decode(held, skip_special_tokens=False)
        if "\ufffd" in text and at + 1 < len(shown) and len(held) < 8:
            continue  # the rest of the character is in the next token
        kind = "frame" if first < content_start else f"content{' odd' if first % 2 else ''}"
        pieces.append(f'<span class="t {kind}">{_text(text).replace(chr(10), "↵" + chr(10))}</span>')
        held, first = [], at + 1
    if len(ids) - 1 > len(shown):
        pieces.append(f' <span class="more">… {len(ids) - 1 - len(shown):,} more tokens …</span> ')
    closing = tokenizer.decode([int(ids[-1])], skip_special_tokens=False)
    return f'{"".join(pieces)}<span class="t eos">{_text(closing)}</span>'
