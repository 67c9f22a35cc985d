"""Prepared rows are written in the order of the sources, without duplicates, and counted; rejected ones are listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anchor_cli import __version__
from anchor_cli.base.contract import write_contract
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import write_json
from anchor_cli.data.pairs import FORMAT, MANIFEST, NOT_OF_THE_ROWS, PreparedPairs
from anchor_cli.data.prepare.checks import Seen
from anchor_cli.data.prepare.near import BANDS
from anchor_cli.data.prepare.page import write_html
from anchor_cli.data.prepare.shards import ShardWriter
from anchor_cli.data.prepare.summary import PrepareSummary, Tally
from anchor_cli.data.prepare.work import Prepared, Rejected, Work
from anchor_cli.data.sources.sources import Source

REJECTED_FILE, REPORT_FILE = "rejected.jsonl", "report.html"


class Keeper:
    """Takes prepared rows in the order of the sources; leaves out duplicates; writes and counts the rest."""

    def __init__(self, staged: Path, scratch: Path, schema: pa.Schema, *, near: bool) -> None:
        self._staged = staged
        self._writer = ShardWriter(staged, schema)
        self._exact, self._canonical = Seen(scratch), Seen(scratch)
        self._bands = [Seen(scratch) for _ in range(BANDS)] if near else []
        self._rejected = open(staged / REJECTED_FILE, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._tally = Tally()
        self._first_rejected: dict[str, str] = {}

    def take(self, source: str, prepared: Prepared) -> None:
        """One part of the file `source`."""
        fresh_exact = self._exact.add(prepared.exact_keys)
        kept = self._canonical.add(prepared.canonical_keys)
        reasons = np.where(fresh_exact, "same_query_same_document", "duplicate_pair")
        if prepared.near_keys is not None:
            far = _far(self._bands, prepared.near_keys, kept)
            reasons = np.where(kept & ~far, "near_duplicate", reasons)
            kept &= far
        repeated = [
            Rejected(int(prepared.rows[at]), _item(prepared.items[at]), str(reasons[at]), None)
            for at in np.flatnonzero(~kept)
        ]
        for row in sorted([*prepared.rejected, *repeated], key=lambda row: (row.row, row.item or 0)):
            self._reject(source, row)
        table = prepared.table.filter(pa.array(kept))
        self._writer.write(table)
        self._tally.add(table, prepared.query_tokens[kept], prepared.document_tokens[kept])
        self._tally.num_in += prepared.num_in
        self._tally.num_left_out += prepared.num_left_out
        self._tally.negatives_left_out += prepared.negatives_left_out
        self._tally.instructions.add(source, [prepared.uses[at] for at in np.flatnonzero(kept)])

    def finish(self, out: Path, sources: list[Source], work: Work, options: dict[str, Any]) -> PrepareSummary:
        """Write the rest of the folder, what makes it load last: killed between, it is whole or does not load.

        Raises:
            InputError: no row is left.
        """
        self._rejected.close()
        tally = self._tally
        if tally.num_kept == 0:
            worst = ", ".join(f"{num:,} {reason}" for reason, num in tally.rejected.most_common(3)) or "no row at all"
            example = next(iter(self._first_rejected.values()), None)
            specs = ", ".join(source.spec for source in sources)
            raise InputError(f"{specs}: no row is left of {tally.num_in:,}: {worst}", example)
        of_the_rows = work.contract.model_dump_json(exclude=set(NOT_OF_THE_ROWS))
        files, fingerprint = self._writer.finish(of_the_rows)
        write_contract(self._staged, work.contract)
        summary = PrepareSummary(str(out), fingerprint, tally, 0.0)
        manifest = {
            "format": FORMAT,
            "anchor_version": __version__,
            "fingerprint": fingerprint,
            "num_rows": tally.num_kept,
            "contract": work.contract.model_dump(),
            "sources": [_source_entry(source) for source in sources],
            "options": options,
            "counts": tally.as_dict(),
            "files": files,
        }
        write_html(self._staged / REPORT_FILE, PreparedPairs.described(self._staged, manifest), work.tokenizer)
        self._writer.describe(files, fingerprint)
        write_json(self._staged / MANIFEST, manifest)
        return summary

    def _reject(self, source: str, row: Rejected) -> None:
        line: dict[str, Any] = {"source": source, "row": row.row}
        for key in ("item", "side", "benchmark"):
            if getattr(row, key) is not None:
                line[key] = getattr(row, key)
        line["reason"] = row.reason
        self._rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._tally.rejected[row.reason] += 1
        self._first_rejected.setdefault(row.reason, f"{source}: row {row.row}: {row.reason}")


def _far(bands: list[Seen], keys: npt.NDArray[np.uint64], candidates: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(R,) False where a band of the row was seen before, by whichever row; only candidates are looked at."""
    far = np.ones(len(keys), dtype=bool)
    chosen = np.flatnonzero(candidates)
    for band, seen in enumerate(bands):
        far[chosen] &= seen.add(keys[chosen, band])
    return far


def _item(item: np.int64) -> int | None:
    return None if item < 0 else int(item)


def _source_entry(source: Source) -> dict[str, Any]:
    files = [{"name": file.name, "columns": file.columns.as_dict()} for file in source.files]
    return {"source": source.spec, "fingerprint": source.fingerprint, "files": files}
