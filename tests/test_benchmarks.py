"""Benchmarks: BEIR folders, NanoBEIR folders and snapshots; corrupt files are refused by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchor_cli.base import hub
from anchor_cli.base.errors import InputError, RunError
from anchor_cli.base.language import hangul_share, language_of
from anchor_cli.data.benchmarks import benchmarks as module
from anchor_cli.data.benchmarks import nanobeir
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks, snapshot_nanobeir

CORPUS = [
    {"_id": "d1", "title": "수달", "text": "강에 산다"},
    {"_id": "d2", "title": "", "text": "바다에 산다"},
    {"_id": "d3", "text": "산에 산다"},
    {"_id": "d4", "title": None, "text": ""},
    {"_id": "d5", "title": "", "text": "  "},
]
QUERIES = [{"_id": "q1", "text": "수달은 어디에?"}, {"_id": "q2", "text": ""}, {"_id": "q3", "text": "판정 없음"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\tgone\t1\nq2\td2\t1\nq9\td2\t1\n"


def lines(rows: list) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "otters"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(lines(CORPUS), encoding="utf-8")
    (folder / "queries.jsonl").write_text(lines(QUERIES), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(QRELS, encoding="utf-8")
    return folder


def test_a_beir_folder(beir: Path) -> None:
    [got] = load_benchmarks([str(beir)])
    assert (got.name, got.language, got.queries) == ("ko/otters", "ko", {"q1": "수달은 어디에?"})
    assert got.corpus == {"d1": "수달 강에 산다", "d2": "바다에 산다", "d3": "산에 산다", "d5": "  "}
    assert got.qrels == {"q1": {"d1": 1, "gone": 1}}
    assert got.notes == [
        "ko/otters: 1 documents without text left out",
        "ko/otters: 1 queries without text left out",
        "ko/otters: 1 queries without a judgement left out",
        "ko/otters: 1 judged queries are not in the queries",
        "ko/otters: 1 judged documents are not in the corpus and count as never found",
    ]
    assert load_benchmarks([f"en:{beir}"])[0].name == "en/otters"


CORRUPT = [
    ("corpus.jsonl", 2, '{"_id": "d2", ', "not JSON"),
    ("corpus.jsonl", 3, '["d3"]', "expected a JSON object"),
    ("corpus.jsonl", 2, '{"_id": "d1", "text": "x"}', "_id 'd1' is there already, at {folder}/corpus.jsonl:1"),
    ("corpus.jsonl", 2, '{"id": "d2", "text": "x"}', "_id missing, expected a string"),
    ("corpus.jsonl", 2, '{"_id": "d2", "contents": "x"}', "no 'text', found '_id', 'contents'"),
    ("corpus.jsonl", 2, '{"_id": "d2", "text": 7}', "text 7, expected a string"),
    ("corpus.jsonl", 2, '{"_id": "d2", "text": "\\ud800"}', "half a surrogate pair"),
    ("queries.jsonl", 2, b'{"_id": "q2", "text": "\xb0\xa1"}', "not UTF-8: invalid start byte at byte 23"),
    ("queries.jsonl", 3, '{"_id": "q1", "text": "x"}', "_id 'q1' is there already"),
    ("queries.jsonl", 3, '{"_id": true, "text": "x"}', "_id True, expected a string"),
    ("qrels/test.tsv", 2, "q1 d1 1", "1 fields, expected query-id, corpus-id and score separated by tabs"),
    ("qrels/test.tsv", 3, "q1\td2\thigh", "score 'high', expected a whole number"),
    ("qrels/test.tsv", 3, "q1\td2\t0.5", "score '0.5', expected a whole number"),
    ("qrels/test.tsv", 3, "q1\td1\t1", "query 'q1' and document 'd1' are judged already"),
    ("qrels/test.tsv", 1, "query\tdocument\trelevance", "score 'relevance', expected a whole number"),
    ("qrels/test.tsv", 4, "q1\t\t1", "corpus-id '', expected a string"),
]


@pytest.mark.parametrize(("file", "number", "line", "message"), CORRUPT)
def test_a_corrupt_line_is_named(beir: Path, file: str, number: int, line: str | bytes, message: str) -> None:
    path = beir / file
    rows = path.read_bytes().splitlines()
    rows[number - 1] = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(InputError) as caught:
        load_benchmarks([str(beir)])
    assert caught.value.message.startswith(f"{path}:{number}: ")
    assert message.format(folder=beir) in caught.value.message


def test_ids_that_do_not_agree(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").write_text("q1\tD1\t1\r\nq1\tD2\t0\r\n", encoding="utf-8")  # no header, CRLF
    with pytest.raises(InputError, match="no judged document is in the corpus"):
        load_benchmarks([str(beir)])
    (beir / "qrels" / "test.tsv").write_text("Q1\td1\t1\n", encoding="utf-8")
    with pytest.raises(InputError, match="no query with text has a judgement"):
        load_benchmarks([str(beir)])


def test_a_missing_file_and_what_is_there_instead(beir: Path) -> None:
    (beir / "qrels" / "test.tsv").rename(beir / "qrels" / "dev.tsv")
    with pytest.raises(InputError, match="qrels/test.tsv: not found") as caught:
        load_benchmarks([str(beir)])
    assert "found dev.tsv" in (caught.value.hint or "")
    with pytest.raises(InputError) as caught:
        load_benchmarks([str(beir.parent)])
    assert caught.value.hint == "name one of the BEIR folders in it: otters"


def write_nano(
    folder: Path, *, parquet: bool, card: bool, subsets: tuple[str, ...] = ("NanoMSMARCO", "NanoNQ")
) -> Path:
    """A folder as the Hub has it, with an empty document and query, and an identical duplicate row."""
    tables: dict[str, list[dict]] = {
        "corpus": [{"_id": f"d{i}", "text": f"문서 {i} text"} for i in range(8)]
        + [{"_id": "d8", "text": ""}, {"_id": "d7", "text": "문서 7 text"}],
        "queries": [{"_id": f"q{i}", "text": f"질문 {i}"} for i in range(4)] + [{"_id": "q4", "text": ""}],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i * 2}"} for i in range(5)],
    }
    for config, rows in tables.items():
        (folder / config).mkdir(parents=True)
        for subset in subsets:
            if parquet:
                import pyarrow
                import pyarrow.parquet

                pyarrow.parquet.write_table(
                    pyarrow.Table.from_pylist(rows), folder / config / f"{subset}-00000-of-00001.parquet"
                )
            else:
                (folder / config / f"{subset}.jsonl").write_text(lines(rows), encoding="utf-8")
    if card:
        names = [
            f"- config_name: {config}\n  data_files:\n"
            + "".join(f"  - split: {subset}\n    path: {config}/{subset}*\n" for subset in subsets)
            for config in tables
        ]
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(names) + "---\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("parquet", [True, False])
def test_a_nanobeir_folder_in_place_of_a_hub_id(tmp_path: Path, parquet: bool) -> None:
    folder = write_nano(tmp_path / "NanoBEIR-ko", parquet=parquet, card=False)
    both = load_benchmarks([str(folder)])
    assert [each.name for each in both] == ["ko/NanoMSMARCO", "ko/NanoNQ"]
    assert len(both[0].corpus) == 8 and list(both[0].queries) == ["q0", "q1", "q2", "q3"]
    assert both[0].qrels["q3"] == {"d6": 1}
    assert [each.name for each in load_benchmarks([f"ko:{folder}/NanoNQ"])] == ["ko/NanoNQ"]
    assert [each.name for each in load_benchmarks([f"{folder}/nq"])] == ["ko/NanoNQ"]
    with pytest.raises(InputError, match="'NanoNG': not one of NanoMSMARCO, NanoNQ") as caught:
        load_benchmarks([f"{folder}/NanoNG"])
    assert caught.value.hint == "did you mean NanoNQ?"


def test_the_hub_loader_reads_what_sentence_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our `load_dataset` path and theirs on one clone of a Hub repository."""
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_nano(tmp_path / "NanoBEIR-ko", parquet=True, card=True)
    theirs = evaluation.NanoBEIREvaluator(["nq"], dataset_id=str(folder)).evaluators[0]
    for config in ("corpus", "queries", "qrels"):  # move the files so that only the card says where they are
        (folder / config).rename(folder / f"data-{config}")
        (folder / config).mkdir()
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("path: ", "path: data-"), encoding="utf-8")
    ours = nanobeir.read_nano(str(folder), "NanoNQ", "ko")
    assert list(ours.corpus) == theirs.corpus_ids and list(ours.corpus.values()) == theirs.corpus
    assert list(ours.queries) == theirs.queries_ids and list(ours.queries.values()) == theirs.queries
    assert {query: set(judged) for query, judged in ours.qrels.items()} == {
        query: theirs.relevant_docs[query] for query in theirs.queries_ids
    }


