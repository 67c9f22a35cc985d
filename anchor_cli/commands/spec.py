"""`anchor spec`: the resolved spec, with where each value came from."""

from __future__ import annotations

from typing import Annotated

import typer

from anchor_cli.base.console import print_json, say
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson, Overrides


def spec(
    path: Annotated[str | None, typer.Argument(metavar="SPEC", help="A spec file, JSON.")] = None,
    overrides: Overrides = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every key and what it expects instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a spec and print it resolved, with where each value came from."""
    from anchor_cli.spec.docs import expected, shown_value
    from anchor_cli.spec.load import read_spec

    if keys:
        from anchor_cli.spec.spec import RunSpec

        if as_json:
            print_json({key: expected(key) for key in RunSpec.model_fields})
        else:
            _print_columns([(key, expected(key)) for key in RunSpec.model_fields])
        return
    if path is None:
        raise InputError("SPEC is missing, expected a spec file", "anchor init writes one to start from")
    reading = read_spec(path, overrides or [])
    resolved = reading.spec.model_dump()
    _check_deepspeed(reading.spec, path)
    if as_json:
        print_json(
            {
                "spec": resolved,
                "sources": reading.sources,
                "ignored": reading.ignored,
                "run_folder": str(reading.spec.run_folder),
                "fingerprint": reading.spec.fingerprint,
            }
        )
        return
    shown = {key: (shown_value(value), reading.sources[key]) for key, value in resolved.items()}
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        if reading.spec.global_batch_size and reading.sources[key] in ("default", "derived"):
            shown[key] = ("-", "not used: global_batch_size")
    _print_columns([(key, *cells) for key, cells in shown.items()])
    print(f"\nrun folder  {reading.spec.run_folder}")
    if reading.ignored:
        say(f"{path}: ignored, they mean nothing here: {', '.join(reading.ignored)}")


def _check_deepspeed(spec: object, path: str) -> None:
    from pathlib import Path

    from anchor_cli.spec.deepspeed import load_ds_config, resolve_ds_config
    from anchor_cli.spec.spec import RunSpec

    assert isinstance(spec, RunSpec)
    raw = load_ds_config(spec.deepspeed, Path(path).parent)
    if spec.global_batch_size is None:  # then it depends on the number of GPUs, which only a run knows
        raw.pop("train_batch_size", None)
    resolve_ds_config(
        raw,
        spec,
        gradient_accumulation_steps=spec.gradient_accumulation_steps,
        micro_batch_size=spec.per_device_train_batch_size,
        world_size=1,
    )


def _print_columns(rows: list[tuple[str, ...]]) -> None:
    from rich.cells import cell_len  # Korean letters are two columns wide

    widths = [min(48, max(cell_len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths)]
        print("  ".join(cells).rstrip())
