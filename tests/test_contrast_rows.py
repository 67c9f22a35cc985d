"""Rows of Stage II: what prepare keeps of negatives and scores, and what a step reads of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_fixtures import small_tokenizer, tokenizer_folder
from test_prepare import same_folders

from anchor_cli.base.errors import InputError
from anchor_cli.data.contrast_rows import ContrastData
from anchor_cli.data.pairs import PreparedPairs, text_key
from anchor_cli.data.prepare.prepare import Options, prepare

__all__ = ["tokenizer_folder"]
ROWS: list[dict[str, Any]] = [
    {"anchor": "where do otters live", "positive": "in rivers", "negatives": ["in trees", "in books", "on the moon"]},
    {"anchor": "where do birds live", "positive": "in trees", "negatives": []},
    {"anchor": "where  do otters live", "positive": "in the sea", "negatives": ["in  trees", "in rivers"]},
    {
        "anchor": "what is a book",
        "positive": "bound paper",
        "negatives": ["", "  ", "bound  paper", "in books", "in books"],
    },
]
CLEAN = [["in trees", "in books", "on the moon"], [], ["in  trees", "in rivers"], ["in books"]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return str(path)


def prepared(folder: Path, rows: list[dict[str, Any]], tokenizer: Path, **options: Any) -> PreparedPairs:
    source = write(folder / "rows.jsonl", rows)
    negatives = Options(negatives=True, **options)
    prepare([source], folder / "out", tokenizer=tokenizer, max_seq_length=64, options=negatives)
    return PreparedPairs.open(folder / "out")


def test_negatives_are_checked_counted_and_tokenised_as_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    pairs = prepared(tmp_path, ROWS, tokenizer_folder)
    data = ContrastData(pairs)
    assert data.counts.tolist() == [3, 0, 2, 1]
    assert [data.negative_texts(row) for row in range(4)] == CLEAN
    counts = pairs.manifest["counts"]["negatives"]
    assert counts["left_out"] == {"empty": 1, "whitespace": 1, "negative_is_positive": 1, "negative_repeated": 1}
    assert counts["kept"] == 6 and counts["rows_with"] == {"0": 1, "1": 1, "2": 1, "3": 1}
    step = data.step(np.arange(4))
    tokenizer = small_tokenizer()
    for place, (row, part) in enumerate(step.places):
        if part >= 2:
            text = CLEAN[row][part - 2]
            whole = tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>", add_special_tokens=False)
            assert step.ids[place].tolist() == whole.ids
    import datasets

    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert loaded["negatives"][:] == CLEAN
    assert loaded["document_key"][0] == text_key("in rivers")


def test_a_step_names_every_text_once_and_every_known_positive(tmp_path: Path, tokenizer_folder: Path) -> None:
    data = ContrastData(prepared(tmp_path, ROWS, tokenizer_folder))
    order = np.array([2, 1, 0, 3])
    step = data.step(order)
    texts = [tuple(ids) for ids in step.ids]
    assert len(set(texts)) == len(texts)
    # rows 2 and 0 ask the same question up to white space: each knows the other's positive
    documents = ["in the sea", "in  trees", "in rivers", "in trees", "in rivers", *CLEAN[0], "bound paper", "in books"]
    assert step.first.tolist() == [0, 3, 4, 8, 10]
    want = set()
    for i, row in enumerate(order.tolist()):
        known = {text_key(r["positive"]) for r in ROWS if text_key(r["anchor"]) == text_key(ROWS[row]["anchor"])}
        want |= {(i, c) for c, text in enumerate(documents) if text_key(text) in known}
    assert {(int(i), int(c)) for i, c in step.known_positives.T} == want
    assert {(0, 2), (0, 4), (2, 0), (1, 1)} < want
    # "in rivers" comes three times with the same token ids, and is one text
    assert step.documents[2] == step.documents[4]
    assert len(step.ids) == 4 + len({"in the sea", "in  trees", "in rivers", "in trees", *CLEAN[0], "bound paper"})
    lengths, offsets = data.text_lengths(order)
    for i, row in enumerate(order.tolist()):
        own = [
            len(step.ids[step.queries[i]]),
            *(len(step.ids[c]) for c in step.documents[step.first[i] : step.first[i + 1]]),
        ]
        assert lengths[offsets[i] : offsets[i + 1]].tolist() == own
        assert data.row_lengths[row] == sum(own)
    assert data.longest_text == max(map(len, step.ids))


def test_fewer_negatives_when_asked(tmp_path: Path, tokenizer_folder: Path) -> None:
    pairs = prepared(tmp_path, ROWS, tokenizer_folder)
    two = ContrastData(pairs, num_hard_negatives=2)
    assert two.counts.tolist() == [2, 0, 2, 1]
    assert two.negative_texts(0) == CLEAN[0][:2]
    assert two.step(np.array([0])).first.tolist() == [0, 3]
    assert ContrastData(pairs, num_hard_negatives=0).step(np.arange(4)).first.tolist() == [0, 1, 2, 3, 4]


def test_columns_by_number_and_scores(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [
        {
            "anchor": "a question",
            "positive": "an answer",
            "negative_2": "no",
            "negative_10": "never",
            "scores": [9, 2, 1],
        },
        {
            "anchor": "b question",
            "positive": "b answer",
            "negative_2": "",
            "negative_10": "never",
            "scores": [8.5, 7, 0.5],
        },
        {"anchor": "c question", "positive": "c answer", "negative_2": "no", "negative_10": None, "scores": [1, 0]},
        {"anchor": "d question", "positive": "d answer", "negative_2": "no", "negative_10": None, "scores": [1, 0, 0]},
        {"anchor": "e question", "positive": "e answer", "negative_2": "no", "negative_10": None, "scores": None},
    ]
    pairs = prepared(tmp_path, rows, tokenizer_folder)
    assert pairs.manifest["counts"]["rejected"] == {"scores_unlike": 2}
    data = ContrastData(pairs)
    assert data.scores_from == ("scores",) and data.counts.tolist() == [2, 1, 1]
    assert [data.negative_texts(row) for row in range(3)] == [["no", "never"], ["never"], ["no"]]
    step = data.step(np.arange(3))
    assert step.scores is not None and step.scores.tolist() == [9, 2, 1, 8.5, 0.5, 1, 0]


def test_mined_scores_and_a_leaked_negative(tmp_path: Path, tokenizer_folder: Path) -> None:
    benchmark = tmp_path / "bench"
    (benchmark / "qrels").mkdir(parents=True)
    write(benchmark / "corpus.jsonl", [{"_id": "1", "title": "", "text": "in books"}])
    write(benchmark / "queries.jsonl", [{"_id": "q", "text": "where are words"}])
    (benchmark / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t1\t1\n")
    rows = [{**ROWS[0], "positive_score": 0.9, "negative_scores": [0.5, 0.4, 0.3]}]
    pairs = prepared(tmp_path, rows, tokenizer_folder, exclude=(str(benchmark),))
    data = ContrastData(pairs)
    assert data.negative_texts(0) == ["in trees", "on the moon"]
    assert pairs.manifest["counts"]["negatives"]["left_out"] == {"leak_document": 1}
    scores = data.step(np.array([0])).scores
    assert scores is not None and scores.tolist() == pytest.approx([0.9, 0.5, 0.3])


def test_a_cross_encoders_scores_teach_and_the_mined_ones_are_kept(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Both stand in the folder under their names; Stage II learns from the cross-encoder, or from `scores`."""
    mined = {"positive_score": 0.9, "negative_scores": [0.5, 0.4, 0.3]}
    cross = {"cross_encoder_positive_score": 7.0, "cross_encoder_negative_scores": [1.0, -2.0, 3.0]}
    pairs = prepared(tmp_path, [{**ROWS[0], **mined, **cross}], tokenizer_folder)
    for name, value in (mined | cross).items():
        assert pairs.cell(0, name) == pytest.approx(value)
    data = ContrastData(pairs, num_hard_negatives=2)
    assert data.scores_from == ("cross_encoder_positive_score", "cross_encoder_negative_scores")
    scores = data.step(np.array([0])).scores
    assert scores is not None and scores.tolist() == [7, 1, -2]
    (tmp_path / "own").mkdir()
    pairs = prepared(tmp_path / "own", [{**ROWS[0], **mined, **cross, "scores": [4, 3, 2, 1]}], tokenizer_folder)
    scores = ContrastData(pairs).step(np.array([0])).scores
    assert scores is not None and scores.tolist() == [4, 3, 2, 1]
    (tmp_path / "bad").mkdir()
    with pytest.raises(InputError, match="no row is left"):
        prepared(tmp_path / "bad", [{**ROWS[0], **mined, "cross_encoder_positive_score": 1.0,
                                     "cross_encoder_negative_scores": [1.0]}], tokenizer_folder)  # fmt: skip


