"""Results for a reader: the queries that went worst, TREC run files and a per-query CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor_cli.base.files import words_for_disk_errors, write_json, write_text_atomic
from anchor_cli.evaluate.compare import ModelResult, document, labels
from anchor_cli.evaluate.evaluate import BenchmarkResult


def worst_queries(model: ModelResult, number: int, metric: str) -> list[dict[str, Any]]:
    """The queries with the lowest `metric`, those with the relevant document furthest away first among equals."""
    rows = []
    for result in model.results:
        texts = result.benchmark.corpus
        for index, query in enumerate(result.query_ids):
            ranking, rank = result.rankings[index], result.rank_of_relevant(index)
            wanted = [key for key, grade in result.benchmark.qrels[query].items() if grade > 0]
            row = {
                "benchmark": result.benchmark.name,
                "query_id": query,
                "query": result.benchmark.queries[query],
                metric: float(result.per_query[metric][index]),
                "rank": rank,
                "searched": len(ranking),
                "wanted": [{"id": key, "text": texts.get(key)} for key in wanted],
                "found": [{"id": key, "text": texts[key]} for key in ranking[:3]],
            }
            rows.append((row[metric], -(rank or len(ranking) + 1), result.benchmark.name, query, row))
    return [row for *_, row in sorted(rows, key=lambda each: each[:4])[:number]]


def worst_lines(rows: Sequence[dict[str, Any]], metric: str, width: int = 100) -> list[str]:
    """`worst_queries` for a person, texts cut to `width` columns (a Hangul letter is two wide)."""
    lines = []
    for row in rows:
        place = f"rank {row['rank']}" if row["rank"] else f"not among the first {row['searched']}"
        lines.append(f"{row['benchmark']}  {row['query_id']}  {metric} {row[metric]:.4f}, relevant document {place}")
        lines.append(f"  query   {cut(row['query'], width)}")
        lines += [f"  wanted  {cut(wanted['text'] or '(not in the corpus)', width)}" for wanted in row["wanted"][:1]]
        lines += [f"  found   {cut(document['text'], width)}" for document in row["found"]]
    return lines


def cut(text: str, width: int) -> str:
    """`text` on one line, at most `width` terminal columns wide."""
    from rich.cells import cell_len, set_cell_size

    text = " ".join(text.split())
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def write_files(out: Path, models: Sequence[ModelResult], metrics: Sequence[str]) -> list[Path]:
    """`{model}/{benchmark}.run` (TREC), `{model}/queries.csv` and `results.json` below `out`.

    A file of the same name is replaced; those of other models or benchmarks stay.

    Raises:
        RunError: the disk is full. InputError: nothing may be written there.
    """
    texts: dict[Path, str] = {}
    for label, model in zip(labels([model.model for model in models]), models):
        folder = out / file_name(label)
        for result in model.results:
            texts[folder / f"{file_name(result.benchmark.name)}.run"] = trec_run(result, file_name(label))
        texts[folder / "queries.csv"] = queries_csv(model, metrics)
    with words_for_disk_errors(out):
        for path, text in texts.items():
            write_text_atomic(path, text)
        write_json(out / "results.json", [document(model, metrics, models[0]) for model in models])
    return [*texts, out / "results.json"]


def file_name(text: str) -> str:
    """`ko/NanoNQ` is `ko-NanoNQ`."""
    return re.sub(r"[^\w.@-]+", "-", text).strip("-") or "model"


def trec_run(result: BenchmarkResult, tag: str) -> str:
    """`query Q0 document rank score tag` lines; blanks in ids, which the format cannot hold, become `_`."""

    def field(text: str) -> str:
        return re.sub(r"\s", "_", text)

    return "".join(
        f"{field(query)} Q0 {field(key)} {rank} {score:.10f} {tag}\n"
        for query, ranking, scores in zip(result.query_ids, result.rankings, result.scores)
        for rank, (key, score) in enumerate(zip(ranking, scores), start=1)
    )


def queries_csv(model: ModelResult, metrics: Sequence[str]) -> str:
    """A line for every query: its metrics, the rank of its first relevant document, and what came first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["benchmark", "query_id", "query", *metrics, "num_relevant", "rank", "first_id", "first_text"])
    for result in model.results:
        benchmark = result.benchmark
        for index, query in enumerate(result.query_ids):
            ranking = result.rankings[index]
            first = [ranking[0], cut(benchmark.corpus[ranking[0]], 200)] if ranking else ["", ""]
            values = [f"{result.per_query[metric][index]:.6f}" for metric in metrics]
            num_relevant = sum(grade > 0 for grade in benchmark.qrels[query].values())
            rank = result.rank_of_relevant(index) or ""
            table.writerow([benchmark.name, query, benchmark.queries[query], *values, num_relevant, rank, *first])
    return text.getvalue()
