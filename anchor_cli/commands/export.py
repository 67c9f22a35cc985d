"""`anchor export`: a checkpoint for the next tool.

Its function is longer than 50 lines: its signature holds the options and their help.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.commands.options import DEFAULT_CHECKPOINT, AsJson


def export(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help=f"Path, or a name such as checkpoint-2000. [default: {DEFAULT_CHECKPOINT}]",
        ),
    ] = None,
    stage2: Annotated[
        bool,
        typer.Option(
            "--stage2", help="For Stage II and for search: the one kind there is, and the default.", show_default=False
        ),
    ] = True,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="[default: CHECKPOINT-stage2 beside it]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: as in the checkpoint]")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest weight file.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is already there.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it, too: NAMESPACE/NAME; the token is HF_TOKEN.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: a public repository.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one folder that transformers, sentence-transformers, LLM2Vec and Stage II training load right."""
    from anchor_cli.base.checkpoints import default_checkpoint, find_checkpoint
    from anchor_cli.base.runs import confirm_outside
    from anchor_cli.export.push import check_push, push

    if push_to_hub is not None:
        check_push(push_to_hub)
    if checkpoint is None:
        source = default_checkpoint("exporting", "anchor export")
    else:
        source = find_checkpoint(checkpoint)
    if out is None and not (checkpoint and Path(checkpoint).expanduser().is_dir()):
        confirm_outside(source, f"anchor export {source}")
    from anchor_cli.export.export import export as write_export

    done = write_export(
        source,
        out=out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        force=force,
        name=push_to_hub,
    )
    document = done.as_dict()
    certificate = document["certificate"]
    say(
        f"{done.folder}: exported, {done.dtype}; {certificate['num_texts']} texts give the same vectors by "
        f"{', '.join(certificate['checked'])} (1 - cosine <= {max(0.0, 1 - certificate['lowest_cosine']):.1e})"
    )
    if push_to_hub is not None:
        document["hub"] = push(done.folder, push_to_hub, private=not public)
        say(f"pushed to {document['hub']} ({'public' if public else 'private'})")
    if done.stage == "II":
        say(f"next: anchor eval {done.folder}; {done.folder / 'stage_II.json'} is for training it further")
    else:
        say(f"next: Stage II from {done.folder / 'stage_II.json'}, or anchor eval {done.folder}")
    if as_json:
        print_json(document)
