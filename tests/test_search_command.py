"""`anchor search`: the nearest documents are those of brute force; every kind of corpus; every way to ask."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from anchor_cli.base.errors import InputError
from anchor_cli.base.runs import remember_run
from anchor_cli.cli import run
from anchor_cli.data.benchmarks.beir import Benchmark
from anchor_cli.data.documents import read_documents

TEXTS = {
    "d1": "수달은 강과 바다에 사는 동물이다",
    "d2": "복지 급여는 주민센터에서 신청할 수 있다",
    "d3": "Otters live in rivers and in the sea",
    "d4": "You can apply for the benefit at the community centre",
}
QUERY = "수달은 어디에 사나요?"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A BEIR folder that has a corpus only."""
    folder = tmp_path / "otters"
    folder.mkdir()
    rows = [json.dumps({"_id": key, "title": "", "text": text}) for key, text in TEXTS.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def brute_force(model: Path, query: str, texts: dict[str, str], instruction: str) -> list[tuple[str, float]]:
    """Ids and cosines by transformers itself, one text at a time."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()

    def vector(text: str) -> np.ndarray:
        ids = tokenizer(f"<|im_start|>user\n{text}<|im_end|>", return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            state = encoder(**ids).last_hidden_state[0, -1].double().numpy()
        return state / np.linalg.norm(state)

    asked = vector(f"{instruction}; {query}")
    scores = {key: float(vector(text) @ asked) for key, text in texts.items()}
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize(
    ("query", "language", "instruction"),
    [
        (QUERY, [], "주어진 질문에 대해 관련 문서를 검색하세요"),
        ("Where do otters live?", [], "Retrieve relevant documents for the given query"),
        ("Where do otters live?", ["--language", "ko"], "주어진 질문에 대해 관련 문서를 검색하세요"),
    ],
)
def test_the_nearest_are_those_of_transformers_and_brute_force(
    query: str,
    language: list[str],
    instruction: str,
    small_model: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    want = brute_force(small_model, query, TEXTS, instruction)
    capsys.readouterr()
    arguments = ["search", str(small_model), str(corpus), query, "--top-k", "3", "--device", "cpu", *language]
    assert run([*arguments, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert {key: got[key] for key in ("model", "corpus", "num_documents", "query")} == {
        "model": str(small_model), "corpus": str(corpus), "num_documents": 4, "query": query,
    }  # fmt: skip
    assert [(each["rank"], each["id"], each["text"]) for each in got["results"]] == [
        (rank, key, TEXTS[key]) for rank, (key, _) in enumerate(want[:3], start=1)
    ]
    assert [each["score"] for each in got["results"]] == pytest.approx([score for _, score in want[:3]], abs=1e-5)
    assert run(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:3] == ["1", f"{want[0][1]:.4f}", want[0][0]] and lines[0].endswith(TEXTS[want[0][0]])


def test_questions_from_stdin_and_from_a_terminal(
    small_model: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["search", str(small_model), str(corpus), "--top-k", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUERY}\n\n복지 급여 신청\n"))
    assert run([*arguments, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert [each["query"] for each in got["queries"]] == [QUERY, "복지 급여 신청"]
    assert all(len(each["results"]) == 1 for each in got["queries"])

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"{QUERY}\n복지 급여 신청\n\nnever asked\n"))
    assert run(arguments) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and "an empty line ends" in said.err
    monkeypatch.setattr("sys.stdin", Terminal(f"{QUERY}\n"))  # Ctrl-D
    assert run(arguments) == 0


def test_a_run_means_its_best_checkpoint(
    small_model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANCHOR_HOME", str(tmp_path / "home"))
    folder = tmp_path / "output" / "kure"
    for step in (1, 2, 3):
        shutil.copytree(small_model, folder / f"checkpoint-{step}")
    lines = [{"step": step, "eval/avg/ndcg@10": score} for step, score in ((1, 0.1), (2, 0.5), (3, 0.3))]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    remember_run(folder)
    for name, want in (("kure", 2), (str(folder), 2), ("checkpoint-3", 3), (str(folder / "checkpoint-1"), 1)):
        assert run(["search", name, str(corpus), QUERY, "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["model"] == str(folder / f"checkpoint-{want}"), name
        assert ("the best of this run" in said.err) is (want == 2)


def test_every_kind_of_corpus(tmp_path: Path, corpus: Path) -> None:
    assert read_documents(str(corpus)) == TEXTS
    pairs = [{"anchor": f"q{i}", "positive": text} for i, text in enumerate([*TEXTS.values(), TEXTS["d1"], "  "])]
    want = {str(row): text for row, text in enumerate(TEXTS.values(), start=1)}  # a text twice is there once
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert read_documents(str(tmp_path / "pairs.jsonl")) == want
    table = datasets.Dataset.from_list(pairs)
    table.save_to_disk(str(tmp_path / "saved"))
    assert read_documents(str(tmp_path / "saved")) == want
    table.to_csv(str(tmp_path / "pairs.csv"))
    assert read_documents(str(tmp_path / "pairs.csv")) == want
    table.rename_columns({"anchor": "a", "positive": "b"}).to_parquet(str(tmp_path / "odd.parquet"))
    assert read_documents(str(tmp_path / "odd.parquet"), "b") == want
    table.select_columns("positive").rename_column("positive", "text").to_csv(str(tmp_path / "texts.csv"))
    assert read_documents(str(tmp_path / "texts.csv")) == want
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS.values()))
    assert read_documents(str(tmp_path / "documents.jsonl")) == want
    (tmp_path / "lists.jsonl").write_text(json.dumps({"query": "q", "positives": list(TEXTS.values())}))
    assert read_documents(str(tmp_path / "lists.jsonl")) == {f"1.{i}": text for i, text in enumerate(want.values(), 1)}


def test_what_no_document_can_be_made_of_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        b'{"text": "river"}',
        b'{"text": "\\ud800"}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b"no json",
        b'{"text": " "}',
    ]
    (tmp_path / "documents.jsonl").write_bytes(b"\n".join(lines))
    assert read_documents(str(tmp_path / "documents.jsonl")) == {"1": "river"}
    said = capsys.readouterr().err
    assert "documents.jsonl: 5 documents left out: " in said
    for reason in ("lone_surrogate 1", "not_a_string 1", "broken_utf8 1", "unreadable 1", "whitespace 1"):
        assert reason in said


def test_documents_of_several_benchmarks_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subsets of NanoBEIR count their documents alike."""
    sets = [Benchmark(f"ko/{name}", "ko", {}, {"1": f"of {name}", "2": "of both"}, {}) for name in ("NanoA", "NanoB")]
    monkeypatch.setattr("anchor_cli.data.documents.load_benchmarks", lambda _: sets)
    want = {"ko/NanoA/1": "of NanoA", "ko/NanoA/2": "of both", "ko/NanoB/1": "of NanoB"}
    assert read_documents("nanobeir:ko") == want
    monkeypatch.setattr("anchor_cli.data.documents.load_benchmarks", lambda _: sets[:1])
    assert read_documents("nanobeir:ko") == {"1": "of NanoA", "2": "of both"}


def test_what_is_refused(small_model: Path, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": "x", "b": "y"}')
    with pytest.raises(InputError, match="which column is the query"):
        read_documents(str(tmp_path / "odd.jsonl"))
    (tmp_path / "blank.jsonl").write_text('{"query": "x", "document": " "}')
    with pytest.raises(InputError, match="no document with text in it"):
        read_documents(str(tmp_path / "blank.jsonl"))
    for arguments, message in [
        ([str(small_model), str(corpus), "  "], "QUERY: empty"),
        ([str(small_model), str(tmp_path / "nowhere.jsonl"), QUERY], "no such file or folder"),
        ([str(tmp_path / "nowhere"), str(corpus), QUERY], "no such folder"),
    ]:
        assert run(["search", *arguments]) == 2
        assert message in capsys.readouterr().err
