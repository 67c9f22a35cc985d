"""The data panel of the report: what `anchor prepare` counted, from its manifest `prepare.json`."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from anchor_cli.report.charts import COLOURS, bars
from anchor_cli.report.html import card, cell_table, key_table
from anchor_cli.report.read import RunRecord

SIDES = (("query", "Query length", "질문 길이", COLOURS[0]), ("document", "Document length", "문서 길이", COLOURS[2]))


def data_panel(run: RunRecord, index: int, *, single: bool) -> str:
    """Rows in, kept and rejected, lengths and histograms of one run's data; empty without a manifest."""
    if not run.data:
        return ""
    heading = "" if single else f"<h3>{html.escape(run.name)}</h3>"
    counts = run.data.get("counts")
    if not isinstance(counts, Mapping) or not isinstance(counts.get("rows"), Mapping):  # another format: as it is
        return heading + key_table([(run.name, run.data)])
    contract = run.data.get("contract", {})
    limit = contract.get("max_seq_length") if isinstance(contract, Mapping) else None
    pictures = [
        _histogram(counts, side, title, korean, colour, limit, f"data{index}-{side}")
        for side, title, korean, colour in SIDES
    ]
    return (
        f'{heading}<div class="cards">{"".join(_cards(counts, limit))}</div>'
        f'<div class="grid">{"".join(pictures)}{_rejected(counts)}{_lengths(counts)}</div>'
        f'<details class="panel"><summary>Sources, text contract, options</summary>{_rest(run)}</details>'
    )


def _rest(run: RunRecord) -> str:
    data = run.data or {}
    return key_table([(run.name, {key: data[key] for key in _REST if key in data})])


_REST = ("fingerprint", "anchor_version", "contract", "sources", "options")


def _cards(counts: Mapping[str, Any], limit: Any) -> list[str]:
    rows, tokens = counts["rows"], counts.get("tokens", {})
    share = counts.get("share_longer_than", {}).get(str(limit), {}).get("document")
    cards = [
        card("pairs kept", f"{rows['kept']:,}", f"of {rows['in']:,}"),
        card("pairs rejected", f"{rows['rejected']:,}", "reasons below"),
        card("query tokens", _millions(tokens.get("query", 0)), "an epoch"),
        card("document tokens", _millions(tokens.get("document", 0)), "an epoch, after truncation"),
    ]
    if isinstance(share, int | float):
        cards.append(card("documents cut", f"{share * 100:.1f} %", f"longer than {limit} tokens"))
    for language, kept in list(counts.get("languages", {}).items())[:3]:
        cards.append(card(f"language {language}", f"{kept:,}", f"{kept / max(rows['kept'], 1) * 100:.1f} % of pairs"))
    return cards


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def _histogram(
    counts: Mapping[str, Any], side: str, title: str, korean: str, colour: str, limit: Any, name: str
) -> str:
    bins: Sequence[Sequence[int]] = counts.get("histogram", {}).get(side, [])
    if not bins:
        return ""
    mark = float(limit) if isinstance(limit, int) and side == "document" else None
    picture = bars(bins, colour, "texts; the last bar is everything longer", name, mark)
    return (
        f'<figure class="panel"><h3>{title} <span lang="ko">{korean}</span></h3>{picture}'
        f'<p class="note">tokens, template and [EOS] included, before truncation</p></figure>'
    )


def _rejected(counts: Mapping[str, Any]) -> str:
    reasons: Mapping[str, int] = counts.get("rejected", {})
    rows = [[reason.replace("_", " "), f"{num:,}"] for reason, num in reasons.items()]
    return cell_table("Rejected pairs, by reason", ["reason", "pairs"], rows or [["none", "0"]])


def _lengths(counts: Mapping[str, Any]) -> str:
    lengths: Mapping[str, Mapping[str, float]] = counts.get("lengths", {})
    columns = [name for name in lengths.get("query", {}) if name not in ("p1", "p10", "p25", "p75")]
    rows = [[side, *(f"{values.get(column, 0):,g}" for column in columns)] for side, values in lengths.items()]
    return cell_table("Lengths in tokens", ["", *columns], rows) if columns else ""
