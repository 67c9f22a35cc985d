"""Files as bytes: which kind a name means, and reading it decompressed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from anchor_cli.base.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
_BLOCK_BYTES = 1 << 20
LONGEST_LINE = 64 << 20  # bytes held at once while looking for something


def format_of(path: str | Path) -> str | None:
    """`jsonl`, `json`, `csv`, `tsv`, `parquet`, `arrow`, or None for another suffix."""
    name = Path(path)
    if name.suffix.lower() in COMPRESSED:
        name = name.with_suffix("")
    return FORMATS.get(name.suffix.lower())


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed.

    Raises:
        InputError: the compressed stream is damaged or cut off; also while reading inside the `with`.
    """
    codec = COMPRESSED.get(path.suffix.lower())
    try:
        if codec is None:
            with open(path, "rb") as file:
                yield file
        else:  # pyarrow's, because zstandard's reader takes a cut-off stream for a whole one
            with pa.OSFile(str(path)) as raw, pa.CompressedInputStream(raw, codec) as stream:
                yield io.BufferedReader(stream, _BLOCK_BYTES)
    except (OSError, pa.ArrowException) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path}: cannot be read: {reason}", "is the file whole?") from None
