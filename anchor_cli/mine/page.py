"""`mining.html` beside mined pairs: how many rows got how many negatives, scores, rejected candidates, rows to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anchor_cli.mine.select import REJECTED
from anchor_cli.report.render import COLOURS, render

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 960, 230, 46, 28, 12  # pixels of the picture and of its axes' room


def write_page(path: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Write the page: one file without scripts or outside resources."""
    page = render(
        "mined.html.j2",
        summary=summary,
        cards=_cards(summary),
        reasons=REJECTED,
        bars=score_bars(summary["scores"]),
        picture={"width": WIDTH, "height": HEIGHT, "left": LEFT, "base": HEIGHT - BOTTOM},
        colours={"positives": COLOURS[2], "negatives": COLOURS[1]},
        samples=samples,
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _cards(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows, negatives = summary["rows"], summary["negatives"]
    without = summary["rows_with"].get("0", 0)
    return [
        ("rows", f"{rows:,}", f"{summary['queries']:,} distinct queries", ""),
        ("documents", f"{summary['documents']:,}", "distinct, searched exactly", ""),
        ("negatives", f"{negatives:,}", f"{negatives / max(1, rows):.2f} a row", ""),
        (
            "rows without any",
            f"{without:,}",
            f"{without / max(1, rows):.1%} of all",
            "bad" if without > rows / 5 else "",
        ),
    ]


def score_bars(scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars of both histograms, each as shares of its own sum, over the cosines that occur."""
    sides = {"positives": scores["positives"], "negatives": scores["negatives"]}
    used = [at for at in range(len(scores["edges"]) - 1) if any(counts[at] for counts in sides.values())]
    if not used:
        return []
    first, last = used[0], used[-1]
    step = (WIDTH - LEFT) / (last - first + 1)
    shares = {side: [count / max(1, sum(counts)) for count in counts] for side, counts in sides.items()}
    highest = max(max(side) for side in shares.values())
    return [
        {
            "side": side,
            "x": LEFT + (at - first) * step + (1 if side == "positives" else step / 2),
            "y": HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share[at] / highest,
            "width": step / 2 - 1,
            "height": (HEIGHT - BOTTOM - TOP) * share[at] / highest,
            "hint": f"cosine {scores['edges'][at]:.2f} to {scores['edges'][at + 1]:.2f}: {share[at]:.1%} of {side}",
            "label": f"{scores['edges'][at]:.2f}" if side == "positives" and (at - first) % 5 == 0 else "",
        }
        for side, share in shares.items()
        for at in range(first, last + 1)
    ]
