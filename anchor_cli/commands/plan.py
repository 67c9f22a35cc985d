"""`anchor plan`: what a run will do, before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anchor_cli.base.check import lines_of
from anchor_cli.base.console import print_json
from anchor_cli.base.errors import InputError
from anchor_cli.commands.options import AsJson, Device, Overrides, SpecFile

if TYPE_CHECKING:
    from anchor_cli.plan.probe import Probe
    from anchor_cli.plan.result import Estimate

GB = 1e9


def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help="Plan for this card: h100-nvl, h100-sxm, h100-pcie, h200-sxm, h200-nvl, gh200, b200, a100-80gb, "
            "a100-40gb, l40s or rtx4090. [default: this machine's]",
        ),
    ] = None,
    num_gpus: Annotated[int | None, typer.Option(min=1, help="Number of cards. [default: this machine's]")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of the data, where they, or only a sample of them, are here.")
    ] = None,
    mean_query_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --rows and no data: mean length of a query. [default: 42]")
    ] = None,
    mean_document_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The same of a document. [default: 72% of max_seq_length, at most 493]"),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Share of the card's peak to expect, as measured.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=1, help="Measured tokens/s of the whole run (perf/tokens_per_s).")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Run the heaviest micro-batch twice on this machine.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run will do: steps, tokens, memory, time, disk, and what would stop it. Nothing is started."""
    from anchor_cli.plan.checks import check_plan
    from anchor_cli.plan.estimate import estimate
    from anchor_cli.plan.inputs import hardware_of, rows_of, shape_of
    from anchor_cli.plan.result import Throughput
    from anchor_cli.spec.deepspeed import load_ds_config
    from anchor_cli.spec.load import load_spec

    if mfu is not None and tokens_per_second is not None:
        raise InputError("--mfu and --tokens-per-second: two measurements of the same thing", "give one of them")
    run = load_spec(spec, overrides or [])
    shape, shape_source = shape_of(run.model_name_or_path)
    hardware = hardware_of(gpu, num_gpus)
    ds_config = load_ds_config(run.deepspeed, Path(spec).parent)
    throughput = Throughput()
    if mfu is not None:
        throughput = Throughput(mfu=mfu, basis="given")
    elif tokens_per_second is not None:
        throughput = Throughput(tokens_per_s=tokens_per_second, basis=f"given: {tokens_per_second:,.0f} tokens/s")
    lengths = rows_of(run, rows, mean_query_tokens, mean_document_tokens)
    liger = gpu is None and hardware.gpu is not None and _liger_fits(run.model_name_or_path)
    made = estimate(run, shape, lengths, hardware, ds_config, throughput, liger=liger)
    measured = None
    if probe:
        from anchor_cli.plan.probe import probe as run_probe

        measured = run_probe(run, shape, made)
        if throughput == Throughput() and (hardware.gpu is None or measured.peak_bytes is not None):
            rate = measured.tokens_per_s * hardware.num_gpus
            throughput = Throughput(tokens_per_s=rate, basis=f"probe: {rate:,.0f} tokens/s")
            made = estimate(run, shape, lengths, hardware, ds_config, throughput, liger=liger)
    checks = list(check_plan(run, hardware, made, ds_config))
    if as_json:
        print_json(_document(made, hardware, shape_source, checks, measured))
    else:
        _print(made, hardware, shape_source, checks, measured)


def _document(made: Estimate, hardware: Any, shape_source: str, checks: list[Any], measured: Probe | None) -> Any:
    from dataclasses import asdict

    return {
        **made.as_dict(),
        "model": shape_source,
        "gpu": hardware.gpu.name if hardware.gpu else None,
        "num_gpus": hardware.num_gpus,
        "probe": asdict(measured) if measured else None,
        "checks": [asdict(check) for check in checks],
    }


def _print(made: Estimate, hardware: Any, shape_source: str, checks: list[Any], measured: Probe | None) -> None:
    where = f"{hardware.num_gpus} x {hardware.gpu.name}" if hardware.gpu else f"{hardware.num_gpus} CPU process(es)"
    lines = [("planned for", where), ("model", f"{made.parameters / 1e6:,.0f}M parameters ({shape_source})")]
    for name, value in (*lines, *_work(made), *_resources(made, measured)):
        print(f"{name:<14}{value}")
    print()
    for check in checks:
        print("\n".join(lines_of(check, 10)))


