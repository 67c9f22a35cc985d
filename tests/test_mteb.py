"""`mteb` with an export, as docs/how-to/mteb.md says: the prompts are the right ones, the score is `anchor eval`'s.

Skipped where mteb is not installed; it is no dependency, because it pins much else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from export_fixtures import make_checkpoint, make_contract
from test_suites import write_repository as write_tables

from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.benchmarks.hub_sets import RetrievalSet
from anchor_cli.data.benchmarks.suites import KURE
from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.evaluate.evaluate import evaluate
from anchor_cli.export.export import export

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow

TOPICS = "수달 강 바다 복지 급여 신청 소방 훈련 otter river sea benefit office fire drill 한글 문서 검색".split()


def write_repository(folder: Path) -> None:
    """A retrieval set in the layout of the Hub, with titles, and its card, so that `datasets` itself reads it."""
    texts = [" ".join(TOPICS[(i * step) % len(TOPICS)] for step in range(1, 4 + i % 7)) for i in range(60)]
    corpus = [{"_id": f"d{i}", "title": f"제목 {i}" if i % 3 else "", "text": text} for i, text in enumerate(texts)]
    queries = [
        {"_id": f"q{i}", "text": f"{TOPICS[i % len(TOPICS)]} {TOPICS[(3 * i) % len(TOPICS)]}?"} for i in range(20)
    ]
    qrels = [{"query-id": f"q{i}", "corpus-id": f"d{(7 * i + j) % 60}", "score": 1} for i in range(20) for j in (0, 5)]
    configurations = []
    for name, rows in (("corpus", corpus), ("queries", queries), ("default", qrels)):
        (folder / name).mkdir(parents=True)
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / name / "test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        configurations.append(f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/test.jsonl\n")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configurations)}---\n", encoding="utf-8")


@pytest.fixture(scope="module")
def exported(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("output") / "kure"
    run.mkdir()
    return export(make_checkpoint(run, 2, small_model, make_contract(small_model)), out=run / "stage2").folder


@pytest.mark.parametrize(("language", "task_name"), [("ko", "AutoRAGRetrieval"), ("en", "SciFact")])
def test_mteb_with_an_export_scores_as_anchor_eval(
    language: str, task_name: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that mteb knows, its data replaced by a local set: prompts are chosen by the names of tasks."""
    mteb = pytest.importorskip("mteb")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from mteb_export import load

    write_repository(tmp_path / "set")
    registered = type(mteb.get_task(task_name))
    replaced = {"dataset": {"path": str(tmp_path / "set"), "revision": "main"}}
    local = type("Local", (registered,), {"metadata": registered.metadata.model_copy(update=replaced)})
    model = load(str(exported), [local()], device="cpu")
    folder = tmp_path / "predictions"
    result = mteb.evaluate(model, [local()], cache=None, prediction_folder=folder, encode_kwargs={"batch_size": 8})
    [scores] = result.task_results[0].scores["test"]
    embedder = load_embedder(exported, device="cpu")
    ours, other = (
        evaluate(embedder, load_benchmarks([f"{code}:{tmp_path / 'set'}"]))["avg"]
        for code in (language, "en" if language == "ko" else "ko")
    )
    assert scores["ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=0.51e-5)  # mteb rounds to five places
    assert scores["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=0.51e-5)
    assert unrounded(folder, tmp_path / "set") == pytest.approx(ours["ndcg@10"], abs=1e-6)
    assert abs(ours["ndcg@10"] - other["ndcg@10"]) > 1e-3  # the other language's instruction would be seen


KURE_SUBSETS = {
    "MIRACLRetrieval": "ko",
    "PublicHealthQA": "korean",
    "BelebeleRetrieval": "kor_Hang-kor_Hang",
    "MrTidyRetrieval": "korean",
    "MultiLongDocRetrieval": "ko",
    "XPQARetrieval": "kor-kor",
}


def kure_repository(folder: Path, entry: RetrievalSet) -> None:
    """A repository in the layout that mteb's own task of this name reads, in the split and part that ours names."""
    write_repository(folder / "plain")

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "plain" / name / "test.jsonl").read_text().splitlines()]

    corpus, queries, qrels = rows("corpus"), rows("queries"), rows("default")
    tables: dict[tuple[str, str], list[dict[str, Any]]]
    if entry.columns:
        texts = {row["_id"]: row["text"] for row in corpus}
        asked = {row["_id"]: row["text"] for row in queries}
        table = [
            {
                "question": asked[row["query-id"]],
                "answer": texts[row["corpus-id"]],
                "flores_passage": texts[row["corpus-id"]],
                "link": row["corpus-id"],
            }
            for row in qrels
        ]
        tables = {(str(entry.part), entry.split): table}
    else:
        prefix = "" if entry.part is None else f"{entry.part}-"
        judgements = "default" if entry.part is None else "qrels"
        corpus_split = "train" if entry.name == "MrTidyRetrieval" else entry.split
        tables = {
            (f"{prefix}corpus", corpus_split): corpus,
            (f"{prefix}queries", entry.split): queries,
            (f"{prefix}{judgements}", entry.split): qrels,
        }
    write_tables(folder / f"copy-of-{entry.name}", tables, parquet=True)


