"""`anchor init`: a spec to start from, asking nothing more than it must."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson


def init(
    out: Annotated[Path, typer.Argument(metavar="SPEC", help="The file to write.")] = Path("run.json"),
    model: Annotated[str, typer.Option(help="Base model: a folder or a Hub id.")] = "Qwen/Qwen3-0.6B",
    data: Annotated[
        str | None, typer.Option(help="Training pairs: a prepared folder or a raw source. [asked on a terminal]")
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of runs.")] = "output",
    global_batch_size: Annotated[int, typer.Option(help="Pairs of an optimizer step.")] = 128,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a spec to start from; editors complete and check it by its $schema."""
    from anchor_cli.base.files import write_json
    from anchor_cli.spec.load import read_spec

    if out.exists() and not force:
        raise InputError(f"{out}: exists already", "choose another name, or --force replaces it")
    if data is None:
        if not sys.stdin.isatty():
            raise InputError("--data is missing, expected a prepared folder or a raw source")
        data = typer.prompt("Training pairs (a folder, a file or a Hub id)", err=True)
    spec = {
        "$schema": _schema(),
        "model_name_or_path": model,
        "dataset_file_path": data,
        "output_dir": output_dir,
        "max_seq_length": 512,
        "learning_rate": 4e-5,
        "num_train_epochs": 3,
        "warmup_steps": 300,
        "global_batch_size": global_batch_size,
        "precision": "bfloat16",
        "eval_steps": 500,
        "save_steps": 1000,
        "save_total_limit": 5,
        "seed": 42,
    }
    write_json(out, spec)
    try:
        read_spec(out, [])
    except InputError:
        out.unlink()
        raise
    if as_json:
        print_json({"spec": str(out)})
    else:
        say(f"{out} written. Next: anchor plan {out}   (what the run will do), then: anchor train {out}")


def _schema() -> str:
    """The schema of this installation: in the repository, or in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_spec.schema.json"
    return (inside if inside.is_file() else package.parent / "docs" / "spec.schema.json").as_uri()
