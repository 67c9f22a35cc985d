"""The counts of `anchor prepare`: as a table and histograms for a terminal, as JSON, and for the report page.

Percentiles are exact: every length has its own count. Lengths are tokens with template and [EOS], before truncation;
`tokens` are what training will read, after it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from anchor_cli.data.prepare.checks import REASONS
from anchor_cli.data.prepare.instructions import InstructionTally
from anchor_cli.data.text import Int32Array
from anchor_cli.report.lengths import Bin, bins_of, round_up

if TYPE_CHECKING:
    from rich.console import Console

SIDES = ("query", "document")
THRESHOLDS = (128, 256, 512, 1024, 2048)
PERCENTILES = (1, 10, 25, 50, 75, 90, 95, 99)
_BINS = 16
_BAR = 40


@dataclass
class Tally:
    """Counts of one preparation."""

    num_in: int = 0
    """Pairs looked at; a row with a list of documents is as many pairs."""
    num_left_out: int = 0
    """Pairs not looked at, because of `--weights`."""
    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    """By side, after truncation."""
    lengths: dict[str, npt.NDArray[np.int64]] = field(
        default_factory=lambda: {side: np.zeros(1, dtype=np.int64) for side in SIDES}
    )
    """By side: how many kept texts have n tokens before truncation, for each n."""

    instructions: InstructionTally = field(default_factory=InstructionTally)
    num_negatives: int | None = None
    """Hard negatives kept; None where none were asked for."""
    rows_by_negatives: Counter[int] = field(default_factory=Counter)
    negatives_left_out: Counter[str] = field(default_factory=Counter)

    def add(self, table: pa.Table, query_tokens: Int32Array, document_tokens: Int32Array) -> None:
        """Count kept rows; the arrays are (rows,) lengths before truncation."""
        self.num_kept += table.num_rows
        if not table.num_rows:
            return
        for side, tokens in zip(SIDES, (query_tokens, document_tokens), strict=True):
            counts = np.bincount(tokens)
            longest = max(len(counts), len(self.lengths[side]))
            grown = np.zeros(longest, dtype=np.int64)
            grown[: len(self.lengths[side])] = self.lengths[side]
            grown[: len(counts)] += counts
            self.lengths[side] = grown
            self.tokens[side] += pc.sum(table.column(f"{side}_length")).as_py()
        if "negative_lengths" in table.column_names:
            lengths = table.column("negative_lengths")
            self.rows_by_negatives.update(pc.list_value_length(lengths).to_pylist())
            self.num_negatives = sum(num * rows for num, rows in self.rows_by_negatives.items())
            self.tokens["negative"] += pc.sum(pc.list_flatten(lengths)).as_py() or 0
        for entry in pc.value_counts(table.column("language")).to_pylist():
            self.languages[entry["values"]] += entry["counts"]

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the manifest; the same for the same rows."""
        return {
            "rows": {
                "in": self.num_in,
                "kept": self.num_kept,
                "rejected": self.rejected.total(),
                "left_out": self.num_left_out,
            },
            "rejected": {reason: self.rejected[reason] for reason in REASONS if self.rejected[reason]},
            "languages": dict(sorted(self.languages.items(), key=lambda item: (-item[1], item[0]))),
            "instructions": self.instructions.by_instruction,
            "forms": self.instructions.by_form,
            "tokens": {side: self.tokens[side] for side in SIDES},
            "lengths": {side: length_summary(self.lengths[side]) for side in SIDES},
            "share_longer_than": {
                str(limit): {side: share_longer(self.lengths[side], limit) for side in SIDES} for limit in THRESHOLDS
            },
            "histogram": {side: histogram(self.lengths[side]) for side in SIDES},
        } | ({} if self.num_negatives is None else {"negatives": self._negatives()})

    def _negatives(self) -> dict[str, Any]:
        return {
            "kept": self.num_negatives,
            "tokens": self.tokens["negative"],
            "rows_with": {str(num): self.rows_by_negatives[num] for num in sorted(self.rows_by_negatives)},
            "left_out": dict(sorted(self.negatives_left_out.items())),
        }


@dataclass
class PrepareSummary:
    """The result of `anchor prepare`."""

    out: str
    fingerprint: str
    tally: Tally
    seconds: float
    """Wall-clock time; not part of the prepared folder, which is the same whenever and however it is made."""

    rows_seconds: float = 0.0
    """Of `seconds`, those between the first row and the last: without the start of processes and the report."""

    @property
    def rows_per_s(self) -> float:
        """Rows of the source in a second, once the work runs."""
        return round(self.tally.num_in / max(self.rows_seconds, 1e-9), 1)

    def as_dict(self) -> dict[str, Any]:
        """One JSON document."""
        timing = {"seconds": round(self.seconds, 3), "rows_per_s": self.rows_per_s}
        return {"out": self.out, "fingerprint": self.fingerprint, **self.tally.as_dict(), **timing}


