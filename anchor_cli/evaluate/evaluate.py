"""Evaluating an embedder, or BM25, on retrieval benchmarks. The same code runs in training and in `anchor eval`.

In training every rank calls `evaluate` with an embedder whose `encode_*` shares the texts out and hands all ranks the
same vectors; what follows is arithmetic without chance, so all ranks get the same numbers. Neither torch's random state
nor the model is touched.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import InputError
from anchor_cli.base.language import HANGUL_SYLLABLES
from anchor_cli.base.metric_names import eval_key
from anchor_cli.data.benchmarks.beir import Benchmark
from anchor_cli.evaluate.metrics import DEFAULT_METRICS, FloatArray, counts, parse_metric, query_metrics, rules_of
from anchor_cli.evaluate.search import Float32Array, device_of, embedding_health, search, tie_ranks

if TYPE_CHECKING:
    from anchor_cli.evaluate.embedder import Embedder

Advance = Callable[[int], None]
_TEXTS_A_CALL = 512  # sorted by length; one step of the progress bar, and some two micro-batches for each of two ranks
_BM25_TOKEN = re.compile(rf"([{HANGUL_SYLLABLES}]+)|[^\W{HANGUL_SYLLABLES}]+")


@dataclass(frozen=True)
class BenchmarkResult:
    """One model on one benchmark."""

    benchmark: Benchmark
    query_ids: list[str]
    """The queries that count, Q of them."""
    rankings: list[list[str]]
    """Document ids for every query, best first."""
    scores: list[list[float]]
    """Their scores."""
    per_query: dict[str, FloatArray]
    """(Q,) values by metric."""
    health: dict[str, float]
    """Embedding health (`HEALTH_KEYS`); empty for BM25."""

    def rank_of_relevant(self, index: int) -> int | None:
        """Rank of the first relevant document of query `index`; None when it is not in the ranking."""
        judged = self.benchmark.qrels[self.query_ids[index]]
        return next((rank for rank, key in enumerate(self.rankings[index], start=1) if judged.get(key, 0) > 0), None)

    def means(self) -> dict[str, float]:
        """Mean over queries, by metric."""
        return {metric: float(values.mean()) for metric, values in self.per_query.items()}


def evaluate(
    embedder: Embedder, benchmarks: Sequence[Benchmark], *, metrics: Sequence[str] = DEFAULT_METRICS
) -> dict[str, Any]:
    """Metrics and embedding health of every benchmark and their mean over benchmarks, by weight.

    Returns `{"results": {"ko/NanoNQ": {"ndcg@10": …, "mrr@10": …, "alignment": …, …}}, "avg": {…}}`; `logged` names the
    values as metrics.jsonl does.

    Raises:
        InputError: an unknown metric.
        RunError: an embedding is not finite.
    """
    return summary([evaluate_one(embedder, benchmark, metrics=metrics) for benchmark in benchmarks])


def summary(results: Sequence[BenchmarkResult]) -> dict[str, Any]:
    """The document that `evaluate` returns."""
    by_name = {result.benchmark.name: result.means() | result.health for result in results}
    keys, weights = list(next(iter(by_name.values()), {})), [result.benchmark.weight for result in results]
    average = {key: float(np.average([row[key] for row in by_name.values()], weights=weights)) for key in keys}
    return {"results": by_name, "avg": average}


def logged(outcome: dict[str, Any]) -> dict[str, float]:
    """`evaluate`'s document as metrics.jsonl has it: `eval/ko/NanoNQ/ndcg@10`, …, `eval/avg/ndcg@10`, …"""
    rows = outcome["results"] | {"avg": outcome["avg"]}
    return {eval_key(name, key): value for name, row in rows.items() for key, value in row.items()}


def evaluate_one(
    embedder: Embedder,
    benchmark: Benchmark,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    depth: int = 0,
    device: str | None = None,
    advance: Advance | None = None,
) -> BenchmarkResult:
    """One benchmark: encode, search, score.

    `depth`: documents kept for every query, at least as many as the metrics need. `device`: where to search (to
    encode, the embedder has its own); by default the GPU if there is one. `advance(n)`: n more texts are done. Equal
    texts are encoded once, so that they tie.
    """
    query_ids = _counted(benchmark)
    texts = [benchmark.queries[query] for query in query_ids]
    language = benchmark.language
    queries, query_rows = encode_distinct(lambda some: embedder.encode_queries(some, language), texts, advance)
    document_ids, texts = list(benchmark.corpus), list(benchmark.corpus.values())
    documents, document_rows = encode_distinct(lambda some: embedder.encode_documents(some, language), texts, advance)
    ties = tie_ranks(document_ids, rules_of(benchmark.qrels).ties_ascending)
    depth = max(depth, *(parse_metric(metric)[1] for metric in metrics))
    indices, scores = search(
        queries[query_rows],
        documents if len(documents) == len(document_ids) else documents[document_rows],
        depth + benchmark.ignore_identical_ids,
        ties,
        device=device_of(device),
    )
    rows = [
        [(document_ids[index], float(score)) for index, score in zip(*row)] for row in zip(indices, scores, strict=True)
    ]
    rankings, kept_scores = _split(benchmark, query_ids, rows, depth)
    place = dict(zip(document_ids, document_rows))
    pairs = [
        (query_row, place[document])
        for query, query_row in zip(query_ids, query_rows)
        for document, grade in benchmark.qrels[query].items()
        if grade > 0 and document in place
    ]
    left, right = [row for row, _ in pairs], [row for _, row in pairs]
    health = embedding_health(documents, (queries[left], documents[right]))
    per_query = _score(benchmark, query_ids, rankings, metrics)
    return BenchmarkResult(benchmark, query_ids, rankings, kept_scores, per_query, health)


