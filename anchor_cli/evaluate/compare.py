"""Several models on the same benchmarks: the JSON document, tables, paired differences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchor_cli.base.console import console, warn
from anchor_cli.base.metric_names import ALIGNMENT, HEALTH_KEYS, MEAN_COSINE, NEAR_IDENTICAL, UNIFORMITY, collapse
from anchor_cli.evaluate.evaluate import BenchmarkResult, summary
from anchor_cli.evaluate.metrics import Interval, bootstrap

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_HEALTH_TITLES = {
    ALIGNMENT: "alignment",
    UNIFORMITY: "uniformity",
    MEAN_COSINE: "mean cosine",
    NEAR_IDENTICAL: "near-identical",
}


@dataclass(frozen=True)
class ModelResult:
    """One model on all benchmarks."""

    model: str
    """As given: a path, a Hub id, or `bm25`."""
    results: list[BenchmarkResult]

    def mean(self, metric: str) -> float:
        """Mean of a metric over benchmarks."""
        return float(summary(self.results)["avg"][metric])

    def uncertainty(self, metric: str) -> Interval:
        """95 % interval of the mean."""
        return bootstrap([result.per_query[metric] for result in self.results], self.weights())

    def difference(self, first: ModelResult, metric: str) -> Interval:
        """This model minus `first`, paired by query, with its 95 % interval."""
        pairs = zip(self.results, first.results)
        gaps = [ours.per_query[metric] - theirs.per_query[metric] for ours, theirs in pairs]
        return bootstrap(gaps, self.weights())

    def weights(self) -> list[float]:
        """Of the benchmarks, in the average."""
        return [result.benchmark.weight for result in self.results]

    def by_language(self) -> dict[str, ModelResult]:
        """The results of each language, where there are several; else nothing."""
        languages = list(dict.fromkeys(result.benchmark.language for result in self.results))
        return {
            language: ModelResult(self.model, [one for one in self.results if one.benchmark.language == language])
            for language in languages
            if len(languages) > 1
        }


def document(
    model: ModelResult, metrics: Sequence[str], details_against: ModelResult | None = None, suite: str | None = None
) -> dict[str, Any]:
    """`{"model": …, "results": {"ko/NanoNQ": {"ndcg@10": …}}, "avg": {…}}`.

    With `suite` also its name, the averages of languages, and where each set is from, at which revision.

    With `details_against` also numbers of queries, intervals, embedding health, and differences to that model.
    """
    everything = summary(model.results)
    rows = everything["results"]
    plain: dict[str, Any] = {
        "model": model.model,
        "results": {name: {metric: row[metric] for metric in metrics} for name, row in rows.items()},
        "avg": {metric: everything["avg"][metric] for metric in metrics},
    }
    if ignoring := [result.benchmark.name for result in model.results if result.benchmark.ignore_identical_ids]:
        plain["ignore_identical_ids"] = ignoring
    if suite is not None:
        plain["suite"] = suite
        if languages := model.by_language():
            averages = {name: {metric: one.mean(metric) for metric in metrics} for name, one in languages.items()}
            plain["avg_by_language"] = averages
        plain["sources"] = {result.benchmark.name: result.benchmark.source for result in model.results}
    if details_against is None:
        return plain
    plain["num_queries"] = {result.benchmark.name: len(result.query_ids) for result in model.results}
    plain["num_documents"] = {result.benchmark.name: len(result.benchmark.corpus) for result in model.results}
    plain["interval_95"] = {metric: model.uncertainty(metric)[1:] for metric in metrics}
    health = {name: {key: row[key] for key in HEALTH_KEYS if key in row} for name, row in rows.items()}
    if any(health.values()):
        plain["health"] = health
    if model is not details_against:
        differences = {metric: model.difference(details_against, metric)._asdict() for metric in metrics}
        plain["difference_to_first"] = differences
    return plain


def labels(names: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that still differ: `checkpoint-2000`, or `run-a/checkpoint-2000`."""
    parts = [name.rstrip("/").split("/") for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(names)):
            return short
    return list(names)


