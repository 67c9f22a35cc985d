"""What would stop a run later, checked now: files, GPUs, memory, disk, kernels, contradictions."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anchor_cli import __version__
from anchor_cli.base.check import Check
from anchor_cli.base.cpu import SLOW_BFLOAT16, has_fast_bfloat16
from anchor_cli.base.errors import AnchorError, InputError, first_line
from anchor_cli.base.files import existing_parent, free_bytes
from anchor_cli.base.hub import hub_hint
from anchor_cli.base.runs import anchor_home
from anchor_cli.data.benchmarks.beir import CORPUS_FILE, QRELS_FILE, QUERIES_FILE
from anchor_cli.data.benchmarks.benchmarks import (
    DEFAULT_DATA,
    SNAPSHOT_VARIABLE,
    SUITE,
    is_hub_set,
    language_and_place,
    parts_of,
)
from anchor_cli.data.benchmarks.nanobeir import MANIFEST_FILE, is_nano_folder
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.training_set import contract_for
from anchor_cli.model.kernel_packages import FLASH_MODULES, INSTALL_FLASH_ATTN, is_installed
from anchor_cli.plan.inputs import place_of
from anchor_cli.plan.memory import USABLE_SHARE
from anchor_cli.plan.result import Estimate, Hardware
from anchor_cli.plan.zero import state_options
from anchor_cli.processes.gpus import cuda_problem, local_gpus
from anchor_cli.spec.deepspeed import resolve_ds_config
from anchor_cli.spec.spec import RunSpec

GB = 1e9
MANY_CHECKPOINTS = 6  # a limit of 5, and the one that is being written


def check_plan(spec: RunSpec, hardware: Hardware, made: Estimate, ds_config: dict[str, Any]) -> Iterator[Check]:
    """One check after the other; `elsewhere` below means: planned for GPUs that this machine does not have."""
    elsewhere = hardware.gpu is not None and not local_gpus()
    yield from _model(spec)
    yield from _data(spec)
    yield from _gpus(spec, hardware, elsewhere)
    yield from _memory(made)
    yield from _disk(spec, made, elsewhere)
    yield from _deepspeed(spec, hardware, made, ds_config)
    yield from _kernel(spec, hardware, elsewhere)
    yield from _schedule(made)
    yield from _benchmarks(spec)


def _model(spec: RunSpec) -> Iterator[Check]:
    name, folder = spec.model_name_or_path, Path(spec.model_name_or_path).expanduser()
    if not folder.is_dir():
        yield Check("model", "warn", f"{name}: no folder here, it will be taken from the Hub",
                    "give a folder when the training host has no network")  # fmt: skip
    elif not any(folder.glob("*.safetensors")):
        yield Check("model", "fail", f"{folder}: no *.safetensors", "copy the weights there")
    else:
        yield _fit_of(spec, folder)


def _fit_of(spec: RunSpec, folder: Path) -> Check:
    """Whether training would refuse the model or its tokenizer."""
    try:
        contract_for(spec)
        problem = _untried(folder, spec.max_seq_length)
    except AnchorError as error:
        return Check("model", "fail", error.message, error.hint or "take another model")
    except (OSError, ValueError, KeyError) as error:
        return Check("model", "fail", f"{folder}: {first_line(error)}", "a causal language model of transformers")
    if problem:
        return Check("model", "warn", problem, "anchor train tries the real model before its first step")
    return Check("model", "ok", str(folder))


def _untried(folder: Path, max_seq_length: int) -> str | None:
    """Try a small random model of the same kind. One that passed is remembered, for trying it means importing torch.

    Raises:
        InputError: training would refuse the model.
    """
    config_file = (folder / "config.json").read_bytes()
    versions = f"{version('transformers')} {version('torch')} {__version__} {max_seq_length}"
    key = sha256(config_file + versions.encode()).hexdigest()
    memory = anchor_home() / "models-that-passed.txt"
    with contextlib.suppress(OSError):
        if key in memory.read_text(encoding="utf-8").split():
            return None
    from transformers import AutoConfig

    from anchor_cli.model.backbone import refuse_configuration

    config = AutoConfig.from_pretrained(folder)
    if not refuse_configuration(config, str(folder), max_seq_length=max_seq_length, reconstructs=True).was_tried:
        return f"{folder}: no small model of its kind ({config.model_type}) could be tried"
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with open(memory, "a", encoding="utf-8") as file:
            file.write(f"{key}\n")
    return None


def _data(spec: RunSpec) -> Iterator[Check]:
    source, place = spec.dataset_file_path, place_of(spec.dataset_file_path)
    prepare = f"anchor prepare {shlex.quote(source)} --out DIR --tokenizer {spec.model_name_or_path} does it now"
    if place == "nowhere":
        remedy = "; ".join(filter(None, ["anchor prepare SOURCE… --out DIR makes it", hub_hint(source)]))
        yield Check("data", "fail", f"{source}: not found on this machine", remedy)
    elif place == "hub":
        yield Check("data", "warn", f"{source}: not here; training will take it from the Hub and prepare it", prepare)
    elif place == "raw":
        yield Check("data", "warn", f"{source}: raw, training will prepare it first", prepare)
    else:
        try:
            PreparedPairs.open(Path(source).expanduser()).require(contract_for(spec))
        except AnchorError as error:
            yield Check("data", "fail", error.message, error.hint or "anchor prepare")
        else:
            yield Check("data", "ok", f"{source}: prepared under this spec's text contract")


def _gpus(spec: RunSpec, hardware: Hardware, elsewhere: bool) -> Iterator[Check]:
    if hardware.gpu is None:
        remedy = "--gpu h100-nvl --num-gpus 2 plans for GPUs"
        yield Check("GPUs", "warn", "none here: planned for CPU processes", remedy)
        if spec.precision == "bfloat16" and not has_fast_bfloat16():
            yield Check("precision", "warn", SLOW_BFLOAT16, "precision: float32 for a run on this CPU")
    elif elsewhere:
        yield Check("GPUs", "warn", f"planned for {hardware.num_gpus} x {hardware.gpu.name}, this machine has none",
                    "run anchor doctor on the training host")  # fmt: skip
    elif len(cards := local_gpus()) < hardware.num_gpus:
        yield Check("GPUs", "fail", f"{len(cards)} here, {hardware.num_gpus} wanted", f"--num-gpus {len(cards)}")
    elif problem := cuda_problem():
        yield Check("GPUs", "fail", problem.message, problem.hint)
    else:
        yield Check("GPUs", "ok", f"{len(cards)} x {cards[0][0]}")


def _memory(made: Estimate) -> Iterator[Check]:
    if made.memory is None or made.device_bytes is None:
        return
    need, have = made.memory.total / GB, made.device_bytes / GB
    message = f"{need:.0f} of {have:.0f} GB a card"
    if need > have:
        yield Check("memory", "fail", message, "lower max_tokens_per_micro_batch, or gradient_checkpointing: true")
    elif need > USABLE_SHARE * have:
        yield Check("memory", "warn", f"{message}: tight", "lower max_tokens_per_micro_batch")
    elif made.cut.gradient_checkpointing and made.cut.checkpointing_source == "the spec":
        yield Check("memory", "ok", f'{message}, with gradient checkpointing as the spec says ("auto" may be faster)')
    else:
        yield Check("memory", "ok", message)


def _disk(spec: RunSpec, made: Estimate, elsewhere: bool) -> Iterator[Check]:
    free, need = free_bytes(existing_parent(spec.run_folder)), made.disk.total_bytes
    message = (
        f"{made.disk.checkpoints_kept} checkpoints of {made.disk.checkpoint_bytes / GB:.1f} GB: {need / GB:.0f} GB"
    )
    disk = made.disk
    if spec.save_total_limit is None and disk.checkpoints_kept > MANY_CHECKPOINTS:
        saved = (disk.checkpoints_kept - MANY_CHECKPOINTS) * disk.checkpoint_bytes / GB
        remedy = f"save_total_limit: {MANY_CHECKPOINTS - 1} would save {saved:.0f} GB"
        yield Check("checkpoints", "warn", f"all {disk.checkpoints_kept} are kept, {need / GB:.0f} GB", remedy)
    if elsewhere:
        yield Check("disk", "ok", f"{message} (free space here, {free / GB:.0f} GB, says nothing of the training host)")
    elif need > free:
        yield Check("disk", "fail", f"{message}, {free / GB:.0f} GB free", "save_total_limit, or another output_dir")
    else:
        yield Check("disk", "ok", f"{message}, {free / GB:.0f} GB free")


def _deepspeed(spec: RunSpec, hardware: Hardware, made: Estimate, ds_config: dict[str, Any]) -> Iterator[Check]:
    try:
        resolve_ds_config(
            ds_config, spec, gradient_accumulation_steps=made.cut.micro_batches_per_step, micro_batch_size=1,
            world_size=hardware.num_gpus,
        )  # fmt: skip
    except AnchorError as error:
        yield Check("deepspeed", "fail", error.message, error.hint or "")
    else:
        stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
        message = f"{spec.deepspeed}: ZeRO stage {stage}, {spec.precision}"
        yield Check("deepspeed", "ok", message + _stage_1_saves(spec, hardware, made, ds_config))


def _stage_1_saves(spec: RunSpec, hardware: Hardware, made: Estimate, ds_config: dict[str, Any]) -> str:
    """What ZeRO-1, which reduces once a step, saves over ZeRO-2, which does in every micro-batch; empty: nothing."""
    options, repeats = state_options(spec, ds_config, hardware.num_gpus), made.cut.micro_batches_per_step - 1
    if options.zero_stage != 2 or not repeats or hardware.num_gpus == 1 or hardware.gpu is None:
        return ""
    share = made.parameters * (hardware.num_gpus - 1) / hardware.num_gpus
    sent, kept = repeats * 2 * options.communication_bytes * share, options.gradient_bytes * share
    return f"; stage 1 would send {sent / GB:.1f} GB less a step and rank, for {kept / GB:.1f} GB more memory"


def _kernel(spec: RunSpec, hardware: Hardware, elsewhere: bool) -> Iterator[Check]:
    kernel = spec.attn_implementation
    if hardware.gpu is None:
        yield Check("attention", "ok", f"{kernel}: SDPA text by text, as on every CPU")
    elif elsewhere:
        yield Check("attention", "ok", f"{kernel} (kernels of the training host: anchor doctor SPEC there)")
    elif (module := FLASH_MODULES.get(kernel)) and not is_installed(module):
        yield Check("attention", "warn", f"{kernel}: {module} is not installed, torch's varlen attention will run",
                    f"{INSTALL_FLASH_ATTN}, or attn_implementation: auto")  # fmt: skip
    elif kernel == "sdpa":
        yield Check("attention", "warn", "sdpa: one call a text, slow on a GPU", "attn_implementation: auto")
    else:
        yield Check("attention", "ok", kernel)


def _schedule(made: Estimate) -> Iterator[Check]:
    steps = made.steps
    if steps.warmup_steps >= steps.last_step:
        yield Check("schedule", "warn", f"warm-up of {steps.warmup_steps} steps, the run has {steps.last_step}",
                    "lower warmup_steps")  # fmt: skip


def _benchmarks(spec: RunSpec) -> Iterator[Check]:
    """Folders named as evaluation data must load; data sets of the Hub are not looked up."""
    if not (spec.eval_steps or spec.eval_on_start):
        return
    of_the_hub = []
    for name in spec.eval_data or DEFAULT_DATA:
        try:
            contents = _evaluation_data(name)
        except AnchorError as error:
            yield Check("evaluation", "fail", error.message, error.hint or "eval_data names BEIR folders or NanoBEIR")
            continue
        if contents is None:
            of_the_hub.append(name)
        else:
            yield Check("evaluation", "ok", contents)
    if of_the_hub:
        message = ", ".join(of_the_hub) if spec.eval_data else "the four NanoBEIR sets"
        remedy = "anchor prepare nanobeir --out DIR makes a snapshot for a host without network; name it in eval_data"
        yield Check("evaluation", "warn", f"{message}: from the Hub or its cache", remedy)


def _evaluation_data(name: str) -> str | None:
    """What an entry of `eval_data` stands for, by the functions that load it; None: on the Hub, which is not asked.

    NanoBEIR's sets are small and are read; of a BEIR folder, which may be large, the files must be there.

    Raises:
        InputError: no such benchmark, or one that does not load.
    """
    if name.startswith(SUITE):
        parts_of(name)  # no such suite is an error
        return None
    place = Path(language_and_place(name)[1])
    if place.is_dir() and not (place / MANIFEST_FILE).is_file() and not is_nano_folder(place):
        if missing := [file for file in (CORPUS_FILE, QUERIES_FILE, QRELS_FILE) if not (place / file).is_file()]:
            raise InputError(f"{place}: no {', no '.join(missing)}", "expected BEIR, NanoBEIR or a snapshot")
        return str(place)
    if is_hub_set(str(place)):
        return None
    parts = parts_of(name)
    if not (place.is_dir() or is_nano_folder(place.parent) or os.environ.get(SNAPSHOT_VARIABLE)):
        return None  # NanoBEIR by its name
    return f"{name}: {', '.join(part().name for part in parts)}"
