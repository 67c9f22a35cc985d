"""Retrieval sets in every layout of the Hub, suites of them, and their cache.

A local copy of a repository is read by `datasets` itself, as the Hub's would be, and must be the BEIR folder of the
same data, text by text; its figures those of sentence-transformers' own evaluator.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.cli import run
from anchor_cli.data.benchmarks import hub_sets, suites
from anchor_cli.data.benchmarks.beir import Benchmark
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.benchmarks.hub_sets import RetrievalSet
from anchor_cli.data.benchmarks.suites import KURE, suite_of
from anchor_cli.evaluate.compare import ModelResult, document
from anchor_cli.evaluate.evaluate import BenchmarkResult, summary

WORDS = "수달 강 바다 복지 급여 신청 소방 훈련 otter river sea benefit office fire drill".split()
CORPUS = [
    {"_id": str(i), "title": f"제목 {i}" if i % 3 else "", "text": " ".join(WORDS[(i * k) % 15] for k in range(1, 5))}
    for i in range(30)
]
QUERIES = [{"_id": str(i), "text": f"{WORDS[i]} {WORDS[(4 * i) % 15]}은 어디에 있나요?"} for i in range(12)]
QRELS = [{"query-id": str(i), "corpus-id": str((7 * i + k) % 30), "score": 1} for i in range(10) for k in (0, 5)]
COLUMNS = {"query": "question", "document": "answer"}
Rows = list[dict[str, Any]]


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_beir(folder: Path, splits: tuple[str, ...] = ("test",)) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(lines(CORPUS), encoding="utf-8")
    (folder / "queries.jsonl").write_text(lines(QUERIES), encoding="utf-8")
    for split in splits:
        table = [f"{row['query-id']}\t{row['corpus-id']}\t{row['score']}\n" for row in QRELS]
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(table))
    return folder


def write_repository(folder: Path, tables: dict[tuple[str, str], Rows], *, parquet: bool) -> Path:
    """A repository of the Hub: rows by (configuration, split), and the card that says where they are."""
    configurations: dict[str, list[str]] = {}
    for (config, split), rows in tables.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        if parquet:
            file = folder / config / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            file = folder / config / f"{split}.jsonl"
            file.write_text(lines(rows), encoding="utf-8")
        path = file.relative_to(folder)
        configurations.setdefault(config, []).append(f"  - split: {split}\n    path: {path}\n")
    card = [f"- config_name: {config}\n  data_files:\n{''.join(files)}" for config, files in configurations.items()]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(card) + "---\n", encoding="utf-8")
    return folder


def renamed(rows: Rows, **columns: Callable[[Any], tuple[str, Any]]) -> Rows:
    return [dict(columns[key](value) if key in columns else (key, value) for key, value in row.items()) for row in rows]


WITH_INTS: dict[str, Any] = {
    "corpus": renamed(CORPUS, _id=lambda value: ("id", int(value))),
    "queries": renamed(QUERIES, _id=lambda value: ("id", int(value))),
    "qrels": [{"query-id": int(r["query-id"]), "corpus-id": int(r["corpus-id"]), "score": 1.0} for r in QRELS],
}
LAYOUTS: dict[str, tuple[dict[tuple[str, str], Rows], str]] = {
    # as yjoonjang/markers_bm and most of MTEB have it
    "default, one split": (
        {("corpus", "test"): CORPUS, ("queries", "test"): QUERIES, ("default", "test"): QRELS}, ""),
    # as BeIR's and taeminlee/Ko-StrategyQA: the corpus under a split of its own
    "qrels, other splits": (
        {("corpus", "corpus"): CORPUS, ("queries", "queries"): QUERIES, ("qrels", "dev"): QRELS,
         ("qrels", "train"): QRELS[:2]}, ""),
    "a split by name": (
        {("corpus", "corpus"): CORPUS, ("queries", "queries"): QUERIES, ("default", "test"): QRELS[:2],
         ("default", "dev"): QRELS}, "/dev"),
    # as mteb/MIRACLRetrieval and mteb/mrtidy: a configuration a language
    "a part a language": (
        {(f"{part}-{name}", "test"): rows for part in ("ko", "en") for name, rows in
         (("corpus", CORPUS), ("queries", QUERIES), ("qrels", QRELS if part == "ko" else QRELS[:2]))}, ""),
    "a part by name, a split by name": (
        {("korean-corpus", "train"): CORPUS, ("korean-queries", "dev"): QUERIES, ("korean-queries", "test"): QUERIES,
         ("korean-qrels", "dev"): QRELS, ("korean-qrels", "test"): QRELS[:2]}, "/korean/dev"),
    "ids are numbers, scores too": (
        {("corpus", "test"): WITH_INTS["corpus"], ("queries", "test"): WITH_INTS["queries"],
         ("default", "test"): WITH_INTS["qrels"]}, ""),
}  # fmt: skip


@pytest.mark.parametrize("parquet", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repository_is_the_beir_folder_of_the_same_data(layout: str, parquet: bool, tmp_path: Path) -> None:
    tables, rest = LAYOUTS[layout]
    [want] = load_benchmarks([f"ko:{write_beir(tmp_path / 'beir')}"])
    folder = write_repository(tmp_path / "set", tables, parquet=parquet)
    [got] = load_benchmarks([f"ko:{folder}{rest}"]) if rest.count("/") < 2 else hub_reads(folder, rest)
    assert (got.queries, got.corpus, got.qrels) == (want.queries, want.corpus, want.qrels)
    assert list(got.corpus) == list(want.corpus) and got.language == "ko"
    assert got.name in ("ko/set", "ko/set-korean")


def hub_reads(folder: Path, rest: str) -> list[Benchmark]:
    """SOURCE/PART/SPLIT is a name of the Hub; here the same function reads it from the copy."""
    return [one.read() for one in hub_sets.sets_of(str(folder), rest.strip("/").split("/"), "ko")]


def test_copies_of_one_name_are_not_taken_for_each_other(tmp_path: Path) -> None:
    """`datasets` caches a local folder by its last name; a changed copy, or another one, must be read anew."""
    tables = {("corpus", "test"): CORPUS, ("queries", "test"): QUERIES, ("default", "test"): QRELS}
    write_repository(tmp_path / "a" / "set", tables, parquet=False)
    write_repository(tmp_path / "b" / "set", tables | {("corpus", "test"): CORPUS[:20]}, parquet=False)
    sizes = [len(load_benchmarks([f"ko:{tmp_path}/{name}/set"])[0].corpus) for name in "ab"]
    assert sizes == [30, 20]
    write_repository(tmp_path / "a" / "set", tables | {("corpus", "test"): CORPUS[:25]}, parquet=False)
    assert len(load_benchmarks([f"ko:{tmp_path}/a/set"])[0].corpus) == 25


def test_without_a_language_hangul_decides(tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "set", LAYOUTS["default, one split"][0], parquet=False)
    assert [each.name for each in load_benchmarks([str(folder)])] == ["ko/set"]


def test_a_zip_of_a_beir_folder(tmp_path: Path) -> None:
    [want] = load_benchmarks([f"ko:{write_beir(tmp_path / 'scifact')}"])
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "scifact")
    (tmp_path / "archive.zip").rename(tmp_path / "scifact.zip")
    [got] = load_benchmarks([f"ko:{tmp_path}/scifact.zip"])
    assert (got.name, got.queries, got.corpus, got.qrels) == (want.name, want.queries, want.corpus, want.qrels)
    assert load_benchmarks([f"{tmp_path}/scifact.zip"])[0].name == "ko/scifact"
    broken = tmp_path / "broken.zip"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("set/corpus.jsonl", '{"_id": "d1"\n')
        archive.writestr("set/queries.jsonl", "")
        archive.writestr("set/qrels/test.tsv", "")
    with pytest.raises(InputError, match=f"{broken}/set/queries|{broken}/set/corpus.jsonl:1: not JSON"):
        load_benchmarks([str(broken)])
    broken.write_bytes(b"PK no zip")
    with pytest.raises(InputError, match="not a readable .zip"):
        load_benchmarks([str(broken)])


def test_a_table_of_questions_and_answers(tmp_path: Path) -> None:
    """publichealth-qa and belebele: ids are made, an answer or passage that comes twice is one document."""
    rows = [
        {"question": "a?", "answer": "A", "link": "1"},
        {"question": "b?", "answer": "B", "link": "2"},
        {"question": "c?", "answer": "A", "link": "1"},
        {"question": "a?", "answer": "C", "link": "2"},
        {"question": None, "answer": "D", "link": "4"},
    ]
    folder = write_repository(tmp_path / "qa", {("korean", "test"): rows}, parquet=True)
    columns = COLUMNS
    got = RetrievalSet("QA", str(folder), "ko", part="korean", columns=columns).read()
    assert got.queries == {"Q0": "a?", "Q1": "b?", "Q2": "c?"}
    assert got.corpus == {"D0": "A", "D1": "B", "D2": "C"}
    assert got.qrels == {"Q0": {"D0": 1, "D2": 1}, "Q1": {"D1": 1}, "Q2": {"D0": 1}}
    got = RetrievalSet("QA", str(folder), "ko", part="korean", columns=columns | {"document_id": "link"}).read()
    assert got.corpus == {"D0": "A", "D1": "B"} and got.qrels["Q0"] == {"D0": 1, "D1": 1}  # the first text of a link
    with pytest.raises(InputError, match="no 'reply', found 'question', 'answer', 'link'"):
        RetrievalSet("QA", str(folder), "ko", part="korean", columns=columns | {"document": "reply"}).read()


def test_what_a_repository_lacks_is_named(tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "many", LAYOUTS["a part a language"][0], parquet=False)
    with pytest.raises(InputError, match="which part: en, ko"):
        load_benchmarks([str(folder)])
    tables = {("corpus", "test"): CORPUS, ("queries", "test"): QUERIES, ("default", "test"): QRELS}
    one = str(write_repository(tmp_path / "one", tables | {("default", "dev"): QRELS}, parquet=False))
    for spec, message, hint in [
        (RetrievalSet("x", str(folder), "ko"), "no configuration corpus; it has ko-corpus, ko-queries", ""),
        (RetrievalSet("x", str(folder), "ko", part="kor"), "no configuration kor-corpus", "did you mean ko-corpus?"),
        (RetrievalSet("x", one, "ko", "tset"), "no split tset; it has test, dev", "did you mean test?"),
        (RetrievalSet("x", one, "ko", columns={"query": "a", "document": "b"}), "no 'a'", ""),
    ]:
        with pytest.raises(InputError) as caught:
            spec.read()
        assert message in caught.value.message and hint in (caught.value.hint or "")


def test_a_set_that_cannot_be_had_is_named_with_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    from anchor_cli.base import hub

    monkeypatch.setattr(hub, "_revisions", {each.source: None for each in KURE})
    with pytest.raises(RunError, match="taeminlee/Ko-StrategyQA configurations: could not be loaded"):
        load_benchmarks(["suite:kure"])


def test_the_suite_of_kures_leaderboard() -> None:
    assert len(KURE) == 9 and sum(each.weight for each in KURE) == 8
    assert {each.language for each in KURE} == {"ko"}
    named = {each.name.split("-dev")[0].split("-test")[0] for each in KURE}
    assert named == {
        *("Ko-StrategyQA", "AutoRAGRetrieval", "MIRACLRetrieval", "PublicHealthQA"),
        *("BelebeleRetrieval", "MrTidyRetrieval", "MultiLongDocRetrieval", "XPQARetrieval"),
    }
    unpinned = [each.name for each in KURE if each.revision is None]
    assert unpinned == ["PublicHealthQA"]  # mteb itself names its branch `main`
    assert all(len(each.revision or "0" * 40) == 40 for each in KURE)


def test_the_average_counts_two_splits_of_a_set_as_one() -> None:
    def result(name: str, weight: float, values: list[float], language: str = "ko") -> BenchmarkResult:
        benchmark = Benchmark(f"{language}/{name}", language, {}, {}, {}, f"hub/{name}@abc", weight=weight)
        return BenchmarkResult(benchmark, list("abcdefgh")[: len(values)], [], [], {"ndcg@10": np.array(values)}, {})

    rows = [result("A", 1.0, [0.2, 0.4]), result("L-dev", 0.5, [0.9, 0.7]), result("L-test", 0.5, [0.5, 0.1])]
    want = (0.3 + (0.8 + 0.3) / 2) / 2  # KURE's leaderboard: (dev + test) / 2 is the set's score
    assert summary(rows)["avg"]["ndcg@10"] == pytest.approx(want)
    model = ModelResult("m", rows)
    interval = model.uncertainty("ndcg@10")
    assert interval.mean == pytest.approx(want) and interval.low < want < interval.high
    both = ModelResult("m", [*rows, result("E", 1.0, [1.0, 0.0], "en")])
    got = document(both, ["ndcg@10"], suite="file.json")
    assert got["avg_by_language"] == {"ko": {"ndcg@10": pytest.approx(want)}, "en": {"ndcg@10": 0.5}}
    assert got["sources"]["ko/A"] == "hub/A@abc" and got["suite"] == "file.json"
    assert got["avg"]["ndcg@10"] == pytest.approx((2 * want + 0.5) / 3)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A suite file over a repository of the Hub's layout, a BEIR folder and a table, all beside it."""
    write_repository(tmp_path / "hub", LAYOUTS["default, one split"][0], parquet=True)
    write_beir(tmp_path / "beir", ("test", "dev"))
    table = [{"question": query["text"], "answer": CORPUS[i]["text"]} for i, query in enumerate(QUERIES)]
    write_repository(tmp_path / "qa", {("korean", "test"): table}, parquet=False)
    sets = [
        {"name": "Hub", "source": "hub", "language": "ko"},
        {"name": "Folder", "source": "beir", "language": "ko", "split": "dev"},
        {"name": "Table", "source": "qa", "language": "en", "part": "korean", "columns": COLUMNS},
    ]
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"sets": sets}), encoding="utf-8")
    return path