def show(models: Sequence[ModelResult], metrics: Sequence[str], *, on_stderr: bool) -> None:
    """The result for a person: one table for one model, one table a metric for several, and embedding health."""
    from rich.console import Console

    # in a file or a pipe no column is cut
    width = None if sys.stdout.isatty() else 200
    plain = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)
    out = console() if on_stderr else plain
    if len(models) == 1:
        out.print(_single_table(models[0], metrics))
    else:
        for metric in metrics:
            out.print(_comparison_table(models, metric))
    if (health := _health_table(models)).row_count:
        out.print(health)
    num_queries = sum(len(result.query_ids) for result in models[0].results)
    noise = "A score from 50 queries is uncertain by about ±0.05 or more."
    if len(models) == 1:
        out.print(f"{num_queries:,} queries; ± 95 %: bootstrap over queries. {noise}")
    else:
        out.print(
            f"{num_queries:,} queries. Differences are to the first model, paired by query; 95 %: bootstrap within "
            f"each benchmark.\nAn interval that holds 0 shows no difference. {noise}"
        )
    for line in collapsed(models):
        warn(line)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    return table


def _single_table(model: ModelResult, metrics: Sequence[str]) -> Table:
    table = _table(model.model, "benchmark", "queries", "documents", *metrics, f"± 95 % {metrics[0]}")
    for result in model.results:
        means = result.means()
        half = _half(bootstrap([result.per_query[metrics[0]]]))
        sizes = [f"{len(result.query_ids):,}", f"{len(result.benchmark.corpus):,}"]
        table.add_row(result.benchmark.name, *sizes, *[f"{means[metric]:.4f}" for metric in metrics], f"{half:.3f}")
    if len(model.results) > 1:
        table.add_section()
        for language, part in model.by_language().items():
            shown = [f"{part.mean(metric):.4f}" for metric in metrics]
            table.add_row(f"avg {language}", "", "", *shown, f"{_half(part.uncertainty(metrics[0])):.3f}")
        half = _half(model.uncertainty(metrics[0]))
        table.add_row("avg", "", "", *[f"{model.mean(metric):.4f}" for metric in metrics], f"{half:.3f}", style="bold")
    return table


def _half(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


def _comparison_table(models: Sequence[ModelResult], metric: str) -> Table:
    """A row a benchmark, the best in bold; below, the difference to the first model with its interval."""
    table = _table(metric, "benchmark", "queries", *labels([model.model for model in models]))
    queries = [len(result.query_ids) for result in models[0].results]
    for index, result in enumerate(models[0].results):
        values = [model.results[index].means()[metric] for model in models]
        table.add_row(result.benchmark.name, f"{queries[index]:,}", *_best_in_bold(values))
    table.add_section()
    for language in models[0].by_language():
        values = [model.by_language()[language].mean(metric) for model in models]
        table.add_row(f"avg {language}", "", *_best_in_bold(values))
    table.add_row("avg", f"{sum(queries):,}", *_best_in_bold([model.mean(metric) for model in models]))
    gaps = [model.difference(models[0], metric) for model in models[1:]]
    table.add_row("difference", "", "", *[f"{gap.mean:+.4f}" for gap in gaps])
    table.add_row("95 %", "", "", *[f"{gap.low:+.4f} … {gap.high:+.4f}" for gap in gaps])
    return table


def _best_in_bold(values: Sequence[float]) -> list[Text]:
    from rich.text import Text

    shown = [f"{value:.4f}" for value in values]
    best = f"{max(values):.4f}"
    return [Text(text, style="bold" if text == best else "") for text in shown]


def _health_table(models: Sequence[ModelResult]) -> Table:
    """Embedding health, mean over benchmarks, a row for each model that has it."""
    table = _table("embedding health", "model", *_HEALTH_TITLES.values())
    for label, model in zip(labels([model.model for model in models]), models):
        average = summary(model.results)["avg"]
        if NEAR_IDENTICAL in average:
            table.add_row(label, *[f"{average[key]:.3f}" for key in _HEALTH_TITLES])
    return table


def collapsed(models: Sequence[ModelResult]) -> list[str]:
    """A line for every model whose embeddings have collapsed on a benchmark."""
    return [
        f"{model.model}: {result.benchmark.name}: {reason}"
        for model in models
        for result in model.results
        if (reason := collapse(result.health))
    ]