@pytest.mark.parametrize("entry", KURE, ids=lambda entry: entry.name)
def test_the_sets_of_the_suite_are_those_of_mtebs_tasks(entry: RetrievalSet, exported: Path, tmp_path: Path) -> None:
    """Repository, revision and score of every set of `kure`: mteb's task of that name on a copy of the layout."""
    mteb = pytest.importorskip("mteb")
    sys.path.insert(0, str(EXAMPLES))
    from mteb_export import load

    name = entry.name.removesuffix("-dev").removesuffix("-test") if "LongDoc" in entry.name else entry.name
    subsets = [KURE_SUBSETS[name]] if name in KURE_SUBSETS else None
    task = mteb.get_task(name, hf_subsets=subsets, eval_splits=[entry.split])
    assert task.metadata.dataset["path"] == entry.source
    assert task.metadata.dataset["revision"] == (entry.revision or "main")
    assert task.ignore_identical_ids == entry.ignore_identical_ids
    kure_repository(tmp_path, entry)
    copy = str(tmp_path / f"copy-of-{entry.name}")
    task.metadata = task.metadata.model_copy(update={"dataset": {"path": copy, "revision": "main"}})
    model = load(str(exported), [task], device="cpu")
    folder = tmp_path / "predictions"
    result = mteb.evaluate(model, [task], cache=None, prediction_folder=folder, encode_kwargs={"batch_size": 8})
    [scores] = result.task_results[0].scores[entry.split]
    benchmark = replace(entry, source=copy, revision=None).read()
    ours = evaluate(load_embedder(exported, device="cpu"), [benchmark])["avg"]
    assert scores["ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=0.51e-5)
    assert scores["mrr_at_10"] == pytest.approx(ours["mrr@10"], abs=0.51e-5)
    assert 0.02 < ours["ndcg@10"] < 0.98


def unrounded(predictions: Path, repository: Path) -> float:
    """nDCG@10 of what mteb predicted, by trec_eval itself."""
    import pytrec_eval

    [file] = predictions.rglob("*predictions*.json")
    run: dict[str, Any] = json.loads(file.read_text())["default"]["test"]
    qrels: dict[str, dict[str, int]] = {}
    for line in (repository / "default" / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(value["ndcg_cut_10"] for value in values.values()) / len(values)


def test_the_command_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("mteb")
    page = (EXAMPLES.parent / "docs" / "how-to" / "mteb.md").read_text(encoding="utf-8")
    assert "python examples/mteb_export.py models/kure-stage1 " in page
    command = [sys.executable, str(EXAMPLES / "mteb_export.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"--language", "--batch-size", "--out"} <= set(done.stdout.replace(",", " ").split())
