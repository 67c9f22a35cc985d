"""Every defect is rejected for the right reason at the right row; what is not defective stays."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import tokenizer_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_cli.base.errors import InputError
from anchor_cli.data.prepare.checks import REASONS, Seen, row_language, text_fault
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.data.prepare.summary import PrepareSummary
from anchor_cli.data.text import canonical

__all__ = ["tokenizer_folder"]


def rejected(out: Path) -> list[tuple[int, str, str | None]]:
    found = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["row"], line["reason"], line.get("side")) for line in found]


GOOD = b'{"query": "otters?", "document": "rivers"}'
# (line of the file, reason, side); None is a line that stays
DEFECTS: list[tuple[bytes, str | None, str | None]] = [
    (GOOD, None, None),
    (b'{"query": "", "document": "x"}', "empty", "query"),
    (b'{"query": "x", "document": ""}', "empty", "document"),
    (b'{"query": " \\t\\n\\u3000", "document": "x"}', "whitespace", "query"),
    (b'{"query": "x", "document": "\\u200b\\ufeff"}', "whitespace", "document"),
    (b'{"query": 7, "document": "x"}', "not_a_string", "query"),
    (b'{"query": "x", "document": {"text": "y"}}', "not_a_string", "document"),
    (b'{"query": "x", "document": [["y"]]}', "not_a_string", "document"),
    (b'{"query": "x"}', "missing", "document"),
    (b'{"query": null, "document": "x"}', "missing", "query"),
    (b'{"query": "\xff\xfe", "document": "x"}', "broken_utf8", None),
    (b'{"query": "x", "document": "\xed\xa0\x80"}', "lone_surrogate", None),
    (b'{"query": "x \\ud83d", "document": "x"}', "lone_surrogate", "query"),
    (b'{"query": "ok \\ud83d\\ude00", "document": "whole surrogate pair"}', None, None),
    (b'{"query": "x\\u0000", "document": "x"}', "nul", "query"),
    (b'{"query": "x", "document": "' + b"long " * 21 + b'"}', "over_long", "document"),
    (b'{"query": "same", "document": " same\\n"}', "query_is_document", None),
    (b"not json", "unreadable", None),
    (b"[1, 2]", "unreadable", None),
    (b"[" * 5000, "unreadable", None),
    (b"", None, None),  # no row, but a line
    (GOOD, "duplicate_pair", None),
    (b'{"query": "otters? ", "document": "rivers\\n"}', "same_query_same_document", None),
    (b'{"query": "otters?", "document": "another"}', None, None),
    (b'{"query": "seals?", "document": "rivers"}', None, None),
    (b'{"query": "\\u1112\\u1161\\u11ab", "document": "NFD"}', None, None),
    (b'{"query": "\\ud55c", "document": "NFD"}', "same_query_same_document", None),
    (b'{"query": "<|im_end|>", "document": "a !@#$%^&*()"}', None, None),
    (b'{"query": "find \\ud800; !@#$%^&*()x", "document": "!@#$%^&*()y"}', "lone_surrogate", "query"),
    (b'{"query": "find \\u0000; !@#$%^&*()x", "document": "!@#$%^&*()y"}', "nul", "query"),
]


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, PrepareSummary]:
    folder = tmp_path_factory.mktemp("defects")
    (folder / "pairs.jsonl").write_bytes(b"\n".join(line for line, _, _ in DEFECTS) + b"\n")
    summary = prepare(
        [str(folder / "pairs.jsonl")], folder / "out", tokenizer=tokenizer_folder, options=Options(max_characters=100)
    )
    return folder / "out", summary


def test_each_defect_has_its_reason_at_its_row(defects: tuple[Path, PrepareSummary]) -> None:
    out, summary = defects
    want = [(row, reason, side) for row, (_, reason, side) in enumerate(DEFECTS) if reason is not None]
    assert rejected(out) == want
    kept = sum(reason is None for _, reason, _ in DEFECTS) - 1  # but the empty line
    assert summary.tally.num_kept == kept
    told = summary.as_dict()
    assert told["rows"] == {"in": kept + len(want), "kept": kept, "rejected": len(want), "left_out": 0}
    assert sum(told["rejected"].values()) == len(want)
    assert set(told["rejected"]) <= set(REASONS)
    assert (out / "rejected.jsonl").read_text(encoding="utf-8").count('"source": "') == len(want)


def test_defects_in_csv(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = [
        b"query,document",
        b'"two\nlines",x',
        b"one,two,three",
        b"\xff,x",
        b"only one",
        b",x",
        b'"a ""quote""",y',
    ]
    (tmp_path / "pairs.csv").write_bytes(b"\n".join(lines))
    prepare([str(tmp_path / "pairs.csv")], tmp_path / "out", tokenizer=tokenizer_folder)
    want = [(1, "unreadable", None), (2, "broken_utf8", "query"), (3, "unreadable", None), (4, "empty", "query")]
    assert rejected(tmp_path / "out") == want


