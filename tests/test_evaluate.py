"""The whole way from texts to metrics against sentence-transformers and trec_eval; BM25, comparison, files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anchor_cli.data.benchmarks.beir import Benchmark
from anchor_cli.evaluate.compare import ModelResult, collapsed, document, labels, show
from anchor_cli.evaluate.evaluate import bm25_tokens, evaluate, evaluate_bm25, evaluate_one, logged, shares_ids
from anchor_cli.evaluate.files import cut, trec_run, worst_lines, worst_queries, write_files

METRICS = ["ndcg@10", "mrr@10", "recall@10", "recall@100", "map@10"]


class Lookup:
    """An embedder that knows the vector of every text."""

    name = "lookup"
    dimension = 6

    def __init__(self, vectors: dict[str, np.ndarray]) -> None:
        self.vectors = vectors
        self.asked: Counter[str] = Counter()

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        self.asked.update(texts)
        return np.stack([self.vectors[text] for text in texts])

    def encode_queries(self, texts: Sequence[str], language: str) -> np.ndarray:
        assert language == "ko"
        return self._encode(texts)

    encode_documents = encode_queries


def exact_vectors(num: int, random: np.random.Generator) -> np.ndarray:
    """(num, 6) different vectors with four of six components +-1/2.

    Their length is 1 and their products are multiples of 1/4: float32 holds both exactly, in whatever order a processor
    adds, so equal vectors tie on every processor and in every library. Products of real numbers promise no such thing.
    """
    signs = np.array(list(itertools.product([-0.5, 0.0, 0.5], repeat=6)), dtype=np.float32)
    return random.permutation(signs[(signs != 0).sum(1) == 4])[:num]


def a_benchmark(*, grades: Sequence[int], seed: int = 0, ties: bool = True) -> tuple[Benchmark, Lookup]:
    """120 documents, 30 queries, some judged documents missing.

    With `ties` the documents have 40 different vectors, and all numbers are exact; else no two scores are near.
    """
    random = np.random.default_rng(seed)
    pool = exact_vectors(40, random)
    corpus = {f"d{i}": f"문서 {i}" for i in range(118)} | {"d118": "문서 1", "d119": "문서 1"}  # equal texts too
    queries = {f"q{i}": f"질문 {i}" for i in range(30)}
    vectors = {
        text: pool[random.integers(40)] * np.float32(2.0 ** random.integers(-2, 3))
        for text in sorted(set(corpus.values()))
    }
    vectors |= dict(zip(queries.values(), exact_vectors(30, random)))
    if not ties:
        del corpus["d118"], corpus["d119"]
        vectors = {text: random.standard_normal(6).astype(np.float32) for text in vectors}
    ids = [*corpus, "missing"]
    qrels = {
        query: {str(d): int(random.choice(grades)) for d in random.choice(ids, random.integers(1, 8), replace=False)}
        for query in queries
    }
    return Benchmark("ko/toy", "ko", queries, corpus, qrels, "toy"), Lookup(vectors)


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("chunk", [7, 50000])
def test_evaluate_is_sentence_transformers_evaluator(chunk: int, ties: bool) -> None:
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    import torch
    from sentence_transformers.util import cos_sim

    benchmark, embedder = a_benchmark(grades=[0, 1, 1], ties=ties)

    class Model:
        def encode_query(self, texts: Sequence[str], **_: object) -> torch.Tensor:
            return torch.from_numpy(embedder._encode(texts))

        encode_document = encode_query

    relevant = {q: {d for d, grade in judged.items() if grade > 0} for q, judged in benchmark.qrels.items()}
    theirs = evaluation.InformationRetrievalEvaluator(
        benchmark.queries,
        benchmark.corpus,
        relevant,
        corpus_chunk_size=chunk,
        precision_recall_at_k=[10, 100],
        map_at_k=[10],
        score_functions={"cosine": cos_sim},
    )
    want = theirs.compute_all_metrics(Model())["cosine"]
    got = evaluate(embedder, [benchmark], metrics=METRICS)["results"]["ko/toy"]
    for metric in METRICS:
        kind, k = metric.split("@")
        assert got[metric] == pytest.approx(want[f"{kind}@k"][int(k)], abs=1e-9), metric


def test_evaluate_is_trec_eval_for_graded_judgements(tmp_path: Path) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    benchmark, embedder = a_benchmark(grades=[0, 1, 2, 3])
    result = evaluate_one(embedder, benchmark, metrics=METRICS, depth=100)
    run: dict[str, dict[str, float]] = {}
    for line in trec_run(result, "toy").splitlines():
        query, _, key, _, score, _ = line.split(" ")
        run.setdefault(query, {})[key] = float(score)
    measures = {"ndcg_cut.10", "recall.10,100", "map_cut.10"}
    theirs = pytrec_eval.RelevanceEvaluator(benchmark.qrels, measures).evaluate(run)
    assert len(theirs) == len(result.query_ids) == 30
    for metric, name in [("ndcg@10", "ndcg_cut_10"), ("recall@10", "recall_10"), ("map@10", "map_cut_10")]:
        want = [theirs[query][name] for query in result.query_ids]
        np.testing.assert_allclose(result.per_query[metric], want, atol=1e-9)


def an_argument_set() -> tuple[Benchmark, Lookup]:
    """As ArguAna: every query is a document of the corpus, under its id; the relevant one is its counter-argument."""
    random = np.random.default_rng(1)
    corpus = {f"a{i}": f"주장 {i}" for i in range(30)}
    corpus |= {f"b{i}": f"반론 {i}" for i in range(30)}
    queries = {f"a{i}": f"주장 {i}" for i in range(30)}
    vectors = {text: random.standard_normal(6).astype(np.float32) for text in corpus.values()}
    for i in range(30):
        vectors[f"반론 {i}"] += vectors[f"주장 {i}"]
    return Benchmark("ko/arguments", "ko", queries, corpus, {f"a{i}": {f"b{i}": 1} for i in range(30)}), Lookup(vectors)


def test_a_document_that_is_the_query_is_left_out_as_beir_does() -> None:
    benchmark, embedder = an_argument_set()
    plain = evaluate_one(embedder, benchmark, depth=100)
    got = evaluate_one(embedder, replace(benchmark, ignore_identical_ids=True), depth=100)
    assert all(ranking[0] == query for query, ranking in zip(plain.query_ids, plain.rankings))  # the query itself
    assert shares_ids(benchmark) == 30
    for index, query in enumerate(got.query_ids):  # BEIR: results[query].pop(query), then the metrics
        want = [key for key in plain.rankings[index] if key != query]
        assert got.rankings[index] == want and len(want) == len(got.scores[index]) == 59
        rank = want.index(f"b{query[1:]}") + 1
        assert got.per_query["ndcg@10"][index] == pytest.approx(1 / math.log2(rank + 1) if rank <= 10 else 0)
    assert got.means()["ndcg@10"] > plain.means()["ndcg@10"]
    # the cut-off counts what is left: rank 11 with the query is rank 10 without it
    ten = evaluate_one(embedder, replace(benchmark, ignore_identical_ids=True))
    assert all(len(ranking) == 10 for ranking in ten.rankings)
    model = ModelResult("m", [ten])
    assert document(model, ["ndcg@10"])["ignore_identical_ids"] == ["ko/arguments"]


def test_bm25_leaves_the_query_out_too() -> None:
    pytest.importorskip("bm25s")
    benchmark, _ = an_argument_set()
    plain = evaluate_bm25(benchmark)
    got = evaluate_bm25(replace(benchmark, ignore_identical_ids=True))
    assert all(query in ranking for query, ranking in zip(plain.query_ids, plain.rankings))
    assert not any(query in ranking for query, ranking in zip(got.query_ids, got.rankings))


def test_equal_ids_of_other_texts_are_no_query() -> None:
    queries, corpus = {"1": "질문", "2": "문서 하나"}, {"1": "문서 하나", "2": "문서 둘", "3": "질문"}
    assert shares_ids(Benchmark("ko/x", "ko", queries, corpus, {"1": {"3": 1}})) == 0
    assert shares_ids(Benchmark("ko/x", "ko", queries, corpus | {"1": "제목 질문"}, {"1": {"3": 1}})) == 1


def test_texts_are_encoded_once_and_longest_first() -> None:
    benchmark, embedder = a_benchmark(grades=[1])
    evaluate(embedder, [benchmark])
    assert set(embedder.asked.values()) == {1} and len(embedder.asked) == 118 + 30
    lengths = [len(text) for text in embedder.asked if text.startswith("문서")]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("device", "want"), [("cpu", "cpu"), (None, "cuda")])
def test_it_searches_where_it_is_told(device: str | None, want: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from anchor_cli.evaluate import evaluate as module

    asked: list[str] = []

    def search(*arguments: Any, device: str) -> Any:
        asked.append(device)
        return vector_search(*arguments, device="cpu")

    vector_search = module.search
    monkeypatch.setattr(module, "search", search)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    benchmark, embedder = a_benchmark(grades=[1])
    evaluate_one(embedder, benchmark, device=device)
    assert asked == [want]


def test_names_of_what_is_logged() -> None:
    first, embedder = a_benchmark(grades=[1])
    second = Benchmark("ko/other", "ko", dict(list(first.queries.items())[:5]), first.corpus, first.qrels)
    outcome = evaluate(embedder, [first, second])
    got = logged(outcome)
    health = {"alignment", "uniformity", "mean_cosine", "near_identical"}
    names = {f"{name}/{key}" for name in ("ko/toy", "ko/other", "avg") for key in {"ndcg@10", "mrr@10"} | health}
    assert set(got) == {f"eval/{name}" for name in names}
    want = (got["eval/ko/toy/ndcg@10"] + got["eval/ko/other/ndcg@10"]) / 2  # benchmarks count alike, not queries
    assert got["eval/avg/ndcg@10"] == pytest.approx(want)


def test_alignment_is_over_the_relevant_documents_that_exist() -> None:
    benchmark, embedder = a_benchmark(grades=[0, 1])

    def unit(text: str) -> np.ndarray:
        vector = embedder.vectors[text].astype(np.float64)
        return vector / np.linalg.norm(vector)

    distances = [
        ((unit(benchmark.queries[query]) - unit(benchmark.corpus[key])) ** 2).sum()
        for query, judged in benchmark.qrels.items()
        for key, grade in judged.items()
        if grade > 0 and key in benchmark.corpus
    ]
    got = evaluate(embedder, [benchmark])["results"]["ko/toy"]
    assert got["alignment"] == pytest.approx(np.mean(distances))


def test_a_real_model_twice_gives_the_same_and_leaves_the_random_state(small_model: Path) -> None:
    import torch

    from anchor_cli.evaluate.embedder import load_embedder

    benchmark, _ = a_benchmark(grades=[1])
    benchmark.corpus["blank"] = "  "  # kept by sentence-transformers, so it must be encodable
    embedder = load_embedder(small_model, device="cpu")
    state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, second = evaluate(embedder, [benchmark]), evaluate(embedder, [benchmark])
    assert first == second
    assert torch.equal(state[0], torch.random.get_rng_state())
    np.testing.assert_array_equal(state[1], np.random.get_state()[1])


def naive_bm25(query: list[str], documents: list[list[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document_ in documents:
        score = 0.0
        for word in query:
            frequency = document_.count(word)
            holding = sum(word in other for other in documents)
            rarity = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            length = 1 - b + b * len(document_) / average
            score += rarity * frequency / (frequency + k1 * length)
        scores.append(score)
    return scores


def test_bm25_is_its_formula() -> None:
    pytest.importorskip("bm25s")
    corpus = {
        "a": "수달은 강에 산다. 수달은 물고기를 먹는다",
        "b": "Otters live in rivers; rivers are cold",
        "c": "강에는 물고기가 산다",
        "d": "nothing shared",
    }
    queries = {"1": "수달은 어디에 사나요", "2": "Where do OTTERS live in rivers?", "3": "!!!", "4": "zebra"}
    qrels = {"1": {"a": 1}, "2": {"b": 1}, "3": {"d": 1}, "4": {"d": 1}}
    got = evaluate_bm25(Benchmark("ko/x", "ko", queries, corpus, qrels), metrics=["ndcg@10"])
    documents = [bm25_tokens(text) for text in corpus.values()]
    for index, query in enumerate(queries.values()):
        want = {key: s for key, s in zip(corpus, naive_bm25(bm25_tokens(query), documents)) if s > 0}
        assert dict(zip(got.rankings[index], got.scores[index])) == pytest.approx(want, rel=1e-5)
    assert got.per_query["ndcg@10"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert got.health == {}


def test_bm25_tokens() -> None:
    assert bm25_tokens("AI교육은 3월 강") == ["ai", "교육", "육은", "3", "월", "강"]
    assert bm25_tokens("\u1112\u1161\u11ab\u1100\u116e\u11a8") == ["한국"]  # decomposed Hangul is the same word


def results() -> list[ModelResult]:
    benchmark, embedder = a_benchmark(grades=[0, 1, 1])
    noisy = Lookup({text: vector + 0.5 * (len(text) % 3) for text, vector in embedder.vectors.items()})
    return [
        ModelResult("runs/a/checkpoint-1", [evaluate_one(embedder, benchmark, metrics=METRICS, depth=100)]),
        ModelResult("runs/b/checkpoint-1", [evaluate_one(noisy, benchmark, metrics=METRICS, depth=100)]),
    ]


def test_the_difference_is_paired_by_query() -> None:
    first, second = results()
    got = second.difference(first, "ndcg@10")
    gaps = second.results[0].per_query["ndcg@10"] - first.results[0].per_query["ndcg@10"]
    assert got.mean == pytest.approx(gaps.mean()) == pytest.approx(second.mean("ndcg@10") - first.mean("ndcg@10"))
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * gaps.std() / math.sqrt(len(gaps)), rel=0.15)
    assert first.difference(first, "ndcg@10") == (0.0, 0.0, 0.0)


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    both = results()
    show(both, ["ndcg@10", "mrr@10"], on_stderr=False)
    shown = capsys.readouterr()
    benchmark, embedder = a_benchmark(grades=[1])
    distinct = sorted(set(benchmark.corpus.values()))
    directions = [tuple(np.sign(embedder.vectors[text])) for text in distinct]
    alike = sum(count for count in Counter(directions).values() if count > 1) / len(distinct)
    assert f"warning: runs/a/checkpoint-1: ko/toy: {alike:.0%} of the documents" in shown.err
    assert "a/checkpoint-1" in shown.out and "b/checkpoint-1" in shown.out
    for metric in ("ndcg@10", "mrr@10"):
        gap = both[1].difference(both[0], metric)
        assert f"{gap.mean:+.4f}" in shown.out and f"{gap.low:+.4f} … {gap.high:+.4f}" in shown.out
        assert f"{both[0].mean(metric):.4f}" in shown.out
    assert "uncertain by about ±0.05" in shown.out and "near-identical" in shown.out
    show(both[:1], ["ndcg@10"], on_stderr=True)
    shown = capsys.readouterr()
    assert not shown.out and "± 95 % ndcg@10" in shown.err and "120" in shown.err


def test_the_best_is_bold() -> None:
    from rich.console import Console

    from anchor_cli.evaluate.compare import _comparison_table

    out = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    both = results()
    out.print(_comparison_table(both, "ndcg@10"))
    values = [f"{model.mean('ndcg@10'):.4f}" for model in both]
    written = out.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(rf"\x1b\[1m *{max(values)}", written) and not re.search(rf"\x1b\[1m *{min(values)}", written)


def test_the_document_is_the_promised_one() -> None:
    first, second = results()
    got = document(first, ["ndcg@10", "mrr@10"])
    assert list(got) == ["model", "results", "avg"]
    assert list(got["results"]["ko/toy"]) == list(got["avg"]) == ["ndcg@10", "mrr@10"]
    more = document(second, ["ndcg@10"], first)
    assert document(second, ["ndcg@10"]).items() <= more.items()
    more = {key: value for key, value in more.items() if key not in got}
    assert set(more) == {"num_queries", "num_documents", "interval_95", "health", "difference_to_first"}
    json.dumps(more)


def test_labels_are_the_shortest_that_differ() -> None:
    assert labels(["/x/a/checkpoint-1", "/x/a/checkpoint-2"]) == ["checkpoint-1", "checkpoint-2"]
    assert labels(["/x/a/checkpoint-1", "/x/b/checkpoint-1/"]) == ["a/checkpoint-1", "b/checkpoint-1"]
    assert labels(["m"]) == ["m"]


def test_a_collapse_is_said() -> None:
    benchmark, embedder = a_benchmark(grades=[1])
    same = Lookup(dict.fromkeys(embedder.vectors, np.ones(6, dtype=np.float32)))
    model = ModelResult("m", [evaluate_one(same, benchmark)])
    assert collapsed([model]) == [
        "m: ko/toy: 100% of the documents have a near-identical other one: the embeddings have collapsed"
    ]


def test_worst_queries_and_files(tmp_path: Path) -> None:
    both = results()
    worst = worst_queries(both[0], 5, "ndcg@10")
    values = both[0].results[0].per_query["ndcg@10"]
    assert [row["ndcg@10"] for row in worst] == sorted(values)[:5]
    assert worst[0]["query"].startswith("질문") and len(worst[0]["found"]) == 3
    text = "\n".join(worst_lines(worst, "ndcg@10"))
    assert worst[0]["query_id"] in text and "wanted" in text and "found" in text
    write_files(tmp_path / "out", both, ["ndcg@10"])
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert files == [
        *("a-checkpoint-1/ko-toy.run", "a-checkpoint-1/queries.csv"),
        *("b-checkpoint-1/ko-toy.run", "b-checkpoint-1/queries.csv"),
        "results.json",
    ]
    with open(tmp_path / "out" / "a-checkpoint-1" / "queries.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(values)
    assert [float(row["ndcg@10"]) for row in rows] == pytest.approx(values.tolist(), abs=1e-6)


def test_korean_text_is_cut_by_its_width() -> None:
    assert cut("한국어 문장", 6) == "한국…"
    assert cut("한국어", 6) == "한국어"
    assert cut("a\n b", 10) == "a b"


RANK = """
import json, sys
import torch.distributed as dist
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.evaluate.evaluate import evaluate
rank, world, (meeting, model, data) = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
embedder = load_embedder(model, device="cpu", batch_tokens=100)
alone = evaluate(embedder, load_benchmarks([data]))
embedder._group = dist.group.WORLD
print("RESULT" + json.dumps([evaluate(embedder, load_benchmarks([data])), alone]))
"""


@pytest.mark.slow
def test_every_rank_gets_the_same_numbers(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    (folder / "qrels").mkdir(parents=True)
    texts = [f"문서 {i} " + "수달 강 바다 sea river " * (i % 7) for i in range(41)]
    for name, rows in (("corpus", texts), ("queries", texts[5:8])):
        lines = [json.dumps({"_id": f"{name[0]}{i}", "text": text}) for i, text in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text("q0\tc5\t1\nq1\tc9\t2\nq2\tc7\t1\n", encoding="utf-8")
    command = [sys.executable, "-c", RANK]
    rest = ["3", str(tmp_path / "meeting"), str(small_model), str(folder)]
    ranks = [subprocess.Popen([*command, str(rank), *rest], stdout=subprocess.PIPE, text=True) for rank in range(3)]
    said = [json.loads(process.communicate(timeout=540)[0].split("RESULT")[1]) for process in ranks]
    assert said[0] == said[1] == said[2]
    shared, alone = said[0]
    for key, want in alone["avg"].items():
        assert shared["avg"][key] == pytest.approx(want, abs=1e-5), key
