"""`anchor mine`: hard negatives for Stage II."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson, Processes


def mine(
    pairs: Annotated[str, typer.Argument(metavar="PAIRS", help="Prepared pairs, or what anchor prepare reads.")],
    model: Annotated[str, typer.Option(help="A checkpoint, an export or any model, by path or name.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to make; must not exist.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR", help="Further documents: a BEIR folder or prepared pairs; repeatable."),
    ] = None,
    num_negatives: Annotated[int, typer.Option(min=1, help="Negatives of a row at most.")] = 7,
    range_min: Annotated[int, typer.Option(min=0, help="Nearest candidates that are passed over.")] = 0,
    range_max: Annotated[int, typer.Option(min=1, help="Candidates that are looked at.")] = 100,
    min_score: Annotated[float | None, typer.Option(help="Lowest cosine of a negative.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Highest cosine of a negative.")] = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="A negative's cosine is at most the positive's less this.")
    ] = None,
    relative_margin: Annotated[
        float, typer.Option(help="… less this share of it: 0.05 keeps what is below 95 %.")
    ] = 0.05,
    sampling: Annotated[Literal["top", "random"], typer.Option(help="The best ones, or any within the rules.")] = "top",
    seed: Annotated[int, typer.Option(help="Of random sampling.")] = 42,
    min_characters: Annotated[int, typer.Option(min=0, help="Shorter documents are never negatives.")] = 10,
    cross_encoder: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Keep this model's scores of positives and negatives, too.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="What PAIRS were prepared for, if not the model that mines. [--model]"),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep embeddings here. [DIR.mining beside --out, then removed]")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens encoded at once.")] = 16384,
    nproc_per_node: Processes = None,
    as_json: AsJson = False,
) -> None:
    """Search every query's nearest documents exactly and keep those that are negatives, with their scores.

    Known positives of a query, the query itself, duplicates and near-duplicates of a positive and texts too short are
    never negatives; a row with fewer keeps what it has. Killed, the same command goes on and gives the same folder. The
    folder is prepared data for Stage II, with mining.html to read.
    """
    from anchor_cli.base.hub import has_hub_form
    from anchor_cli.data.documents import read_documents
    from anchor_cli.data.sources.sources import require_there
    from anchor_cli.evaluate.places import resolve_models
    from anchor_cli.mine.select import REJECTED, REJECTED_BY_A_THRESHOLD, Rules
    from anchor_cli.processes.ranks import environment_ranks

    rules = Rules(
        num_negatives, range_min, range_max, min_score, max_score, absolute_margin, relative_margin, sampling, seed,
        min_characters,
    )  # fmt: skip
    require_there([pairs])
    folder = resolve_models([model])[0].folder
    if cross_encoder and not Path(cross_encoder).is_dir() and not has_hub_form(cross_encoder):
        raise InputError(f"--cross-encoder {cross_encoder}: no such folder")
    further = [text for name in corpus or [] for text in read_documents(name).values()]
    place, ranks = Path(out), environment_ranks()
    from anchor_cli.mine.run import Mining, finish, mine_rank, open_pairs, prepare_raw_pairs, require_new

    job = Mining(pairs, folder, place, rules, further, work_dir, batch_tokens, cross_encoder, tokenizer)
    require_new(job)
    if ranks is None:
        from anchor_cli.processes.gpus import local_gpus, require_usable_gpus

        require_usable_gpus()
        prepare_raw_pairs(job)
        processes = nproc_per_node or max(1, len(local_gpus()))
        if processes > 1:
            from anchor_cli.mine.store import claim
            from anchor_cli.processes.launch import launch

            open_pairs(job)  # refused here, before workers start
            claim(job.store)
            launch(sys.argv[1:], processes, job.store)
            return
    rank, local_rank, world_size = ranks or (0, 0, 1)
    store, texts = mine_rank(job, rank, world_size, local_rank)
    if rank:
        return
    summary = finish(job, store, texts)
    rows, negatives = summary["rows"], summary["negatives"]
    say(f"{out}: {negatives:,} negatives for {rows:,} rows, {negatives / max(1, rows):.2f} a row")
    if without := summary["rows_with"].get("0", 0):
        most = max(REJECTED_BY_A_THRESHOLD, key=lambda reason: summary["rejected"].get(reason, 0))
        say(f"{without:,} rows have none; candidates were rejected most by {most}: {REJECTED[most]}")
    say(f"to read: {out / 'mining.html'}")
    say(f'next: a spec with "stage": "II" and "dataset_file_path": "{out}"')
    if as_json:
        print_json(summary)