def test_defects_in_arrow_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    raw = pa.array([b"good", b"bad \xff", b"\xed\xa0\x80", None], pa.binary())
    query = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])  # not validated
    numbers = pa.array(["x", "y", "z", "w"])
    pq.write_table(pa.table({"query": query, "document": numbers}), tmp_path / "pairs.parquet")
    prepare([str(tmp_path / "pairs.parquet")], tmp_path / "out", tokenizer=tokenizer_folder)
    want = [(1, "broken_utf8", "query"), (2, "lone_surrogate", "query"), (3, "missing", "query")]
    assert rejected(tmp_path / "out") == want


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("form", "megabytes"),
    [
        ("jsonl", 100),
        ("json", 5),
        ("csv", 5),
        ("parquet", 5),
        *(pytest.param(form, 100, marks=SLOW) for form in ("json", "csv", "parquet")),
    ],
)
def test_a_row_of_100_mb_does_not_stop_it(form: str, megabytes: int, tmp_path: Path, tokenizer_folder: Path) -> None:
    path, long = tmp_path / f"pairs.{form}", "x" * (megabytes * 1_000_000)
    rows = [("before", "a"), ("long", long), ("after", "b")]
    if form == "jsonl":
        path.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in rows))
    elif form == "json":
        path.write_text(json.dumps([{"query": q, "document": d} for q, d in rows]))
    elif form == "csv":
        path.write_text("query,document\n" + "".join(f"{q},{d}\n" for q, d in rows))
    else:
        columns = zip(*rows, strict=True)
        pq.write_table(pa.table(dict(zip(("query", "document"), map(list, columns), strict=True))), path)
    summary = prepare([str(path)], tmp_path / "out", tokenizer=tokenizer_folder)
    assert [(row, reason) for row, reason, _ in rejected(tmp_path / "out")] == [(1, "over_long")]
    assert summary.tally.num_kept == 2


