"""`anchor eval` as it is typed: results, names, promised messages and exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from anchor_cli.base.runs import remember_run
from anchor_cli.cli import run

TEXTS = {
    "d1": "수달은 강과 바다에 사는 동물이다",
    "d2": "복지 급여는 주민센터에서 신청할 수 있다",
    "d3": "Otters live in rivers and in the sea",
    "d4": "You can apply for the benefit at the community centre",
}


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "otters"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": "", "text": text} for key, text in TEXTS.items()]
    queries = [{"_id": f"q{i}", "text": text} for i, text in enumerate(["수달은 어디에 사나요?", "복지 급여 신청"])]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq1\td2\t1\n", encoding="utf-8")
    return folder


def test_one_model_as_json(
    small_model: Path, beir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anchor_cli.evaluate import evaluate

    asked: list[str] = []

    def search(*arguments: Any, device: str) -> Any:
        asked.append(device)
        return vector_search(*arguments, device=device)

    vector_search = evaluate.search
    monkeypatch.setattr(evaluate, "search", search)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # --device cpu is the search's, too
    assert run(["eval", str(small_model), "--data", f"ko:{beir}", "--json", "--device", "cpu"]) == 0
    assert asked == ["cpu"]
    said = capsys.readouterr()
    got = json.loads(said.out)
    assert set(got) == {"model", "results", "avg"} and got["model"] == str(small_model)
    assert set(got["results"]) == {"ko/otters"} and set(got["avg"]) == {"ndcg@10", "mrr@10"}
    assert got["results"]["ko/otters"] == got["avg"]
    assert "ko/otters" in said.err  # the table is for the person


def test_two_models_a_baseline_worst_queries_and_files(
    small_model: Path, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bm25s")
    other = shutil.copytree(small_model, tmp_path / "other")
    arguments = ["--data", str(beir), "--baseline", "bm25", "--metric", "recall@10", "--queries", "1"]
    out = ["--out", str(tmp_path / "out"), "--details", "--json"]
    assert run(["eval", str(small_model), str(other), *arguments, *out]) == 0
    said = capsys.readouterr()
    got = json.loads(said.out)
    assert [each["model"] for each in got] == [str(small_model), str(other), "bm25"]
    assert got[0]["results"] == got[1]["results"]
    assert got[1]["difference_to_first"]["recall@10"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert len(got[2]["worst_queries"]) == 1 and got[2]["avg"]["recall@10"] == 1.0
    assert "수달" in said.err or "복지" in said.err
    assert (tmp_path / "out" / "bm25" / "ko-otters.run").read_text(encoding="utf-8").startswith("q0 Q0 d1 1 ")


def test_the_baseline_alone_needs_no_model(beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s")
    assert run(["eval", "--baseline", "bm25", "--data", str(beir)]) == 0
    said = capsys.readouterr()
    assert "ko/otters" in said.out and "1.0000" in said.out and not said.err


def test_a_query_that_is_a_document_is_said_and_can_be_left_out(beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bm25s")
    with open(beir / "corpus.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"_id": "q0", "title": "수달", "text": "수달은 어디에 사나요?"}) + "\n")
    arguments = ["eval", "--baseline", "bm25", "--data", str(beir), "--json"]
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert "ko/otters: 1 queries are documents of the corpus themselves and are ranked" in said.err
    assert "--ignore-identical-ids" in said.err
    assert json.loads(said.out)["avg"]["mrr@10"] == 0.75
    assert run([*arguments, "--ignore-identical-ids"]) == 0
    said = capsys.readouterr()
    assert "themselves" not in said.err
    got = json.loads(said.out)
    assert got["avg"]["mrr@10"] == 1.0 and got["ignore_identical_ids"] == ["ko/otters"]


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> list[str]:
    """The lines a failing `anchor eval` says, `anchor: ` taken off."""
    assert run(["eval", *arguments]) == code
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[0].startswith("anchor: ") and len(lines) <= 2
    return [lines[0].removeprefix("anchor: "), *(line.strip() for line in lines[1:])]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_model: Path) -> Path:
    """Two runs below one output folder; the second is the last one."""
    monkeypatch.setenv("ANCHOR_HOME", str(tmp_path / "home"))
    for name, steps in (("a", (1, 3)), ("b", (2,))):
        for step in steps:
            shutil.copytree(small_model, tmp_path / "output" / name / f"checkpoint-{step}")
        remember_run(tmp_path / "output" / name)
    return tmp_path / "output"


def test_checkpoints_are_found_by_name(runs: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, want in (
        ([], "b/checkpoint-2"),
        (["checkpoint-2"], "b/checkpoint-2"),
        (["checkpoint-3"], "a/checkpoint-3"),
    ):
        assert run(["eval", *arguments, "--data", str(beir), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == str(runs / want)


def test_names_that_are_missing_or_ambiguous(runs: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "a", runs / "c")
    remember_run(runs / "c")
    remember_run(runs / "b")
    message, hint = fail(["checkpoint-3", "--data", str(beir)], capsys)
    assert message.startswith("checkpoint-3: several runs have one: ")
    assert str(runs / "a" / "checkpoint-3") in message and str(runs / "c" / "checkpoint-3") in message
    message, hint = fail(["checkpoint-22", "--data", str(beir)], capsys)
    assert message.startswith("checkpoint-22: no such folder, nor a checkpoint of that name")
    assert "did you mean checkpoint-2?" in hint


def test_a_half_written_checkpoint(runs: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "a" / "checkpoint-3"
    (folder / "training_state.json").write_text("{}", encoding="utf-8")
    message, hint = fail([str(folder), "--data", str(beir)], capsys)
    assert message == f"{folder}: not a whole checkpoint: manifest.json is missing"
    assert hint == "choose another checkpoint: checkpoint-1"
    size = (folder / "model.safetensors").stat().st_size
    manifest = {"files": {"model.safetensors": {"size": size + 1, "sha256": ""}}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    [message, _] = fail([str(folder), "--data", str(beir)], capsys)
    assert f"model.safetensors has {size:,} bytes instead of {size + 1:,}" in message


def test_folders_that_are_no_model(runs: Path, tmp_path: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(beir)]
    assert fail([str(beir), *data], capsys) == [
        f"{beir}: not a model: no config.json and no modules.json",
        "expected a checkpoint or a model folder",
    ]
    assert fail([str(runs / "a"), *data], capsys)[1] == "name one of its checkpoints: checkpoint-1, checkpoint-3"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert fail([str(adapter), *data], capsys)[1] == "merge it into its base model first"
    (runs / "a" / "checkpoint-1" / "model.safetensors").write_bytes(b"\x00" * 100)
    [message, *_] = fail([str(runs / "a" / "checkpoint-1"), *data], capsys)
    assert str(runs / "a" / "checkpoint-1") in message
    same = str(runs / "b" / "checkpoint-2")
    assert fail([same, f"{same}/", *data], capsys)[0].endswith(f"given twice, {same}")


def test_a_corrupt_judgement(small_model: Path, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = beir / "qrels" / "test.tsv"
    path.write_text(path.read_text(encoding="utf-8").replace("q1\td2\t1", "q1 d2 1"), encoding="utf-8")
    [message] = fail([str(small_model), "--data", str(beir)], capsys)
    assert message == f"{path}:3: 1 fields, expected query-id, corpus-id and score separated by tabs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "ndgc@10"], "metric 'ndgc@10': expected ndcg, mrr, recall, map with a cut-off"),
        (["--baseline", "tfidf"], "--baseline tfidf: expected bm25"),
        (["--data", "nanobier"], "--data nanobier: no such folder and no such benchmark"),
        (["--queries", "-1"], "Invalid value for '--queries'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fail([str(small_model), *arguments], capsys)[0]


def test_a_sentence_transformers_folder_is_encoded_by_its_library(
    small_model: Path, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own prompts and pooling: the same figures as its own evaluator, on real data's format."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.models import Pooling, Transformer

    transformer = Transformer(str(small_model))
    pooling = Pooling(transformer.get_word_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(
        modules=[transformer, pooling], prompts={"query": "질문: ", "document": ""}, device="cpu"
    )
    model.save_pretrained(str(tmp_path / "foreign"))
    queries = {"q0": "수달은 어디에 사나요?", "q1": "복지 급여 신청"}
    evaluator = InformationRetrievalEvaluator(queries, TEXTS, {"q0": {"d1"}, "q1": {"d2"}})
    theirs = evaluator(SentenceTransformer(str(tmp_path / "foreign"), device="cpu"))
    capsys.readouterr()  # transformers prints a line when it is imported
    assert run(["eval", str(tmp_path / "foreign"), "--data", str(beir), "--json", "--device", "cpu"]) == 0
    ours = json.loads(capsys.readouterr().out)["avg"]
    assert ours["ndcg@10"] == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-6)
    assert ours["mrr@10"] == pytest.approx(theirs["cosine_mrr@10"], abs=1e-6)
