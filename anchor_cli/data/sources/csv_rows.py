"""Rows of CSV and TSV files. A quote that is never closed is an error: the rows it swallows would just be missing."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from anchor_cli.base.errors import InputError
from anchor_cli.data.sources.file_bytes import LONGEST_LINE, format_of, opened

_SAMPLE_BYTES = 4 << 20  # a text of a million characters fits


def csv_rows(file: IO[bytes], path: Path, most_quoted: int) -> Iterator[list[str]]:
    """The fields of every row that is not empty; bytes that are not UTF-8 are escaped.

    `most_quoted`: characters of a row that goes over several lines; beyond them a quote was never closed.

    Raises:
        InputError: a quote is not closed, or not doubled inside a field.
    """
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first, held, number = 1, 0, 0  # the row's first line, its characters so far; the line that is read

    def lines() -> Iterator[str]:
        nonlocal held, number
        for number, line in enumerate(text, 1):
            held += len(line)
            if number > first and held > most_quoted:
                long = f"{path}:{first}: a quote opened in this row is not closed in {held:,} characters"
                raise InputError(long, "close it, or double it inside a field; --max-characters allows longer texts")
            yield line

    try:
        for row in csv.reader(lines(), **_csv_form(path)):
            first, held = number + 1, 0
            if row:
                yield row
    except csv.Error as error:
        where = f"{path}:{first}: the row that begins here is not {(format_of(path) or '').upper()}"
        remedy = "a quote is missing or too many; inside a quoted field it is doubled"
        raise InputError(f"{where}, found at line {number}: {error}", remedy) from None


def _csv_form(path: Path) -> dict[str, Any]:
    """How `csv.reader` is to read the file. In TSV quotes are mostly letters like others, so only evidence counts."""
    if format_of(path) == "csv":
        return {"delimiter": ",", "strict": True}
    return {"delimiter": "\t", "strict": True} if _is_quoted(path) else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


def _is_quoted(path: Path) -> bool:
    """Whether a TSV has quoted fields: 4 MiB from the first field that begins with a quote read as strict CSV.

    That is, quotes are closed and doubled inside, and the row of that field has as many fields as the header.
    """
    with opened(path) as file:
        header = line = file.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf")
        while line and not line.startswith(b'"') and b'\t"' not in line:
            line = file.readline(LONGEST_LINE)
        if not line:
            return False
        sample = [line, *file.readlines(_SAMPLE_BYTES)]
        whole = not file.read(1)
    text = [each.decode("utf-8", "surrogateescape") for each in (sample if line is header else [header, *sample])]
    widths: list[int] = []
    try:
        for row in csv.reader(text, delimiter="\t", strict=True):
            widths.append(len(row))
    except csv.Error as error:
        if whole or "unexpected end" not in str(error):  # the sample may end within a field
            return False
    return line is header or widths[1:2] == widths[:1]