def test_pairs_without_negatives_serve_too(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{key: row[key] for key in ("anchor", "positive")} for row in ROWS])
    prepare([source], tmp_path / "I", tokenizer=tokenizer_folder, max_seq_length=64)
    prepare([source], tmp_path / "II", tokenizer=tokenizer_folder, max_seq_length=64, options=Options(negatives=True))
    first, second = (ContrastData(PreparedPairs.open(tmp_path / name)).step(np.arange(4)) for name in ("I", "II"))
    assert first.known_positives.tolist() == second.known_positives.tolist()
    assert first.first.tolist() == second.first.tolist() == [0, 1, 2, 3, 4]
    assert all((a == b).all() for a, b in zip(first.ids, second.ids, strict=True))
    assert {"negatives", "query_key"}.isdisjoint(PreparedPairs.open(tmp_path / "I")._batches[0].schema.names)


def test_the_same_bytes_whatever_num_proc_with_negatives(
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("anchor_cli.data.prepare.prepare._SMALL_ROWS", 0)
    rows = [
        {"anchor": f"question {k}", "positive": f"answer {k}", "negatives": [f"no {k} {j}" for j in range(k % 8)]}
        for k in range(5000)
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    for num in (1, 2):
        prepare(
            [source], tmp_path / str(num), tokenizer=tokenizer_folder, options=Options(negatives=True), num_proc=num
        )
    assert same_folders(tmp_path / "1", tmp_path / "2")
    data = ContrastData(PreparedPairs.open(tmp_path / "1"))
    assert data.counts.tolist() == [k % 8 for k in range(5000)]
    assert data.negative_texts(4999) == rows[4999]["negatives"]


def test_a_set_whose_negatives_column_is_no_list_of_texts(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"anchor": "a question", "positive": "an answer", "negatives": [1, None, {"text": "x"}, "no"]}]
    pairs = prepared(tmp_path, rows, tokenizer_folder)
    assert pairs.manifest["counts"]["negatives"]["left_out"] == {"missing": 1, "not_a_string": 2}
    with pytest.raises(InputError, match="no row is left"):
        source = write(tmp_path / "bad.jsonl", [{**rows[0], "scores": [1.0]}])
        prepare([source], tmp_path / "bad", tokenizer=tokenizer_folder, options=Options(negatives=True))
