"""`anchor init`: a spec to start from, asking nothing more than it must."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson

SCHEMA_FILE = "anchor.schema.json"


def init(
    out: Annotated[Path, typer.Argument(metavar="SPEC", help="The file to write.")] = Path("run.json"),
    model: Annotated[str, typer.Option(help="Base model: a folder or a Hub id.")] = "Qwen/Qwen3-0.6B",
    data: Annotated[
        str | None, typer.Option(help="Training pairs: a prepared folder or a raw source. [asked on a terminal]")
    ] = None,
    output_dir: Annotated[str, typer.Option(help="Folder of runs.")] = "output",
    global_batch_size: Annotated[int, typer.Option(help="Pairs of an optimizer step.")] = 128,
    precision: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="[bfloat16 with a GPU here, else float32]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a spec to start from, for this host; editors complete and check it by the schema beside it."""
    from anchor_cli.base.files import write_json, write_text_atomic
    from anchor_cli.plan.inputs import place_of
    from anchor_cli.processes.gpus import local_gpus
    from anchor_cli.spec.load import read_spec

    if out.exists() and not force:
        raise InputError(f"{out}: exists already", "choose another name, or --force replaces it")
    if data is None:
        if not sys.stdin.isatty():
            raise InputError("--data is missing, expected a prepared folder or a raw source")
        data = typer.prompt("Training pairs (a folder, a file or hf://OWNER/NAME)", err=True)
    chosen = precision or ("bfloat16" if local_gpus() else "float32")
    schema = out.with_name(SCHEMA_FILE)
    spec = {
        "$schema": f"./{SCHEMA_FILE}",
        "model_name_or_path": model,
        "dataset_file_path": data,
        "output_dir": output_dir,
        **_texts_of(Path(data)),
        "learning_rate": 4e-5,
        "num_train_epochs": 3,
        "warmup_steps": 300,
        "global_batch_size": global_batch_size,
        "precision": chosen,
        "eval_steps": 500,
        "save_steps": 1000,
        "save_total_limit": 5,
        "seed": 42,
    }
    write_json(out, spec)
    try:
        read = read_spec(out, []).spec
    except InputError:
        out.unlink()
        raise
    write_text_atomic(schema, _schema().read_text(encoding="utf-8"))
    if precision is None and chosen == "float32":
        say("no GPU here: precision float32 (a CPU computes bfloat16 slowly); for a GPU host: --precision bfloat16")
    if place_of(read.dataset_file_path) == "nowhere":
        say(f"{data}: not here yet; anchor prepare SOURCE… --spec {out} --out {data} makes it")
    if as_json:
        print_json({"spec": str(out)})
    else:
        say(f"{out} written. Next: anchor plan {out}   (what the run will do), then: anchor train {out}")


def _texts_of(data: Path) -> dict[str, Any]:
    """Length, and where they are not the defaults template and instructions, that prepared data were made for."""
    from anchor_cli.base.contract import FILE_NAME, TextContract, read_contract

    if not (data / FILE_NAME).is_file():
        return {"max_seq_length": 512}
    contract = read_contract(data)
    texts: dict[str, Any] = {"max_seq_length": contract.max_seq_length}
    for key, name in (("text_template", "text_template"), ("training_instructions", "instructions")):
        value = getattr(contract, key)
        if value != TextContract.model_fields[key].default:
            texts[name] = value
    return texts


def _schema() -> Path:
    """The schema of this installation: in the repository, or in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_spec.schema.json"
    return inside if inside.is_file() else package.parent / "docs" / "spec.schema.json"
