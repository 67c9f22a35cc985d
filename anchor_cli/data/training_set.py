"""The training set of a spec: its text contract, and its pairs, which are prepared before any rank exists."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

from anchor_cli.base.checkpoints import require_whole
from anchor_cli.base.console import say
from anchor_cli.base.contract import FILE_NAME as CONTRACT
from anchor_cli.base.contract import NO_OTHERS, TEXT_TEMPLATE, TextContract, differences, on_one_line, read_contract
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import one_at_a_time
from anchor_cli.data.pairs import MANIFEST, PreparedPairs
from anchor_cli.data.text import contract_with, load_tokenizer
from anchor_cli.data.tokenizer_fit import embedding_rows, require_exportable, require_ids_within
from anchor_cli.spec.spec import RunSpec

_OF_THE_MODEL = frozenset({"text_template", "pooling_mode", "eos_token", "eos_token_id", "tokenizer_fingerprint"})
"""What a trained model cannot do otherwise; length and instructions are the next run's to choose."""


def contract_for(spec: RunSpec) -> TextContract:
    """The text contract that this spec trains under, with its model's tokenizer.

    Raises:
        InputError: no tokenizer, one that does not fit the model or could never be exported, or the model is a
            checkpoint or export that was trained under another contract.
    """
    tokenizer = load_tokenizer(spec.model_name_or_path)
    require_ids_within(tokenizer, embedding_rows(spec.model_name_or_path), spec.model_name_or_path)
    require_exportable(tokenizer, spec.model_name_or_path)
    contract = contract_with(
        tokenizer,
        text_template=spec.text_template,
        instructions=spec.query_instructions,
        training_instructions=spec.training_instructions,
        max_seq_length=spec.max_seq_length,
        pooling_mode=spec.pooling_mode,
    )
    model = Path(spec.model_name_or_path).expanduser()
    require_contract_of(model, contract)
    require_whole(model)
    return contract


def require_contract_of(model: Path, contract: TextContract) -> None:
    """Refuse a model folder whose `anchor.json` promises another treatment of texts; without one anything goes.

    Raises:
        InputError: the first difference; the hint says how to agree.
    """
    if not (model / CONTRACT).is_file():
        return
    differing = [line for line in differences(read_contract(model), contract) if line.split(":")[0] in _OF_THE_MODEL]
    if any(line.startswith("tokenizer_fingerprint") for line in differing):
        raise InputError(
            f"{model}: was trained with another tokenizer than this run's",
            "take the tokenizer.json that belongs to it, and data prepared with that",
        )
    if differing:
        raise InputError(
            f"{model}: was trained under another text contract: {differing[0]}",
            f"put the first value into the spec, or begin from a model without {CONTRACT}",
        )


def prepare_raw(spec: RunSpec) -> Path:
    """The prepared folder of the spec's data; raw data are prepared now, once, below `output_dir`.

    Prepared data are told by one look at their folder: no tokenizer is loaded.

    Raises:
        InputError: no such data, or no row of them can be used.
    """
    source = Path(spec.dataset_file_path).expanduser()
    if (source / MANIFEST).is_file():
        return source
    contract = contract_for(spec)
    folder = prepared_folder(spec, contract)
    if not (folder / MANIFEST).is_file():
        with one_at_a_time(folder, f"{source}: another process prepares it into {folder}; waiting for that"):
            if not (folder / MANIFEST).is_file():
                _prepare(spec, contract, folder)
    return folder


def prepare_keys(contract: TextContract, tokenizer: str | Path) -> dict[str, Any]:
    """The keywords of `prepare` that make texts as a contract says, on all cores."""
    return {
        "tokenizer": tokenizer,
        "max_seq_length": contract.max_seq_length,
        "text_template": contract.text_template,
        "instructions": contract.instructions,
        "training_instructions": contract.training_instructions,
        "num_proc": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
    }


def _prepare(spec: RunSpec, contract: TextContract, folder: Path) -> None:
    from anchor_cli.data.prepare.prepare import Options, prepare

    say(f"{spec.dataset_file_path}: raw data; preparing it once into {folder}")
    try:
        prepare(
            [str(spec.dataset_file_path)],
            folder,
            **prepare_keys(contract, spec.model_name_or_path),
            options=Options(negatives=spec.stage == "II"),
        )
    except InputError:
        if not (folder / MANIFEST).is_file():  # else another process was first, on a file system without locks
            raise