def length_summary(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """mean, min, percentiles (nearest rank) and max of lengths given as counts (longest + 1,)."""
    total = int(counts.sum())
    if not total:
        return {}
    lengths = np.flatnonzero(counts)
    cumulative = np.cumsum(counts)
    summary: dict[str, float] = {
        "mean": round(float(np.arange(len(counts)) @ counts) / total, 1),
        "min": int(lengths[0]),
    }
    for percent in PERCENTILES:
        rank = -(-total * percent // 100)  # the smallest length that `percent` of the texts do not exceed
        summary[f"p{percent}"] = int(np.searchsorted(cumulative, rank))
    return {**summary, "max": int(lengths[-1])}


def share_longer(counts: npt.NDArray[np.int64], limit: int) -> float:
    """Share of texts with more than `limit` tokens, 0..1."""
    return round(float(counts[limit + 1 :].sum()) / max(int(counts.sum()), 1), 6)


def histogram(counts: npt.NDArray[np.int64]) -> list[list[int]]:
    """[from, to, texts] of about 16 bins of equal, round width up to the 99th percentile, and one of what is longer."""
    if not counts.sum():
        return []
    last = int(length_summary(counts)["p99"])
    width = round_up(max(last // _BINS, 1))
    bins = []
    for begin in range(0, last + 1, width):
        bins.append([begin, begin + width - 1, int(counts[begin : begin + width].sum())])
    longer = int(counts[bins[-1][1] + 1 :].sum())
    if longer:
        bins.append([bins[-1][1] + 1, len(counts) - 1, longer])
    first = next(at for at, entry in enumerate(bins) if entry[2])
    return bins[first:]


def print_summary(summary: PrepareSummary, max_seq_length: int, out: Console) -> None:
    """Print the table and the histograms."""
    from rich.table import Table

    counted, tally = summary.as_dict(), summary.tally
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    names = ["document tokens", *(f"  {reason}" for reason in counted["rejected"])]
    table.add_column(style="bold", min_width=max(map(len, names)))
    table.add_column(justify="right", min_width=len(f"{max(tally.num_in, *tally.tokens.values()):,}"))
    table.add_column(overflow="fold")
    table.add_row("pairs in", f"{tally.num_in:,}", _left_out(tally))
    table.add_row("kept", f"{tally.num_kept:,}", _percent(tally.num_kept, tally.num_in))
    table.add_row("rejected", f"{tally.rejected.total():,}", _percent(tally.rejected.total(), tally.num_in))
    for reason, num in counted["rejected"].items():
        table.add_row(f"  {reason}", f"{num:,}", REASONS[reason], style="dim")
    for language, num in counted["languages"].items():
        table.add_row(f"language {language}", f"{num:,}", _percent(num, tally.num_kept))
    for side in SIDES:
        table.add_row(f"{side} tokens", f"{tally.tokens[side]:,}", "to train on, template and [EOS] included")
    if "negatives" in counted:
        rows = counted["negatives"]["rows_with"]
        table.add_row("negatives", f"{tally.num_negatives:,}", f"{min(map(int, rows))} to {max(map(int, rows))} a row")
        for reason, num in counted["negatives"]["left_out"].items():
            table.add_row(f"  {reason}", f"{num:,}", "left out of its row", style="dim")
    out.print(table, crop=False)
    out.print()
    out.print(_length_table(counted, max_seq_length), crop=False)
    for side in SIDES:
        out.print(f"\n{side} length, tokens", style="bold")
        _print_histogram(bins_of(counted["histogram"][side]), max_seq_length, out)
    rate = f", {summary.rows_per_s:,.0f} rows/s once started"
    out.print(f"\n{summary.out}: {tally.num_kept:,} pairs in {summary.seconds:.1f} s{rate}")
    out.print(f"fingerprint {summary.fingerprint[:16]}; pictures in report.html, rejected rows in rejected.jsonl")


def _length_table(counted: dict[str, Any], max_seq_length: int) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), pad_edge=False)
    names = ["mean", "p50", "p90", "p99", "max"]
    table.add_column("length")
    for name in names:
        table.add_column(name, justify="right")
    for limit in THRESHOLDS:
        table.add_column(f"> {limit}" + ("*" if limit == max_seq_length else ""), justify="right")
    for side in SIDES:
        lengths = [f"{counted['lengths'][side][name]:,g}" for name in names]
        shares = [f"{100 * counted['share_longer_than'][str(limit)][side]:.1f}%" for limit in THRESHOLDS]
        table.add_row(side, *lengths, *shares)
    table.caption = f"* cut there (max_seq_length {max_seq_length})" if max_seq_length in THRESHOLDS else None
    table.caption_justify = "left"
    return table


def _print_histogram(bins: list[Bin], max_seq_length: int, out: Console) -> None:
    most = max((one.count for one in bins), default=1)
    width = max((len(f"{one.start:,}") for one in bins), default=1)
    for one in bins:
        cut = " <- max_seq_length" if one.start <= max_seq_length <= one.stop else ""
        bar = "█" * round(_BAR * one.count / most) or ("▏" if one.count else "")
        out.print(f"  {one.start:>{width},}{'+' if one.open_ended else ' '} {bar} {one.count:,}{cut}")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else ""


def _left_out(tally: Tally) -> str:
    return f"{tally.num_left_out:,} more left out by --weights" if tally.num_left_out else ""