def _work(made: Estimate) -> list[tuple[str, str]]:
    steps, tokens, cut = made.steps, made.tokens, made.cut
    ends = "" if steps.last_step == steps.total_steps else f", ending at step {steps.last_step:,}"
    truncated = "" if tokens.truncated_share is None else f"; {tokens.truncated_share:.1%} of the pairs truncated"
    switch = "on" if cut.gradient_checkpointing else "off"
    pair, work = ("pair", made.contrast) if made.contrast is None else ("text", made.contrast)
    texts = [] if work is None else [
        ("texts", f"{work.texts_per_step:,} a step: {steps.global_batch_size:,} rows with {work.mean_negatives:.1f} "
                  f"negatives on average; blocks of {work.block_rows:,} rows, {work.candidates:,} candidates a query"),
        ("loss", f"{work.gathered_bytes / GB:.2f} GB of embeddings gathered by each rank a step, "
                 f"{work.loss_bytes / GB:.1f} GB of memory, {work.loss_tflop:.2f} TFLOP on every rank; "
                 f"{work.encoded_again:.0%} of the texts are encoded twice"),
    ]  # fmt: skip
    return [
        ("data", f"{steps.num_rows:,} pairs, {tokens.source}"),
        ("steps", f"{steps.steps_per_epoch:,} an epoch, {steps.total_steps:,} in all{ends}; "
                  f"{steps.global_batch_size} pairs a step, warm-up {steps.warmup_steps:,}, "
                  f"{steps.rows_dropped_per_epoch} pairs left over an epoch"),
        ("tokens", f"query {tokens.mean_query:.0f}, document {tokens.mean_document:.0f} on average, longest {pair} "
                   f"{tokens.longest_row:,}; {tokens.per_step:,.0f} a step, "
                   f"{tokens.whole_run / 1e6:,.0f} million in all{truncated}"),
        *texts,
        ("micro-batches", f"{cut.micro_batches_per_step} a step on each rank, up to {cut.heaviest_tokens:,} tokens "
                          f"(budget {cut.token_budget:,}: {cut.budget_source})"),
        ("checkpointing", f"{switch} ({cut.checkpointing_source})"),
    ]  # fmt: skip


def _resources(made: Estimate, measured: Probe | None) -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    if made.memory is not None:
        from dataclasses import asdict

        parts = ", ".join(f"{name.replace('_', ' ')} {value / GB:.1f}" for name, value in asdict(made.memory).items())
        lines.append(("memory", f"{made.memory.total / GB:.1f} GB a card: {parts}"))
    time, disk = made.time, made.disk
    if time is None:
        lines.append(("time", "unknown on a CPU: give --tokens-per-second, or --probe"))
    else:
        each = f"{_clock(time.total_s)}, {time.step_s:.2f} s a step ({time.basis})"
        lines.append(("time", f"{each}; without evaluation and saving"))
        if time.communication_gb:
            sent = f"{time.communication_gb:.1f} GB sent by each rank a step"
            lines.append(("network", f"{sent}, {time.communication_s:.3f} s at the link's rate, behind computing"))
    many = "s" if disk.checkpoints_kept > 1 else ""
    size = disk.checkpoint_bytes / GB
    lines.append(("disk", f"{disk.total_bytes / GB:.1f} GB: {disk.checkpoints_kept} checkpoint{many} of {size:.1f} GB"))
    if measured is not None:
        peak = "" if measured.peak_bytes is None else f", {measured.peak_bytes / GB:.1f} GB at the peak"
        ran = f"{measured.tokens:,} tokens forward and backward in {measured.seconds:.2f} s"
        lines.append(("probe", f"{ran} on {measured.device} ({measured.kernel}), {measured.tokens_per_s:,.0f}/s{peak}"))
    return lines


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{max(1, minutes)} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _liger_fits(model: str) -> bool:
    """As training decides; torch is imported only where there may be something to ask it."""
    from importlib.util import find_spec

    if find_spec("liger_kernel") is None:
        return False
    from anchor_cli.model.backbone import liger_fits

    return liger_fits(model)
