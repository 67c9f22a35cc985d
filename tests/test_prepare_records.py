"""Rows that bring their own instruction, `{instruction}; !@#$%^&*(){query}`: what they become, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_fixtures import needs_shared, small_tokenizer, tokenizer_folder

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import Options, prepare

__all__ = ["tokenizer_folder"]
SEPARATOR = "!@#$%^&*()"
PLAIN = [(f"Where does otter {index} live?", f"수달 {index} lives in the river.") for index in range(6)]
TASK = "Given a question; retrieve its answer"  # "; " inside


def written(path: Path, rows: list[tuple[str, str]], **more: list[Any]) -> str:
    columns = {"query": [query for query, _ in rows], "document": [document for _, document in rows], **more}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        lines = [",".join(f'"{value}"' for value in row) for row in [("query", "document"), *rows]]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def record(query: str, document: str, instruction: str | None) -> tuple[str, str]:
    return f"{instruction}; {SEPARATOR}{query}" if instruction else SEPARATOR + query, SEPARATOR + document


def ids_and_starts(pairs: PreparedPairs) -> list[Any]:
    queries, documents = pairs.tokens(range(len(pairs)))
    starts = [pairs.query_content_starts.tolist(), pairs.document_content_starts.tolist()]
    return [[ids.tolist() for ids in queries], [ids.tolist() for ids in documents], starts]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("instruction", [TASK, "지시문", "query", None])
def test_a_record_is_its_content_under_its_own_instruction(
    form: str, instruction: str | None, tmp_path: Path, tokenizer_folder: Path
) -> None:
    plain = written(tmp_path / "plain.jsonl", PLAIN)
    prepare([plain], tmp_path / "want", tokenizer=tokenizer_folder, training_instructions={"*": instruction or ""})
    source = written(tmp_path / f"records.{form}", [record(*row, instruction) for row in PLAIN])
    summary = prepare([source], tmp_path / "out", tokenizer=tokenizer_folder)  # under the run's Korean instruction
    got, want = PreparedPairs.open(tmp_path / "out"), PreparedPairs.open(tmp_path / "want")
    assert ids_and_starts(got) == ids_and_starts(want)
    head = f"{instruction}; " if instruction else ""
    text = f"<|im_start|>user\n{head}{PLAIN[0][0]}<|im_end|>"
    assert got.tokens([0])[0][0].tolist() == small_tokenizer().encode(text, add_special_tokens=False).ids
    assert (
        [got.texts(row)[:2] for row in range(len(got))]
        == PLAIN
        == list(zip(*map(got.strings, ("anchor", "positive")), strict=True))
    )
    counts = summary.as_dict()
    assert counts["instructions"] == {instruction or "": len(PLAIN)} and counts["forms"] == {"record": len(PLAIN)}
    again = prepare([str(tmp_path / "out")], tmp_path / "again", tokenizer=tokenizer_folder)
    assert again.fingerprint == summary.fingerprint  # prepared data are a source too


def test_the_switch_reads_the_separator_as_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = written(tmp_path / "records.jsonl", [record(*row, TASK) for row in PLAIN])
    options = Options(separator_as_text=True)
    summary = prepare([source], tmp_path / "out", tokenizer=tokenizer_folder, options=options)
    pairs = PreparedPairs.open(tmp_path / "out")
    assert pairs.texts(0)[:2] == record(*PLAIN[0], TASK)
    text = f"<|im_start|>user\n{INSTRUCTION_KO}; {record(*PLAIN[0], TASK)[0]}<|im_end|>"
    assert pairs.tokens([0])[0][0].tolist() == small_tokenizer().encode(text, add_special_tokens=False).ids
    assert summary.as_dict()["forms"] == {"plain": len(PLAIN)}


@pytest.mark.parametrize("text", [f"how to type {SEPARATOR} in vi", f"a{SEPARATOR}b; {SEPARATOR}c", f" {SEPARATOR}x"])
def test_a_separator_inside_a_text_stays_text(text: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [(text, "first document"), ("first query", text), (f"{TASK}; {SEPARATOR}{text}", SEPARATOR + f"b{text}")]
    prepare([written(tmp_path / "rows.jsonl", rows)], tmp_path / "out", tokenizer=tokenizer_folder)
    pairs = PreparedPairs.open(tmp_path / "out")
    assert [pairs.texts(row)[:2] for row in range(3)] == [*rows[:2], (text, f"b{text}")]


def test_mixed_files_and_instructions_are_told_with_counts(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [record(*PLAIN[0], TASK), record(*PLAIN[1], "지시문"), PLAIN[2], (PLAIN[3][0], SEPARATOR + PLAIN[3][1])]
    sources = [
        written(tmp_path / "mixed.jsonl", mixed),
        written(tmp_path / "all.jsonl", [record(*row, TASK) for row in PLAIN[4:]]),
    ]
    counts = prepare(sources, tmp_path / "out", tokenizer=tokenizer_folder).as_dict()
    assert counts["instructions"] == {TASK: 3, INSTRUCTION_KO: 2, "지시문": 1}
    assert counts["forms"] == {"plain": 1, "half": 1, "record": 4}
    lines = capsys.readouterr().err
    assert "5 rows are records with !@#$%^&*(): what stands before it is their instruction" in lines
    assert f"  3 rows: {TASK}\n" in lines
    assert f"{sources[0]}: mixed: 1 plain texts, 1 rows with {SEPARATOR} in query or document only, 2 records" in lines
    assert f"{sources[1]}: mixed" not in lines


def test_the_same_row_under_the_same_instruction_is_a_duplicate(tmp_path: Path, tokenizer_folder: Path) -> None:
    query, document = PLAIN[0]
    rows = [(query, document), record(query, document, INSTRUCTION_KO), record(query, document, TASK)]
    rows += [record(query, f" {document}", TASK), record(query, document, None)]
    summary = prepare([written(tmp_path / "rows.jsonl", rows)], tmp_path / "out", tokenizer=tokenizer_folder)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["row"], line["reason"]) for line in rejected] == [
        (1, "duplicate_pair"),
        (3, "same_query_same_document"),
    ]
    assert summary.as_dict()["instructions"] == {"": 1, TASK: 1, INSTRUCTION_KO: 1}


def test_faults_of_records_are_those_of_their_content(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [
        record("", "x", TASK),
        record("x", " \u200b", TASK),
        record("same", " same ", TASK),
        record("no room", "x", "long " * 300),
        record("a French row", "x", TASK),
    ]
    languages = ["en"] * 4 + ["fr"]  # which has no instruction in the contract, and needs none
    source = written(tmp_path / "rows.jsonl", rows, language=languages)
    options = {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}
    prepare([source], tmp_path / "out", tokenizer=tokenizer_folder, training_instructions=options)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in rejected] == ["empty", "whitespace", "query_is_document", "no_room"]


def test_negatives_of_records_lose_their_separator(tmp_path: Path, tokenizer_folder: Path) -> None:
    negatives = [
        [f"{SEPARATOR}an otter {index}", f"plain {index}", f"{SEPARATOR}{PLAIN[index][1]}"] for index in range(6)
    ]
    source = written(tmp_path / "rows.jsonl", [record(*row, TASK) for row in PLAIN], negatives=negatives)
    summary = prepare([source], tmp_path / "out", tokenizer=tokenizer_folder, options=Options(negatives=True))
    pairs = PreparedPairs.open(tmp_path / "out")
    assert pairs.cell(2, "negatives") == ["an otter 2", "plain 2"]
    assert summary.as_dict()["negatives"]["left_out"] == {"negative_is_positive": 6}


@pytest.mark.parametrize(
    ("instructions", "want"),
    [
        (None, "2 rows of language en have the Korean instruction; for their own pass --instruction 'en=Retrieve"),
        ({"*": INSTRUCTION_EN}, "3 rows of language ko have the English instruction; for their own pass --instr"),
        ({"fr": "지시문", "*": ""}, "1 rows of language fr have the Korean instruction; for their own pass --instr"),
        ({"ko": INSTRUCTION_KO, "*": INSTRUCTION_EN}, None),
        ({"*": ""}, None),
    ],
)
def test_a_language_under_the_instruction_of_another_is_told(
    instructions: dict[str, str] | None,
    want: str | None,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [(f"질문 {index}", f"문서 {index}") for index in range(3)] + PLAIN[:2] + [("Où est la loutre ?", "Ici.")]
    source = written(tmp_path / "rows.jsonl", rows, language=["ko"] * 3 + ["en"] * 2 + ["fr"])
    prepare([source], tmp_path / "out", tokenizer=tokenizer_folder, training_instructions=instructions)
    lines = capsys.readouterr().err
    assert want in lines if want else "instruction; for their own" not in lines


@needs_shared
def test_records_of_the_real_vocabulary_equal_plain_rows(shared_data: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    rows = [(row["anchor"], row["positive"]) for row in load_from_disk(str(shared_data / "pairs" / "train_ko_en"))][
        ::400
    ]
    prints = []
    for name, each in (("plain", rows), ("records", [record(*row, INSTRUCTION_KO) for row in rows])):
        prepare([written(tmp_path / f"{name}.jsonl", each)], tmp_path / name, tokenizer=shared_data / "tokenizer")
        prints.append(ids_and_starts(PreparedPairs.open(tmp_path / name)))
    assert prints[0] == prints[1]
