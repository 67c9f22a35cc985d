"""What a file is that does not hold rows as its name says: a Git LFS pointer, UTF-16, a web page, wrapped JSON, …

Only blank files are passed over. Every other one ends the command with what it is and how to make it readable.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import InputError
from anchor_cli.data.sources.file_bytes import format_of, opened

_HEAD_BYTES = 4096
_TEXT_FORMATS = ("jsonl", "json", "csv", "tsv")
_LFS = b"version https://git-lfs.github.com/spec/"
_SIGNATURES = {
    b"\x1f\x8b": ("a gzip file", "add .gz to its name"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "add .zst to its name"),
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"ARROW1": ("an Arrow file", "name it .arrow"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or export it as .csv"),
    b"BZh": ("a bzip2 file", "unpack it: bunzip2"),
    b"\xfd7zXZ": ("an xz file", "unpack it: unxz"),
    b"SQLite format 3": ("an SQLite database", "export the table as .csv"),
    b"\x00\x05\x16\x07": ("macOS's attributes of another file", "delete it; the data are in the file without ._"),
}
_PAGE = re.compile(rb"\s*<(!doctype|html|head|body|\?xml|error)\b", re.IGNORECASE)
_LIST_OF_ROWS = re.compile(rb'"([^"\\]+)"\s*:\s*\[\s*[{\[]')
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark is its beginning
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def require_its_format(path: Path) -> None:
    """Refuse a file whose first bytes are not of the format that its name says.

    Raises:
        InputError: what it is, and the remedy.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(_LFS):
        raise InputError(f"{path}: a Git LFS pointer, not the data", "fetch the data: git lfs pull")
    if format_of(path) not in _TEXT_FORMATS:
        return
    head = _head(path)
    for signature, (what, remedy) in _SIGNATURES.items():
        if head.startswith(signature):
            raise InputError(f"{path}: {what}, not {format_of(path)}", remedy)
    if encoding := _wide_encoding(head):
        remedy = f"write it as UTF-8: iconv -f {encoding} -t UTF-8 {path.name}"
        raise InputError(f"{path}: {encoding} text, expected UTF-8", remedy)
    if _PAGE.match(head):
        begins = head.split(b"\n")[0][:60].decode("utf-8", "replace")
        raise InputError(f"{path}: a web page or XML, not {format_of(path)}: {begins}", "fetch the file again")


def _head(path: Path) -> bytes:
    with opened(path) as file:
        return file.read(_HEAD_BYTES)


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by its byte order mark or by the zero bytes of the first character."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    order = "BE" if head[:1] == b"\0" else "LE"
    if len(head) >= 4 and head[:4].count(0) == 3:
        return f"UTF-32{order}"
    return f"UTF-16{order}" if len(head) >= 2 and head[:2].count(0) == 1 else None


def is_blank(path: Path) -> bool:
    """Whether a text file holds nothing but white space, or empty arrays."""
    if format_of(path) not in _TEXT_FORMATS:
        return False
    with opened(path) as file:
        return not any(block.strip(b"\xef\xbb\xbf \t\r\n[]") for block in iter(lambda: file.read(1 << 20), b""))


def misplaced_rows(path: Path, objects: Sequence[dict[str, Any]], *, columns_fit: bool) -> InputError | None:
    """Why a JSON file gives no rows although it holds some, given its first objects; None when nothing is wrong.

    `columns_fit`: the objects have the columns that are wanted.
    """
    kind, head = format_of(path), _head(path).removeprefix(b"\xef\xbb\xbf").lstrip() + b" "
    if kind not in ("json", "jsonl") or len(objects) > 1:
        return None
    is_array = head.startswith(b"[")
    if objects and not is_array:
        nested = [key for key, value in objects[0].items() if isinstance(value, dict | list)]
        rows = [key for key in nested if isinstance(objects[0][key], list) and _holds_rows(objects[0][key])]
        if rows and not columns_fit:
            return _wrapped(path, rows[0])
        if len(nested) == len(objects[0]) > 0:
            what = f"{path}: one JSON object whose keys hold columns, expected rows"
            return InputError(what, "write one object a row; in pandas: to_json(…, orient='records', lines=True)")
    if objects:
        return None
    if is_array and kind == "jsonl":
        return InputError(f"{path}: a JSON array in a .jsonl file", "name it .json, which may hold an array")
    if is_array:
        example = '{"query": "…", "document": "…"}'
        what = f"{path}: the items of its array are not objects, expected such as {example}"
        return InputError(what, f"jq -c '.[] | {{query: .[0], document: .[1]}}' {path.name} names the parts of lists")
    if head.startswith(b"{") and (match := _LIST_OF_ROWS.search(head)):
        return _wrapped(path, match[1].decode("utf-8", "replace"))
    if head.startswith(b"{"):
        remedy = f"write one object a line: jq -c . {path.name}"
        return InputError(f"{path}: no line is a JSON object; one goes over several lines", remedy)
    begins = head[:40].decode("utf-8", "replace").strip()
    remedy = 'expected one object a line, such as {"query": "…", "document": "…"}'
    return InputError(f"{path}: no line is a JSON object; it begins {begins!r}", remedy)


def _holds_rows(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], dict | list)


def _wrapped(path: Path, key: str) -> InputError:
    remedy = f"take the rows out: jq -c '.[\"{key}\"][]' {path.name} > rows.jsonl"
    return InputError(f"{path}: one JSON object whose {key!r} holds the rows, expected an array or lines", remedy)