def _split(
    benchmark: Benchmark, query_ids: Sequence[str], rows: Sequence[Sequence[tuple[str, float]]], depth: int
) -> tuple[list[list[str]], list[list[float]]]:
    """The first `depth` ids and scores of every query, without its own id where that is to be ignored."""
    kept = [
        [(key, score) for key, score in row if not (benchmark.ignore_identical_ids and key == query)][:depth]
        for query, row in zip(query_ids, rows, strict=True)
    ]
    return [[key for key, _ in row] for row in kept], [[score for _, score in row] for row in kept]


def shares_ids(benchmark: Benchmark) -> int:
    """How many queries are in the corpus themselves: a document has the query's id and holds its text.

    ArguAna is such a set. BEIR leaves such a document out of the ranking, sentence-transformers does not.
    """
    return sum(text in benchmark.corpus.get(query, "") for query, text in benchmark.queries.items())


def scored_again(benchmark: Benchmark, kept: dict[str, Any], metrics: Sequence[str]) -> BenchmarkResult:
    """The result of rankings that were found earlier."""
    query_ids, rankings, scores, health = (kept[key] for key in ("query_ids", "rankings", "scores", "health"))
    per_query = _score(benchmark, query_ids, rankings, metrics)
    return BenchmarkResult(benchmark, query_ids, rankings, scores, per_query, health)


def _counted(benchmark: Benchmark) -> list[str]:
    rules = rules_of(benchmark.qrels)
    query_ids = [query for query in benchmark.queries if counts(benchmark.qrels[query], rules)]
    if not query_ids:
        raise InputError(f"{benchmark.source}: no query has a relevant document")
    return query_ids


def _score(
    benchmark: Benchmark, query_ids: Sequence[str], rankings: Sequence[Sequence[str]], metrics: Sequence[str]
) -> dict[str, FloatArray]:
    rules = rules_of(benchmark.qrels)
    rows = [query_metrics(best, benchmark.qrels[query], metrics, rules) for query, best in zip(query_ids, rankings)]
    return {metric: np.array([row[metric] for row in rows]) for metric in metrics}


def encode_distinct(
    encode: Callable[[Sequence[str]], Float32Array], texts: Sequence[str], advance: Advance | None
) -> tuple[Float32Array, npt.NDArray[np.int64]]:
    """Vectors of the distinct texts, longest text first in the calls, and the row of every text in them."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    distinct = list(row_of)
    order = sorted(range(len(distinct)), key=lambda row: -len(distinct[row]))
    vectors: Float32Array | None = None
    for start in range(0, len(order), _TEXTS_A_CALL):
        rows = order[start : start + _TEXTS_A_CALL]
        some = encode([distinct[row] for row in rows])
        if vectors is None:
            vectors = np.empty((len(distinct), some.shape[1]), dtype=np.float32)
        vectors[rows] = some
        if advance is not None:
            advance(len(rows))
    assert vectors is not None, "a benchmark has at least one query and one document"
    return vectors, np.array([row_of[text] for text in texts], dtype=np.int64)


def evaluate_bm25(
    benchmark: Benchmark,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    depth: int = 0,
    advance: Advance | None = None,
) -> BenchmarkResult:
    """BM25 (Lucene's formula, k1 = 1.5, b = 0.75; `bm25s`) on the same queries: what a score is worth.

    Words are lower-cased runs of letters and digits; runs of Hangul become pairs of syllables, as in Lucene's
    CJKAnalyzer, because Korean words carry their particles. No stemming, no stop words. A document that shares no word
    with the query is not found.

    Raises:
        InputError: `bm25s` is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError(
            "--baseline bm25: the package bm25s is not installed", "pip install 'anchor-cli[bm25]'"
        ) from None
    query_ids, document_ids = _counted(benchmark), list(benchmark.corpus)
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([bm25_tokens(text) for text in benchmark.corpus.values()], show_progress=False)
    ties = tie_ranks(document_ids, rules_of(benchmark.qrels).ties_ascending)
    depth = max(depth, *(parse_metric(metric)[1] for metric in metrics))
    rows = []
    for query in query_ids:
        tokens = bm25_tokens(benchmark.queries[query])
        values = index.get_scores(tokens) if tokens else np.zeros(len(document_ids), dtype=np.float32)
        best = np.lexsort((ties, -values))[: depth + benchmark.ignore_identical_ids]
        rows.append([(document_ids[row], float(values[row])) for row in best if values[row] > 0])
        if advance is not None:
            advance(1)
    rankings, scores = _split(benchmark, query_ids, rows, depth)
    return BenchmarkResult(benchmark, query_ids, rankings, scores, _score(benchmark, query_ids, rankings, metrics), {})


def bm25_tokens(text: str) -> list[str]:
    """`"AI 교육은"` is `["ai", "교육", "육은"]`."""
    tokens: list[str] = []
    for match in _BM25_TOKEN.finditer(unicodedata.normalize("NFC", text).lower()):
        word, hangul = match[0], match[1]
        tokens += [word[at : at + 2] for at in range(len(word) - 1)] if hangul and len(word) > 2 else [word]
    return tokens
