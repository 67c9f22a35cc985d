"""Files of pairs, read piece by piece: JSONL, JSON, CSV, TSV, Parquet, Arrow, each plain, .gz or .zst.

A `Part` is some megabyte of consecutive rows, still raw where that is cheap to pass on: workers parse. Rows count from
0 in each file; in JSONL a row is its line, counted from 0. Memory: one part; a JSONL line beyond `Limits.line_bytes` is
passed over without being held.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa

from anchor_cli.base.errors import InputError
from anchor_cli.data.sources.csv_rows import csv_rows
from anchor_cli.data.sources.file_bytes import LONGEST_LINE, format_of, opened
from anchor_cli.data.sources.tables import open_table, without_dictionary

_BLOCK_BYTES = 1 << 20
_PART_ROWS = 1024
_PART_CHARACTERS = 1 << 20
_JSON_BUFFER = 1 << 28  # characters of one element of a JSON array; beyond them the file is damaged


@dataclass(frozen=True)
class Limits:
    """How much one row may hold."""

    characters: int = 1_000_000
    """Of a query or a document."""

    @property
    def line_bytes(self) -> int:
        """Of a JSONL line: both texts with every character as two \\uXXXX escapes, and not less than 64 MiB."""
        return max(24 * self.characters, 64 << 20)

    @property
    def quoted_characters(self) -> int:
        """Of a CSV row that goes over several lines: beyond that a quote was never closed."""
        return 4 * max(self.characters, 1_000_000)


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    query: str
    document: str
    language: str | None = None
    negatives: tuple[str, ...] = ()
    """Hard negatives: a column of lists, or one column for each place. Read for Stage II only."""
    scores: tuple[str, ...] = ()
    """Scores of positive and negatives, such as a teacher's: whole entries of `pairs.SCORE_COLUMNS`."""

    @property
    def names(self) -> list[str]:
        names = (self.query, self.document, self.language, *self.extra)
        return list(dict.fromkeys(name for name in names if name is not None))

    @property
    def extra(self) -> tuple[str, ...]:
        """What a row has beyond (query, document, language)."""
        return (*self.negatives, *self.scores)

    def of(self, row: Any) -> RawPair:
        """(query, document, language, extra …) of an object; faults for anything else."""
        if not isinstance(row, dict):
            return (Fault("unreadable"),) * 3
        language = row.get(self.language) if self.language else None
        return row.get(self.query), row.get(self.document), language, *(row.get(name) for name in self.extra)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {key: value for key, value in vars(self).items() if value != ()}


@dataclass(frozen=True)
class Fault:
    """Stands for a value, or a whole row, that cannot even be passed on."""

    reason: str


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a file."""

    kind: Literal["lines", "table", "rows"]
    """`lines`: bytes of JSONL. `table`: bytes of an Arrow stream. `rows`: a list of (query, document, language)."""
    data: Any
    first_row: int
    num_rows: int


RawPair = tuple[Any, ...]
"""(query, document, language, and `Columns.extra`) as the file has them, or `Fault`s."""


def column_names(path: Path) -> list[str]:
    """Names of a file's columns: its schema, its header, or the keys of its first objects."""
    kind = format_of(path)
    if kind in ("parquet", "arrow"):
        with open_table(path) as (schema, _):
            return list(schema.names)
    if kind in ("csv", "tsv"):
        with opened(path) as file:
            return next(csv_rows(file, path, Limits().quoted_characters), [])
    return list(dict.fromkeys(name for row in first_objects(path) for name in row))


def read_parts(path: Path, columns: Columns, limits: Limits) -> Iterator[Part]:
    """All rows of a file, in order."""
    kind = format_of(path)
    if kind == "json" and not _is_json_array(path):
        kind = "jsonl"
    if kind == "jsonl":
        with opened(path) as file:
            yield from _line_parts(file, limits)
    elif kind == "json":
        with opened(path) as file:
            yield from row_parts(map(columns.of, _array_items(file, path)), limits)
    elif kind in ("csv", "tsv"):
        with opened(path) as file:
            yield from row_parts(_csv_pairs(csv_rows(file, path, limits.quoted_characters), columns), limits)
    else:
        with open_table(path, columns.names) as (_, batches):
            yield from table_parts(batches, columns)


def row_parts(rows: Iterable[RawPair], limits: Limits) -> Iterator[Part]:
    """Rows in lists of about a megabyte; a value beyond the limit is dropped here already."""
    first, held, characters = 0, [], 0
    for row in rows:
        bounded = tuple(_bounded(value, limits) for value in row)
        held.append(bounded)
        characters += sum(len(value) for value in bounded if isinstance(value, str))
        if len(held) == _PART_ROWS or characters >= _PART_CHARACTERS:
            yield Part("rows", held, first, len(held))
            first, held, characters = first + len(held), [], 0
    if held:
        yield Part("rows", held, first, len(held))


