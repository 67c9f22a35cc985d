"""From models to their results: each is loaded and evaluated in turn."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from anchor_cli.base.console import progress, say
from anchor_cli.base.errors import AnchorError, InputError, first_line
from anchor_cli.base.runs import anchor_home
from anchor_cli.data.benchmarks.beir import Benchmark
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.evaluate.cache import cache_file, read_cached, write_cached
from anchor_cli.evaluate.compare import ModelResult
from anchor_cli.evaluate.embedder import Embedder, load_embedder
from anchor_cli.evaluate.evaluate import BenchmarkResult, evaluate_bm25, evaluate_one, scored_again, shares_ids
from anchor_cli.evaluate.metrics import parse_metric
from anchor_cli.evaluate.places import ModelPlace
from anchor_cli.evaluate.search import device_of

DEPTH = 100
"""Documents kept for every query, for run files and for showing where the right one was."""


def evaluate_models(
    models: Sequence[ModelPlace],
    data: Sequence[str] | None,
    *,
    metrics: Sequence[str],
    baseline: bool = False,
    ignore_identical_ids: bool = False,
    use_cache: bool = False,
    batch_tokens: int = 16384,
    device: str | None = None,
) -> list[ModelResult]:
    """Every model, then the BM25 baseline if asked for, on the benchmarks that `data` means.

    `use_cache`: results of the same model on the same set are taken as they were, and new ones kept.

    Raises:
        InputError, RunError: a benchmark or a model cannot be loaded, or an embedding is not finite.
    """
    for metric in metrics:
        parse_metric(metric)
    benchmarks = load_benchmarks(data)
    if ignore_identical_ids:
        benchmarks = [replace(benchmark, ignore_identical_ids=True) for benchmark in benchmarks]
    for benchmark in benchmarks:
        for note in benchmark.notes:
            say(note)
        if (shared := shares_ids(benchmark)) and not benchmark.ignore_identical_ids:
            say(
                f"{benchmark.name}: {shared:,} queries are documents of the corpus themselves and are ranked, as "
                "sentence-transformers does; BEIR and MTEB leave them out: --ignore-identical-ids"
            )
    results = [
        ModelResult(model.name, _run(model, benchmarks, metrics, batch_tokens, device, use_cache)) for model in models
    ]
    if baseline:
        rows = [evaluate_bm25(benchmark, metrics=metrics, depth=DEPTH) for benchmark in benchmarks]
        results.append(ModelResult("bm25", rows))
    return results


def load_model(model: ModelPlace, batch_tokens: int, device: str | None) -> Embedder:
    """The model, ready to encode. Raises InputError: it cannot be loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" says nothing to the person and is done in a moment
    try:
        return load_embedder(model.folder, batch_tokens=batch_tokens, device=device)
    except AnchorError:
        raise
    except Exception as error:  # a damaged weight file, an architecture that transformers does not know, …
        raise InputError(f"{model.folder}: cannot be loaded: {type(error).__name__}: {first_line(error)}") from error


def _run(
    model: ModelPlace,
    benchmarks: Sequence[Benchmark],
    metrics: Sequence[str],
    batch_tokens: int,
    device: str | None,
    use_cache: bool,
) -> list[BenchmarkResult]:
    """One model on all benchmarks. With `use_cache` what was found earlier is not computed again."""
    depth = max(DEPTH, *(parse_metric(metric)[1] for metric in metrics))
    files = {each.name: cache_file(model.folder, each, device_of(device)) for each in benchmarks} if use_cache else {}
    kept = {name: cached for name, file in files.items() if depth == DEPTH and (cached := read_cached(file))}
    if kept:
        where = anchor_home() / "evaluations"
        say(f"{model.name}: {len(kept)} of {len(benchmarks)} sets as evaluated earlier ({where}); --no-cache: anew")
    missing = [benchmark for benchmark in benchmarks if benchmark.name not in kept]
    computed: dict[str, BenchmarkResult] = {}
    if missing:
        num_texts = sum(len(set(texts.values())) for each in missing for texts in (each.queries, each.corpus))
        embedder = load_model(model, batch_tokens, device)
        with progress(f"encoding with {Path(model.name).name}", num_texts, "texts") as bar:
            for each in missing:
                result = evaluate_one(embedder, each, metrics=metrics, depth=DEPTH, device=device, advance=bar.advance)
                computed[each.name] = result
                if use_cache and depth == DEPTH:
                    fields = {key: getattr(result, key) for key in ("query_ids", "rankings", "scores", "health")}
                    write_cached(files[each.name], model.name, each, fields)
        del embedder
        gc.collect()
    return [computed.get(each.name) or scored_again(each, kept[each.name], metrics) for each in benchmarks]