def test_an_instruction_without_room_is_an_error_at_once(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(GOOD)
    with pytest.raises(InputError, match="leave no room for content in 8 tokens"):
        prepare([str(tmp_path / "pairs.jsonl")], tmp_path / "out", tokenizer=tokenizer_folder, max_seq_length=8)
    assert not (tmp_path / "out").exists()


def test_no_row_left_is_an_error_that_says_why(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": 1, "document": "x"}\n' * 3)
    with pytest.raises(InputError, match="no row is left of 3: 3 not_a_string") as caught:
        prepare([str(tmp_path / "pairs.jsonl")], tmp_path / "out", tokenizer=tokenizer_folder)
    assert "row 0: not_a_string" in str(caught.value.hint)


def test_languages_and_their_instructions(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [
        {"query": "수달은 어디에 사나요?", "document": "rivers"},
        {"query": "Where do otters live?", "document": "강"},
        {"query": "123?", "document": "숫자만 있는 질문"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    two = {"ko": "질문", "en": "Retrieve"}
    summary = prepare([str(path)], tmp_path / "two", tokenizer=tokenizer_folder, training_instructions=two)
    assert summary.as_dict()["languages"] == {"ko": 2, "en": 1}
    with pytest.raises(InputError, match="instructions for ja, but no language column"):
        prepare([str(path)], tmp_path / "ja", tokenizer=tokenizer_folder, training_instructions={**two, "ja": "検索"})
    named = [{**row, "lang": language} for row, language in zip(rows, ("ko", "fr", ""), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))
    prepare([str(path)], tmp_path / "column", tokenizer=tokenizer_folder, training_instructions=two)
    assert rejected(tmp_path / "column") == [(1, "unknown_language", None)]
    everything = {"*": "Retrieve"}
    summary = prepare([str(path)], tmp_path / "all", tokenizer=tokenizer_folder, training_instructions=everything)
    assert summary.as_dict()["languages"] == {"ko": 2, "fr": 1}


def test_a_language_that_is_no_text_rejects_its_row(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = [
        b'{"query": "a", "document": "b", "lang": "en"}',
        b'{"query": "c", "document": "d", "lang": "\\ud800"}',
        b'{"query": "e", "document": "f", "lang": "ko"}',
    ]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "pairs.csv").write_bytes(b"query,document,lang\na,b,en\nc,d,e\xffn\ne,f,ko\n")
    raw = pa.array([b"en", b"\xff", b"ko"], pa.binary())
    broken = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    columns = {"query": ["a", "c", "e"], "document": ["b", "d", "f"], "lang": broken}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    for form in ("jsonl", "csv", "parquet"):
        summary = prepare([str(tmp_path / f"pairs.{form}")], tmp_path / form, tokenizer=tokenizer_folder)
        assert rejected(tmp_path / form) == [(1, "unknown_language", None)]
        assert summary.as_dict()["languages"] == {"en": 1, "ko": 1}


def test_near_duplicates_only_when_asked(tmp_path: Path, tokenizer_folder: Path) -> None:
    pytest.importorskip("datasketch")
    document = " ".join(f"the otter number {index} lives in the river" for index in range(60))
    rows = [
        ("Where does the otter of the long river valley live today?", document),
        ("Where does the otter of the long river valley live today", document + " Really."),  # nearly the same
        ("Is there anything that an otter would never want to eat?", document),  # another question
        ("Where does the otter of the long river valley live today?", "Seals live in the sea. " * 20),  # another
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": q, "document": d}) + "\n" for q, d in rows))
    prepare([str(path)], tmp_path / "plain", tokenizer=tokenizer_folder)
    assert rejected(tmp_path / "plain") == []
    prepare([str(path)], tmp_path / "near", tokenizer=tokenizer_folder, options=Options(near_duplicates=True))
    assert rejected(tmp_path / "near") == [(1, "near_duplicate", None)]


@pytest.mark.parametrize("value", ["a", "\u0301", "👨‍👩‍👧", "<|im_end|>", " x ", "１"])
def test_what_a_person_can_see_is_no_fault(value: str) -> None:
    assert text_fault(value, 100) is None


def test_escaped_bytes_are_told_from_surrogates() -> None:
    assert text_fault("\udcff", 9, escaped_bytes=True) == "broken_utf8"
    assert text_fault("\udcff", 9) == "lone_surrogate"
    assert text_fault("\ud800", 9, escaped_bytes=True) == "lone_surrogate"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_canonical_is_stable_and_ignores_form_and_space(text: str) -> None:
    assert canonical(canonical(text)) == canonical(text)
    assert canonical(f" \n{unicodedata.normalize('NFD', text)}\t") == canonical(text)


def test_language_of_a_row() -> None:
    assert row_language(" de ", "수달", "x") == "de"
    assert row_language(None, "수달은?", "English") == "ko"
    assert row_language("", "12?", "한국어 문서") == "ko"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=12), st.sampled_from([1, 1 << 22]))
def test_seen_is_a_set(chunks: list[list[int]], spill: int) -> None:
    seen, known = Seen(Path("/tmp"), spill), set()  # spill 1: every merged run lies in a file
    for chunk in chunks:
        want = []
        for key in chunk:
            want.append(key not in known)
            known.add(key)
        assert seen.add(np.array(chunk, dtype=np.uint64)).tolist() == want


def test_seen_takes_eight_bytes_a_key() -> None:
    seen = Seen()
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert seen.add(rng.integers(0, 2**63, 1000, dtype=np.uint64)).all()
    sizes: list[Any] = [len(run) for run in seen._runs]
    assert sum(sizes) == 300_000
    assert len(sizes) < 20  # logarithmic: a look-up stays cheap


def test_a_language_that_is_a_number_rejects_its_row(tmp_path: Path, tokenizer_folder: Path) -> None:
    """As `datasets` stores a ClassLabel: a number, whose name is not in the column."""
    rows = [{"query": f"q{index}", "document": "d", "language": index or None} for index in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    prepare([str(tmp_path / "pairs.parquet")], tmp_path / "out", tokenizer=tokenizer_folder)
    assert rejected(tmp_path / "out") == [(1, "unknown_language", None), (2, "unknown_language", None)]


def test_one_pair_in_two_languages_is_two_rows(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Each has its own instruction; under one instruction it is the same row."""
    rows = [{"query": "q", "document": "d", "language": language} for language in ("en", "ko", "en")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, of = [str(tmp_path / "pairs.jsonl")], {"ko": "찾아라", "en": "Find"}
    prepare(source, tmp_path / "two", tokenizer=tokenizer_folder, training_instructions=of)
    assert rejected(tmp_path / "two") == [(2, "duplicate_pair", None)]
    prepare(source, tmp_path / "one", tokenizer=tokenizer_folder, training_instructions={"*": "Find"})
    assert rejected(tmp_path / "one") == [(1, "duplicate_pair", None), (2, "duplicate_pair", None)]


def test_lists_of_bytes_with_a_missing_one(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Arrow does not look at the bytes of a string; a null list beside a broken one is no error of the program."""
    broken = pa.array([[b"d0"], None, [b"\xff\xfe"], [b"d3", b"d4"]], pa.list_(pa.binary())).view(pa.list_(pa.string()))
    table = pa.table({"query": ["q0", "q1", "q2", "q3"], "documents": broken})
    pq.write_table(table, tmp_path / "pairs.parquet")
    options = Options(document_column="documents", query_column="query")
    summary = prepare([str(tmp_path / "pairs.parquet")], tmp_path / "out", tokenizer=tokenizer_folder, options=options)
    assert rejected(tmp_path / "out") == [(1, "missing", "document"), (2, "broken_utf8", "document")]
    assert summary.tally.num_kept == 3


@pytest.mark.parametrize("score", ["1" + "0" * 400, "1e300", "NaN", "-Infinity"])
def test_a_score_that_float32_does_not_hold_rejects_its_row(score: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    good = '{"query": "q", "document": "d", "negatives": ["n"], "scores": [1, 3.4e38]}'
    (tmp_path / "pairs.jsonl").write_text(good + "\n" + good.replace('"q"', '"other"').replace("3.4e38", score))
    options = Options(negatives=True)
    prepare([str(tmp_path / "pairs.jsonl")], tmp_path / "out", tokenizer=tokenizer_folder, options=options)
    assert rejected(tmp_path / "out") == [(1, "scores_unlike", None)]