def test_a_contradiction_in_nanobeir_is_refused_by_row(tmp_path: Path) -> None:
    folder = write_nano(tmp_path / "nano", parquet=False, card=False)
    path = folder / "corpus" / "NanoNQ.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"_id": "d0", "text": "other"}\n', encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_benchmarks([f"ko:{folder}/NanoNQ"])
    assert caught.value.message == f"{path}:11: _id 'd0' is there already, at {path}:1"
    (folder / "queries" / "NanoNQ.jsonl").rename(folder / "queries" / "NanoNQ.parquet")
    with pytest.raises(InputError, match=r"NanoNQ.parquet: not a readable parquet file"):
        load_benchmarks([f"ko:{folder}/NanoNQ"])


def test_a_snapshot_is_what_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {lang: str(write_nano(tmp_path / lang, parquet=lang == "ko", card=False)) for lang in ("ko", "en")}
    manifest = snapshot_nanobeir(tmp_path / "snap", subsets=["nq", "NanoMSMARCO"], sources=sources)
    assert list(manifest["sets"]) == ["ko/NanoNQ", "ko/NanoMSMARCO", "en/NanoNQ", "en/NanoMSMARCO"]
    assert manifest["sets"]["ko/NanoNQ"]["queries"] == 4
    [got] = load_benchmarks([f"{tmp_path}/snap/ko/NanoNQ"])
    [want] = load_benchmarks([f"ko:{sources['ko']}/NanoNQ"])
    assert (got.name, got.queries, got.corpus, got.qrels) == (want.name, want.queries, want.corpus, want.qrels)
    assert len(load_benchmarks([str(tmp_path / "snap")])) == 4
    assert len(load_benchmarks([f"en:{tmp_path}/snap"])) == 2
    monkeypatch.setenv("ANCHOR_NANOBEIR", str(tmp_path / "snap"))
    names = [each.name for each in load_benchmarks()]
    assert names == ["ko/NanoMSMARCO", "ko/NanoNQ", "en/NanoMSMARCO", "en/NanoNQ"]
    assert [each.name for each in load_benchmarks(["en:NanoNQ", "nanobeir:ko/nq"])] == ["en/NanoNQ", "ko/NanoNQ"]
    with pytest.raises(InputError, match="'ko/NanoArguAna' is not in this snapshot"):
        load_benchmarks(["nanobeir:all"])
    path = tmp_path / "snap" / "ko" / "NanoNQ" / "corpus.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("문서 0", "문서 00"), encoding="utf-8")
    with pytest.raises(InputError, match=r"corpus.jsonl: has changed since the snapshot was written"):
        load_benchmarks(["nanobeir:ko/NanoNQ"])


