"""`anchor eval`: nDCG@10 and MRR@10 of checkpoints and models on retrieval benchmarks.

Its function is longer than 50 lines: its signature holds the options and their help.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import DEFAULT_CHECKPOINT, AsJson, Device


def eval(  # noqa: A001 - the command's name
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help=f"Paths, names such as checkpoint-2000, or Hub ids. [default: {DEFAULT_CHECKPOINT}]",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[LANG:]NAME_OR_DIR",
            help="nanobeir, nanobeir:ko, nanobeir:en/NanoNQ, nanobeir:all, a BEIR folder, a snapshot; "
            "may be repeated. By default nanobeir: the four sets of KURE.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FILE",
            help="A list of sets: nanobeir, nanobeir-full, kure (the eight of KURE's leaderboard), or a JSON file.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME@K", help="ndcg, mrr, recall or map; may be repeated. By default ndcg@10 and mrr@10."
        ),
    ] = None,
    baseline: Annotated[str | None, typer.Option(metavar="NAME", help="Add a row to compare with: bm25.")] = None,
    queries: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show the N worst queries with what was found instead.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for TREC run files and per-query CSV.")] = None,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids", help="Leave a document with the query's own id out, as BEIR and MTEB (ArguAna)."
        ),
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="With --suite: evaluate anew what was evaluated earlier.")
    ] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens encoded at once.")] = 16384,
    device: Device = None,
    details: Annotated[
        bool, typer.Option("--details", help="Intervals, sizes and embedding health in the JSON.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure retrieval: nDCG@10 and MRR@10 on NanoBEIR (Korean and English), suites of sets, or any BEIR folder.

    With --suite the results of a model are kept, so that a second look costs nothing.
    """
    if baseline not in (None, "bm25"):
        raise InputError(f"--baseline {baseline}: expected bm25")
    from anchor_cli.evaluate.places import resolve_models

    metrics = metric or ["ndcg@10", "mrr@10"]
    models = resolve_models(checkpoints or [], default=baseline is None)
    from anchor_cli.data.benchmarks.benchmarks import SUITE
    from anchor_cli.evaluate.compare import document, show
    from anchor_cli.evaluate.files import worst_lines, worst_queries, write_files
    from anchor_cli.evaluate.models import evaluate_models

    if suite is not None:
        data = [*(data or []), SUITE + suite]
    with redirect_stdout(sys.stderr):  # libraries print when they load a model; stdout is for the result
        results = evaluate_models(
            models,
            data,
            metrics=metrics,
            baseline=baseline is not None,
            ignore_identical_ids=ignore_identical_ids,
            use_cache=suite is not None and not no_cache,
            batch_tokens=batch_tokens,
            device=device,
        )
    documents = [document(model, metrics, results[0] if details else None, suite) for model in results]
    show(results, metrics, on_stderr=as_json)
    for each, model in zip(documents, results if queries else []):
        worst = worst_queries(model, queries, metrics[0])
        each["worst_queries"] = worst
        for line in ["", f"worst queries of {model.model}", *worst_lines(worst, metrics[0])]:
            print(line, file=sys.stderr if as_json else sys.stdout)
    if out is not None:
        say(f"{len(write_files(out, results, metrics))} files written to {out}")
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)
