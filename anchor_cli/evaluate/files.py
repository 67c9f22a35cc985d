"""What was found: the queries that went worst, TREC run files and a per-query CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anchor_cli.base.files import words_for_disk_errors, write_json, write_text_atomic
from anchor_cli.evaluate.compare import ModelResult, details, document, labels
from anchor_cli.evaluate.evaluate import BenchmarkResult


def worst_queries(model: ModelResult, number: int, metric: str) -> list[dict[str, Any]]:
    """The queries with the lowest `metric`, those with the relevant document furthest away first among equals."""
    rows = []
    for result in model.results:
        for index, query in enumerate(result.query_ids):
            found = result.found[index]
            wanted = {key: grade for key, grade in result.benchmark.qrels[query].items() if grade > 0}
            rank = next((at for at, key in enumerate(found, start=1) if key in wanted), None)
            row = {
                "benchmark": result.benchmark.name,
                "query_id": query,
                "query": result.benchmark.queries[query],
                metric: float(result.per_query[metric][index]),
                "rank": rank,
                "searched": len(found),
                "wanted": [_text(result, key) for key in wanted],
                "found": [_text(result, key) for key in found[:3]],
            }
            rows.append((row[metric], -(rank or len(found) + 1), result.benchmark.name, query, row))
    return [row for *_, row in sorted(rows, key=lambda each: each[:4])[:number]]


def _text(result: BenchmarkResult, key: str) -> dict[str, str | None]:
    return {"id": key, "text": result.benchmark.corpus.get(key)}


def worst_lines(rows: Sequence[dict[str, Any]], metric: str, width: int = 100) -> list[str]:
    """`worst_queries` for a person, texts cut to `width` columns (a Hangul letter is two wide)."""
    lines = []
    for row in rows:
        place = f"rank {row['rank']}" if row["rank"] else f"not among the first {row['searched']}"
        lines.append(f"{row['benchmark']}  {row['query_id']}  {metric} {row[metric]:.4f}, relevant document {place}")
        lines.append(f"  query   {cut(row['query'], width)}")
        for wanted in row["wanted"][:1]:
            lines.append(f"  wanted  {cut(wanted['text'] or '(not in the corpus)', width)}")
        lines += [f"  found   {cut(found['text'], width)}" for found in row["found"]]
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
    with words_for_disk_errors(out):
        return _write_files(out, models, metrics)


def _write_files(out: Path, models: Sequence[ModelResult], metrics: Sequence[str]) -> list[Path]:
    written = []
    for label, model in zip(labels([model.model for model in models]), models):
        folder = out / file_name(label)
        for result in model.results:
            written.append(folder / f"{file_name(result.benchmark.name)}.run")
            write_text_atomic(written[-1], trec_run(result, file_name(label)))
        written.append(folder / "queries.csv")
        write_text_atomic(written[-1], queries_csv(model, metrics))
    written.append(out / "results.json")
    write_json(written[-1], [document(model, metrics) | details(model, models[0], metrics) for model in models])
    return written


def file_name(text: str) -> str:
    """`ko/NanoNQ` is `ko-NanoNQ`."""
    return re.sub(r"[^\w.@-]+", "-", text).strip("-") or "model"


def trec_run(result: BenchmarkResult, tag: str) -> str:
    """`query Q0 document rank score tag` lines; blanks in ids, which the format cannot hold, become `_`."""
    lines = []
    for query, found, scores in zip(result.query_ids, result.found, result.scores):
        for rank, (key, score) in enumerate(zip(found, scores), start=1):
            lines.append(f"{_field(query)} Q0 {_field(key)} {rank} {score:.10f} {tag}\n")
    return "".join(lines)


def _field(text: str) -> str:
    return re.sub(r"\s", "_", text)


def queries_csv(model: ModelResult, metrics: Sequence[str]) -> str:
    """A line for every query: its metrics, the rank of its first relevant document, and what came first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["benchmark", "query_id", "query", *metrics, "num_relevant", "rank", "first_id", "first_text"])
    for result in model.results:
        for index, query in enumerate(result.query_ids):
            judged, found = result.benchmark.qrels[query], result.found[index]
            rank = next((at for at, key in enumerate(found, start=1) if judged.get(key, 0) > 0), "")
            first = [found[0], cut(result.benchmark.corpus[found[0]], 200)] if found else ["", ""]
            values = [f"{result.per_query[metric][index]:.6f}" for metric in metrics]
            num_relevant = sum(grade > 0 for grade in judged.values())
            row = [result.benchmark.name, query, result.benchmark.queries[query], *values, num_relevant, rank, *first]
            table.writerow(row)
    return text.getvalue()