def table_parts(batches: Iterable[pa.RecordBatch], columns: Columns) -> Iterator[Part]:
    """Record batches cut into streams of at most 1,024 rows and about a megabyte, each with its own texts only."""
    first = 0
    for batch in batches:
        batch = batch.select(columns.names)
        for begin in range(0, batch.num_rows, _PART_ROWS):
            rows = batch.slice(begin, _PART_ROWS)
            texts = [without_dictionary(column) for column in rows.columns]
            rows = pa.RecordBatch.from_arrays(texts, names=rows.schema.names)
            step = max(_PART_CHARACTERS * rows.num_rows // max(rows.nbytes, 1), 1)
            for at in range(0, rows.num_rows, step):
                piece = rows.slice(at, step)
                sink = io.BytesIO()
                with pa.ipc.new_stream(sink, piece.schema) as stream:
                    stream.write_batch(piece)
                yield Part("table", sink.getvalue(), first, piece.num_rows)
                first += piece.num_rows


def _bounded(value: Any, limits: Limits) -> Any:
    if isinstance(value, str) and len(value) > limits.characters:
        return Fault("over_long")
    if isinstance(value, list):
        return [_bounded(item, limits) for item in value]
    return value


def _line_parts(file: IO[bytes], limits: Limits) -> Iterator[Part]:
    row, held, too_long = 0, bytearray(), False
    block = file.read(_BLOCK_BYTES).removeprefix(b"\xef\xbb\xbf")
    while block:
        end = block.rfind(b"\n") + 1
        if too_long and end:
            yield Part("rows", [(Fault("over_long"),) * 3], row, 1)
            row, too_long = row + 1, False
            block = block[block.index(b"\n") + 1 :]
            end = block.rfind(b"\n") + 1
        if end:
            held += block[:end]
            num_lines = held.count(b"\n")
            yield Part("lines", bytes(held), row, num_lines)
            row, held = row + num_lines, bytearray(block[end:])
        elif not too_long:
            held += block
            if len(held) > limits.line_bytes:
                too_long, held = True, bytearray()
        block = file.read(_BLOCK_BYTES)
    if too_long:
        yield Part("rows", [(Fault("over_long"),) * 3], row, 1)
    elif held:
        yield Part("lines", bytes(held), row, 1)


def _csv_pairs(rows: Iterator[list[str]], columns: Columns) -> Iterator[RawPair]:
    header = next(rows, [])
    at = [header.index(name) for name in columns.names]
    for row in rows:
        if len(row) != len(header):
            yield (Fault("unreadable"),) * 3
        else:
            yield columns.of(dict(zip(columns.names, (row[index] for index in at), strict=True)))


def _is_json_array(path: Path) -> bool:
    if format_of(path) != "json":
        return False
    with opened(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"[")


def _array_items(file: IO[bytes], path: Path) -> Iterator[Any]:
    """Elements of the file's JSON arrays, one after the other; bytes that are not UTF-8 are escaped.

    Several arrays, as `cat a.json b.json` makes them, are read like one.

    Raises:
        InputError: an array is not closed, or something that is no array follows one.
    """
    decoder = json.JSONDecoder()
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
    buffer, at, want, number, inside = "", 0, _BLOCK_BYTES, 0, False
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,\ufeff":
            at += 1
        try:
            if at == len(buffer):
                raise ValueError("the array is not closed")
            if buffer[at] == ("]" if inside else "["):
                at, inside = at + 1, not inside
                continue
            if not inside:
                what = f"{path}: {buffer[at : at + 20]!r} after the end of the array, which has {number:,} items"
                raise InputError(what, "expected another array or the end of the file; is the file whole?")
            item, end = decoder.raw_decode(buffer, at)
            if end == len(buffer) and not isinstance(item, dict | list | str):
                raise ValueError("a number may go on in the next block")
        except (ValueError, RecursionError) as error:
            more = text.read(want) if len(buffer) - at < _JSON_BUFFER else ""
            if not more:
                if at == len(buffer) and not inside:
                    return
                raise InputError(f"{path}: item {number} is not JSON: {error}", "is the file whole?") from None
            buffer, at, want = buffer[at:] + more, 0, 2 * want  # doubling: a long element is not read again and again
            continue
        yield item
        number, at = number + 1, end
        if at > _BLOCK_BYTES:
            buffer, at, want = buffer[at:], 0, _BLOCK_BYTES


def first_objects(path: Path, most: int = 100) -> list[dict[str, Any]]:
    """The first JSON objects of an array, or of the first 1,000 lines."""
    with opened(path) as file:
        items: Iterable[Any] = _array_items(file, path) if _is_json_array(path) else islice(_lines(file), 1000)
        return list(islice((item for item in items if isinstance(item, dict)), most))


def _lines(file: IO[bytes]) -> Iterator[Any]:
    """What each line holds as JSON; None for a line that does not."""
    while line := file.readline(LONGEST_LINE):
        try:
            yield json.loads(line.decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError):
            yield None
