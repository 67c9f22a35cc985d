"""The raw rows of a part: lines, Arrow streams and lists of values become Python's; what is no text becomes a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from anchor_cli.data.sources.files import Columns, Fault, Part, RawPair


def rows_of_part(part: Part, columns: Columns) -> Iterator[tuple[int, RawPair]]:
    """(row number, values) of consecutive rows of a file."""
    if part.kind == "rows":
        yield from enumerate(part.data, part.first_row)
    elif part.kind == "lines":
        for row, line in enumerate(part.data.split(b"\n"), part.first_row):
            if line.strip():
                yield row, _json_row(line, columns)
    else:
        table = pa.ipc.open_stream(part.data).read_all()
        values = {name: _values(table.column(name)) for name in columns.names}
        nothing = [None] * table.num_rows
        languages = values[columns.language] if columns.language else nothing
        texts = values[columns.query], values[columns.document]
        extra = [values[name] for name in columns.extra]
        yield from enumerate(zip(*texts, languages, *extra, strict=True), part.first_row)


def _json_row(line: bytes, columns: Columns) -> RawPair:
    text = _decoded(line)
    if isinstance(text, Fault):
        return text, text, text
    try:
        return columns.of(json.loads(text))
    except (ValueError, RecursionError):
        return (Fault("unreadable"),) * 3


def _decoded(data: bytes) -> str | Fault:
    try:
        return data.decode()
    except UnicodeDecodeError:
        try:
            data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return Fault("broken_utf8")
        return Fault("lone_surrogate")


def _values(column: pa.ChunkedArray) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not look at the bytes of a string column when it reads a file
        chunk = column.combine_chunks()
        if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
            return [None if row.values is None else _values(pa.chunked_array([row.values])) for row in chunk]
        binary = pa.large_binary() if pa.types.is_large_string(chunk.type) else pa.binary()
        values = chunk.cast(binary).to_pylist()
    return [_decoded(value) if isinstance(value, bytes) else value for value in values]