def training_pairs(spec: RunSpec, contract: TextContract) -> PreparedPairs:
    """The prepared pairs of a spec, looked up as `prepare_raw` does; nothing is prepared.

    Raises:
        InputError: the data are raw (the hint prepares them), made for another contract, or not readable.
    """
    folder = prepared_folder(spec, contract)
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{spec.dataset_file_path}: raw data, which one of several processes cannot prepare for all",
            hint=f"prepare them once: {prepare_command(spec, folder)}",
        )
    pairs = PreparedPairs.open(folder)
    pairs.require(contract)
    return pairs


def prepare_command(spec: RunSpec, folder: Path) -> str:
    """The `anchor prepare` line that makes `folder` of the spec's raw data."""
    words = ["anchor", "prepare", spec.dataset_file_path, "--out", str(folder)]
    words += ["--tokenizer", spec.model_name_or_path, "--max-seq-length", str(spec.max_seq_length)]
    if spec.text_template != TEXT_TEMPLATE:
        words += ["--text-template", on_one_line(spec.text_template)]
    for language, instruction in (spec.instructions or {}).items():
        typed = f"{language}={instruction}"
        words += ["--instruction", "" if typed == NO_OTHERS else on_one_line(typed)]
    if spec.instructions and "*" not in spec.instructions:
        words += ["--instruction", NO_OTHERS]
    return shlex.join([*words, *(["--stage", "II"] if spec.stage == "II" else [])])


def prepared_folder(spec: RunSpec, contract: TextContract) -> Path:
    """Where the spec's prepared data are, or will be. Every process finds the same folder."""
    source = Path(spec.dataset_file_path).expanduser()
    return source if (source / MANIFEST).is_file() else _folder_of_raw(spec, source, contract)


def _folder_of_raw(spec: RunSpec, source: Path, contract: TextContract) -> Path:
    """Where the data of a raw source are prepared; a name for each state of the source and each contract."""
    from anchor_cli.base.hub import hub_set, revision_of

    below = Path(spec.output_dir).expanduser() / "prepared"
    kept = contract.model_dump_json() + (" with negatives" if spec.stage == "II" else "")
    if not hub_set(spec.dataset_file_path):
        name = re.sub(r"[*?\[\]]", "", source.name.split(".")[0]) or "files"
        return below / f"{name}-{raw_digest(spec.dataset_file_path, kept)}"
    stem = f"{source.name}-{_digest(spec.dataset_file_path + kept)}"
    revision = revision_of(spec.dataset_file_path)
    if revision is not None:
        return below / f"{stem}-{revision[:12]}"
    earlier = sorted(below.glob(f"{glob.escape(stem)}-*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not earlier:
        return below / f"{stem}-unknown"
    say(f"{spec.dataset_file_path}: the Hub cannot be asked; taking what was prepared last, {earlier[-1].parent}")
    return earlier[-1].parent


def raw_digest(source: str, kept: str) -> str:
    """A name for each state of a raw source and for what it is prepared under, `kept`: 12 hexadecimal digits.

    The state is the names, sizes and times of its files, or the Hub's revision.
    """
    from anchor_cli.base.hub import hub_set, revision_of

    if hub_set(source):
        return _digest(f"{source}\n{revision_of(source)}\n{kept}")
    place = Path(source).expanduser()
    return _digest(f"{place.absolute()}\n{_age(place)}\n{kept}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _age(source: Path) -> str:
    """Sizes and times of the source's files: a raw source that changed is prepared again.

    Of a folder those that can be read as data: its own, and one folder down those of `datasets`. What lies elsewhere
    below it may be this run's output.
    """
    from anchor_cli.data.sources.locate import matching_files

    if source.is_dir():
        files = sorted(path for pattern in ("*", "*/state.json", "*/*.arrow") for path in source.glob(pattern))
    else:
        files = matching_files(str(source))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return json.dumps([entry for entry in stats if not entry[0].startswith(".")])
