"""One pass over the bytes of a source's files: their SHA-256, and about how many rows they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from anchor_cli.base.console import progress
from anchor_cli.base.errors import InputError
from anchor_cli.data.sources.file_bytes import opened

_LINES = (".jsonl", ".ndjson", ".csv", ".tsv")


def digest_and_rows(paths: list[Path]) -> tuple[str, int | None]:
    """(SHA-256 over the files' bytes, rows or None), in one pass over the bytes."""
    digest = hashlib.sha256()
    counts: list[int | None] = []
    with progress("fingerprint of the source", sum(path.stat().st_size for path in paths) / 1e6, "MB") as bar:
        for path in paths:
            lines = 0
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    lines += block.count(b"\n")
                    bar.advance(len(block) / 1e6)
            counts.append(lines if path.suffix.lower() in _LINES else _rows_of(path))
    known = [num for num in counts if num is not None]
    return digest.hexdigest(), sum(known) if len(known) == len(counts) else None


def _rows_of(path: Path) -> int | None:
    """Rows of a table or of a compressed text; None where only reading would tell."""
    if path.with_suffix("").suffix.lower() in _LINES:
        with opened(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    if path.suffix.lower() == ".parquet":
        return int(pq.ParquetFile(path).metadata.num_rows)
    if path.suffix.lower() == ".arrow":
        return _rows_of_arrow(path)
    return None


def _rows_of_arrow(path: Path) -> int | None:
    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                return None
            file.seek(0)
            return int(sum(batch.num_rows for batch in pa.ipc.open_stream(file)))
    except (OSError, pa.ArrowException) as error:
        remedy = "it was cut off when written or copied: copy it again, or save it anew"
        raise InputError(f"{path}: cannot be read to its end: {str(error) or type(error).__name__}", remedy) from None
