"""No file with data is passed over: it is read, or it ends the command with what it is and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from data_fixtures import tokenizer_folder

from anchor_cli.base.errors import InputError
from anchor_cli.data.prepare.prepare import prepare
from anchor_cli.data.sources import files as source_files
from anchor_cli.data.sources.files import Columns, Limits, read_parts

__all__ = ["tokenizer_folder"]
ROWS = [{"query": f"question {index}?", "document": f"수달 {index}"} for index in range(12)]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 330454481\n"
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = "query,document\n" + "".join(f"{row['query']},{row['document']}\n" for row in ROWS)
COLUMNS = {
    name: {str(at): row[name] for at, row in enumerate(ROWS)} for name in ("query", "document")
}  # pandas to_json
SQUAD = {"version": "v2.0", "data": ROWS}

# (name, bytes, part of the message, part of the hint)
MISTAKEN: list[tuple[str, bytes, str, str]] = [
    ("b.jsonl", LINES.encode("utf-16"), "UTF-16 text", "iconv -f UTF-16 -t UTF-8 b.jsonl"),
    ("b.jsonl", LINES.encode("utf-16-be"), "UTF-16BE text", "iconv -f UTF-16BE"),
    ("b.csv", CSV.encode("utf-16-le"), "UTF-16LE text", "iconv -f UTF-16LE"),
    ("b.tsv", CSV.replace(",", "\t").encode("utf-32"), "UTF-32 text", "iconv -f UTF-32"),
    ("b.json.gz", gzip.compress(json.dumps(ROWS).encode("utf-16"), mtime=0), "UTF-16 text", "iconv"),
    ("b.parquet", LFS, "Git LFS pointer", "git lfs pull"),
    ("b.csv", LFS, "Git LFS pointer", "git lfs pull"),
    ("b.jsonl.gz", LFS, "Git LFS pointer", "git lfs pull"),
    ("b.json", b"\n <!DOCTYPE html>\n<html></html>", "a web page or XML", "fetch the file again"),
    ("b.csv", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page or XML", "again"),
    ("b.jsonl", gzip.compress(LINES.encode(), mtime=0), "a gzip file, not jsonl", "add .gz to its name"),
    ("b.csv", b"PK\x03\x04" + b"\x14" * 60, "a zip archive or a spreadsheet", "export it as .csv"),
    ("b.json", json.dumps(SQUAD, indent=1).encode(), "whose 'data' holds the rows", "jq -c '.[\"data\"][]'"),
    ("b.json", json.dumps(SQUAD).encode(), "one JSON object whose 'data' holds the rows", "jq -c '.[\"data\"][]'"),
    ("b.jsonl", json.dumps({"train": ROWS}).encode(), "whose 'train' holds the rows", "jq"),
    ("b.json", json.dumps(COLUMNS).encode(), "whose keys hold columns", "orient='records'"),
    ("b.jsonl", json.dumps(ROWS[0], indent=2).encode(), "one goes over several lines", "jq -c . b.jsonl"),
    ("b.jsonl", json.dumps(ROWS).encode(), "a JSON array in a .jsonl file", "name it .json"),
    ("b.json", b'["query", "document"]\n["query 2", "document 2"]\n', "are not objects", "jq"),
    ("b.jsonl", b"question 1?\tanswer\nquestion 2?\tanswer\n", "it begins 'question 1?", "one object a line"),
    ("b.jsonl.bz2", b"BZh9", ".bz2 is not read", "unpack it"),
    ("b.csv.zip", b"PK\x03\x04", ".zip is not read", "unpack it"),
]  # fmt: skip


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("name", "content", "message", "hint"), MISTAKEN)
def test_a_file_that_is_not_what_its_name_says_ends_the_command(
    name: str, content: bytes, message: str, hint: str, alone: bool, tmp_path: Path, tokenizer_folder: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(content)
    if alone and "is not read" in message:
        message, hint = "unknown kind of file", "expected .jsonl"
    if not alone:
        (folder / "a.jsonl").write_text(LINES)
    with pytest.raises(InputError) as caught:
        prepare([str(folder / name) if alone else str(folder)], tmp_path / "out", tokenizer=tokenizer_folder)
    assert caught.value.message.startswith(f"{folder / name}: ") and message in caught.value.message
    assert caught.value.hint is not None and hint in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.jsonl", b""),
        ("b.jsonl", b"\xef\xbb\xbf\n \n"),
        ("b.json", b"[]\n"),
        ("b.csv.gz", gzip.compress(b"\n\n", mtime=0)),
        ("._b.jsonl", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"),
        (".hidden.csv", b"a,b\n"),
        (".DS_Store", b"\x00\x00\x00\x01Bud1"),
        ("README.md", b"# pairs\n"),
    ],
)
def test_blank_hidden_and_other_files_of_a_folder_are_named_and_passed_over(
    name: str, content: bytes, tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINES)
    (folder / name).write_bytes(content)
    assert prepare([str(folder)], tmp_path / "out", tokenizer=tokenizer_folder).tally.num_kept == len(ROWS)
    lines = capsys.readouterr().err
    assert f"{folder / name}: empty, passed over" in lines or f"{folder}: not read: {name}" in lines


def test_a_folder_whose_data_lie_one_level_below_names_it(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").touch()
    (tmp_path / "clone" / "data" / "a.jsonl").write_text(LINES)
    with pytest.raises(InputError) as caught:
        prepare([str(tmp_path / "clone")], tmp_path / "out", tokenizer=tokenizer_folder)
    assert caught.value.hint == "name a folder in it: data"


def items(path: Path) -> list[str]:
    return [row[0] for part in read_parts(path, Columns("query", "document"), Limits()) for row in part.data]


@pytest.mark.parametrize("between", ["", "\n", " \n\n\t", ",", "\ufeff"])
@pytest.mark.parametrize("block", [1, 37, 1 << 20])
def test_arrays_one_after_the_other_are_read_like_one(
    between: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_files, "_BLOCK_BYTES", block)
    pieces = [ROWS[:5], ROWS[5:6], [], ROWS[6:]]
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(between.join(json.dumps(piece) for piece in pieces).encode()))
    assert items(path) == [row["query"] for row in ROWS]


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        ('{"query": "x", "document": "y"}\n', r"'{\"query\".* after the end of the array, which has 12 items"),
        ("<html>502</html>", "'<html>502</html>' after the end of the array"),
        ("]", r"'\]' after the end of the array"),
        ("\0", "after the end of the array"),
        ('[{"query": "x", ', "item 12 is not JSON"),
        ("[", "item 12 is not JSON: the array is not closed"),
    ],
)
def test_what_follows_an_array_and_is_none_is_an_error(tail: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS) + "\n" + tail)
    with pytest.raises(InputError, match=match):
        items(tmp_path / "rows.json")