def test_a_snapshot_is_whole_or_absent(tmp_path: Path) -> None:
    folder = write_nano(tmp_path / "ko", parquet=False, card=False, subsets=("NanoNQ",))
    with pytest.raises(InputError, match="no NanoFEVER.jsonl"):
        snapshot_nanobeir(tmp_path / "snap", languages=["ko"], subsets=["nq", "fever"], sources={"ko": str(folder)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ko"]


SELECTIONS = [
    ("nanobeir", ["ko/NanoMSMARCO", "ko/NanoNQ", "en/NanoMSMARCO", "en/NanoNQ"]),
    ("nanobeir:ko", ["ko/NanoMSMARCO", "ko/NanoNQ"]),
    ("ko:nanobeir", ["ko/NanoMSMARCO", "ko/NanoNQ"]),
    ("nanobeir:en/NanoNQ", ["en/NanoNQ"]),
    ("nanobeir:en/scifact", ["en/NanoSciFact"]),
    ("nanobeir:ko/all", [f"ko/{subset}" for subset in nanobeir.SUBSETS]),
    ("nanobeir:all", [f"{lang}/{subset}" for lang in ("ko", "en") for subset in nanobeir.SUBSETS]),
    ("NanoFEVER", ["ko/NanoFEVER", "en/NanoFEVER"]),
    ("de:lightonai/NanoBEIR-de/NanoNQ", ["de/NanoNQ"]),
]


@pytest.mark.parametrize(("spec", "want"), SELECTIONS)
def test_what_a_name_selects(spec: str, want: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(source: str, subset: str, language: str | None) -> module.Benchmark:
        asked.append((language, source))
        return module.Benchmark(f"{language}/{subset}", str(language), {}, {}, {})

    monkeypatch.setattr(module, "read_nano", read)
    assert [each.name for each in load_benchmarks([spec])] == want
    hub = {"ko": "sionic-ai/NanoBEIR-ko", "en": "sentence-transformers/NanoBEIR-en", "de": "lightonai/NanoBEIR-de"}
    assert all(source == hub[str(language)] for language, source in asked)
    assert len(nanobeir.SUBSETS) == 13


WRONG = [
    ("nanobeir:fr", "language 'fr', expected one of ko, en, or all", "de:lightonai/NanoBEIR-de"),
    ("nanobeir:en/NanoNG", "NanoBEIR subset 'NanoNG': not one of NanoArguAna", "did you mean NanoNQ?"),
    ("nanobier", "no such folder and no such benchmark", "did you mean nanobeir?"),
    ("{folder}/oters", "no such folder and no such benchmark", "did you mean {folder}/otters?"),
    ("{folder}/otters/corpus.jsonl", "is a file", "name the folder that holds"),
]


@pytest.mark.parametrize(("spec", "message", "hint"), WRONG)
def test_a_name_that_means_nothing(beir: Path, spec: str, message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load_benchmarks([spec.format(folder=beir.parent)])
    assert message in caught.value.message
    assert hint.format(folder=beir.parent) in (caught.value.hint or "")


def test_a_set_given_twice(beir: Path) -> None:
    with pytest.raises(InputError, match="ko/otters is given already"):
        load_benchmarks([str(beir), f"ko:{beir}"])


def test_without_a_network_the_failing_set_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "_revisions", {"sionic-ai/NanoBEIR-ko": None})
    with pytest.raises(RunError, match="sionic-ai/NanoBEIR-ko queries/NanoMSMARCO: could not be loaded") as caught:
        load_benchmarks(["nanobeir"])
    assert "anchor prepare nanobeir --out DIR" in (caught.value.hint or "")


def test_the_language_is_told_by_hangul() -> None:
    assert hangul_share("수달 ab") == 0.5
    assert hangul_share("123 !") == 0.0
    assert language_of("BERT 모델의 학습률은?") == "ko"
    assert language_of("KTX 예매는 어떻게 하나요? BTS 멤버") == "ko"
    assert language_of("What does 안녕 mean in Korean? 123") == "en"
    assert language_of("") == "en"