def test_a_suite_from_a_file_scores_as_sentence_transformers(
    suite: Path, small_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same figures for the repository and the BEIR folder, by ours and by the library's evaluator; then cached."""
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    import torch
    from sentence_transformers.util import cos_sim

    from anchor_cli.evaluate import models
    from anchor_cli.evaluate.embedder import load_embedder

    monkeypatch.setenv("ANCHOR_HOME", str(tmp_path / "home"))
    capsys.readouterr()  # libraries print when they are imported
    arguments = ["eval", str(small_model), "--suite", str(suite), "--json", "--device", "cpu"]
    assert run(arguments) == 0
    said = capsys.readouterr()
    got = json.loads(said.out)
    assert list(got["results"]) == ["ko/Hub", "ko/Folder", "en/Table"]
    assert got["results"]["ko/Hub"] == got["results"]["ko/Folder"]
    assert set(got["avg_by_language"]) == {"ko", "en"} and "avg ko" in said.err and "earlier" not in said.err
    assert got["sources"]["ko/Hub"] == f"{suite.parent}/hub/test"
    embedder = load_embedder(small_model, device="cpu")

    class Model:
        def encode_query(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.from_numpy(embedder.encode_queries(texts, "ko"))

        def encode_document(self, texts: list[str], **_: object) -> torch.Tensor:
            return torch.from_numpy(embedder.encode_documents(texts, "ko"))

    relevant: dict[str, set[str]] = {}
    for row in QRELS:
        relevant.setdefault(row["query-id"], set()).add(row["corpus-id"])
    theirs = evaluation.InformationRetrievalEvaluator(
        {row["_id"]: row["text"] for row in QUERIES if row["_id"] in relevant},
        {row["_id"]: f"{row['title']} {row['text']}".strip() for row in CORPUS},
        relevant,
        score_functions={"cosine": cos_sim},
    )
    want = theirs.compute_all_metrics(Model())["cosine"]
    assert got["results"]["ko/Hub"]["ndcg@10"] == pytest.approx(want["ndcg@k"][10], abs=1e-6)
    assert got["results"]["ko/Hub"]["mrr@10"] == pytest.approx(want["mrr@k"][10], abs=1e-6)

    loaded = []
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda *given: loaded.append(given[0].name) or load(*given))
    assert run([*arguments, "--metric", "recall@10", "--metric", "ndcg@10"]) == 0  # another metric, no encoding
    said = capsys.readouterr()
    again = json.loads(said.out)
    assert not loaded and "3 of 3 sets as evaluated earlier" in said.err
    assert {name: row["ndcg@10"] for name, row in again["results"].items()} == {
        name: row["ndcg@10"] for name, row in got["results"].items()
    }
    assert run([*arguments, "--no-cache"]) == 0 and len(loaded) == 1
    assert json.loads(capsys.readouterr().out) == got
    (suite.parent / "beir" / "qrels" / "dev.tsv").write_text("0\t3\t1\n1\t4\t1\n")  # this set is another one now
    assert run(arguments) == 0 and len(loaded) == 2
    assert "2 of 3 sets as evaluated earlier" in capsys.readouterr().err
    other = shutil.copytree(small_model, tmp_path / "other")
    assert run(["eval", str(other), *arguments[2:]]) == 0 and len(loaded) == 3
    assert "earlier" not in capsys.readouterr().err


WRONG = [
    ({"sets": []}, "not a suite", 'expected {"sets"'),
    ([], "not a suite", 'expected {"sets"'),
    ({"sets": [7]}, "set 1: 7, expected a JSON object", ""),
    ({"sets": [{"name": "a", "source": "b"}]}, "set 1: no 'language'", ""),
    ({"sets": [{"name": "a", "source": "b", "langauge": "ko"}]}, "unknown key 'langauge'", "did you mean language?"),
    ({"sets": [{"name": "a", "source": "b", "language": 7}]}, "set 1: language: ", ""),
    ({"sets": [{"name": "a", "source": "b", "language": "ko", "weight": 0}]}, "weight 0", ""),
    ({"sets": [{"name": "a", "source": "b", "language": "ko", "columns": {"query": "q"}}]}, "columns: expected", ""),
]


@pytest.mark.parametrize(("contents", "message", "hint"), WRONG)
def test_a_faulty_file_is_named(contents: Any, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(InputError) as caught:
        suite_of(str(path))
    assert caught.value.message.startswith(str(path)) and message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_suites_by_name() -> None:
    assert suite_of("kure") is KURE
    assert len(hub_sets_named("nanobeir")) == 4 and len(hub_sets_named("nanobeir-full")) == 26
    with pytest.raises(InputError, match="no such suite") as caught:
        suite_of("kuer")
    assert caught.value.hint == "did you mean kure?"


def test_the_plan_knows_suites(suite: Path) -> None:
    """`eval_data` may name one; a name that means none fails the plan, before anything is trained."""
    from anchor_cli.plan.checks import _evaluation_data

    assert _evaluation_data("suite:kure") is None  # of the Hub: not asked
    assert _evaluation_data(f"suite:{suite}") is None
    assert [each.name for each in load_benchmarks([f"suite:{suite}"])] == ["ko/Hub", "ko/Folder", "en/Table"]
    with pytest.raises(InputError, match="--suite kuer: no such suite"):
        _evaluation_data("suite:kuer")


def hub_sets_named(name: str) -> list[Any]:
    from anchor_cli.data.benchmarks.benchmarks import parts_of

    assert isinstance(suites.SUITES[name], str)
    return parts_of(f"suite:{name}")
