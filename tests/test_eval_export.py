"""A checkpoint by `anchor eval` and its export by sentence-transformers' own evaluators: the same figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_benchmarks import write_nano

from anchor_cli.base.contract import write_contract
from anchor_cli.cli import run
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.text import load_tokenizer
from anchor_cli.evaluate.embedder import contract_of

sentence_transformers = pytest.importorskip("sentence_transformers")
evaluation = pytest.importorskip("sentence_transformers.evaluation")


@pytest.fixture(scope="module")
def models(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with a contract of its own (length 64, so that documents are cut), and its export."""
    folder = tmp_path_factory.mktemp("export")
    checkpoint = shutil.copytree(small_model, folder / "step")
    contract = contract_of(checkpoint, load_tokenizer(checkpoint))
    write_contract(checkpoint, contract.model_copy(update={"max_seq_length": 64}))
    assert run(["export", str(checkpoint), "--out", str(folder / "export")]) == 0
    return checkpoint, folder / "export"


def ours(model: Path, data: Path | str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, float]]:
    capsys.readouterr()
    assert run(["eval", str(model), "--data", str(data), "--json", "--device", "cpu"]) == 0
    results: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out)["results"]
    return results


def sample(source: Path, folder: Path, num_queries: int, num_documents: int) -> Path:
    """The first queries of a BEIR folder, their documents, and others up to a number."""
    [whole] = load_benchmarks([str(source)])
    queries = list(whole.queries)[:num_queries]
    judged = {document for query in queries for document in whole.qrels[query]}
    others = [document for document in whole.corpus if document not in judged]
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (
        ("corpus", {d: whole.corpus[d] for d in [*judged, *others[: max(0, num_documents - len(judged))]]}),
        ("queries", {q: whole.queries[q] for q in queries}),
    ):
        rows = [json.dumps({"_id": key, "text": text}, ensure_ascii=False) for key, text in texts.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    rows = [f"{query}\t{document}\t{grade}" for query in queries for document, grade in whole.qrels[query].items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("num_queries", "num_documents"), [(40, 150), pytest.param(200, 3_000, marks=pytest.mark.slow)]
)
def test_both_beir_folders(
    num_queries: int,
    num_documents: int,
    models: tuple[Path, Path],
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, export = models
    model = sentence_transformers.SentenceTransformer(str(export), device="cpu")
    for name in ("welfare-ko", "vaswani"):
        data = sample(shared_data / "beir" / name, tmp_path / name, num_queries, num_documents)
        [benchmark] = load_benchmarks([str(data)])
        relevant = {query: set(judged) for query, judged in benchmark.qrels.items()}
        evaluator = evaluation.InformationRetrievalEvaluator(
            benchmark.queries, benchmark.corpus, relevant, query_prompt_name=f"query_{benchmark.language}"
        )
        theirs = evaluator(model)
        for ours_of in (checkpoint, export):
            got = ours(ours_of, data, capsys)[benchmark.name]
            assert got["ndcg@10"] > 0
            assert got["ndcg@10"] == pytest.approx(theirs["cosine_ndcg@10"], abs=1e-6)
            assert got["mrr@10"] == pytest.approx(theirs["cosine_mrr@10"], abs=1e-6)


def test_a_nanobeir_shaped_folder(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    checkpoint, export = models
    data = write_nano(tmp_path / "NanoBEIR-ko", parquet=True, card=True)
    evaluator = evaluation.NanoBEIREvaluator(["msmarco", "nq"], dataset_id=str(data))
    theirs = evaluator(sentence_transformers.SentenceTransformer(str(export), device="cpu"))
    got = ours(checkpoint, data, capsys)
    for subset in ("NanoMSMARCO", "NanoNQ"):
        assert got[f"ko/{subset}"]["ndcg@10"] == pytest.approx(theirs[f"{subset}_cosine_ndcg@10"], abs=1e-6)
        assert got[f"ko/{subset}"]["mrr@10"] == pytest.approx(theirs[f"{subset}_cosine_mrr@10"], abs=1e-6)
