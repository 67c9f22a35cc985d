"""What a run is made of, settled by rank 0 before anything heavy: data, folder, what it continues from."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from anchor_cli.data.pairs import MANIFEST, PreparedPairs
from anchor_cli.data.text import eos_of, load_tokenizer, tokenizer_fingerprint
from anchor_cli.engine.checkpoint import newest_whole, read_state
from anchor_cli.words.console import say, warn
from anchor_cli.words.contract import FILE_NAME as CONTRACT
from anchor_cli.words.contract import TextContract, differences, read_contract
from anchor_cli.words.errors import InputError
from anchor_cli.words.spec import NOT_OF_THE_RESULT, RunSpec

_PATHS = frozenset({"model_name_or_path", "dataset_file_path"})  # moved folders are harmless; data has a fingerprint
_OF_THE_MODEL = frozenset({"text_template", "pooling_mode", "eos_token", "eos_token_id", "tokenizer_fingerprint"})
"""What a trained model cannot do otherwise; length and instructions are the next run's to choose."""
_BATCH = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"})


def contract_for(spec: RunSpec) -> TextContract:
    """The text contract that this spec trains under, with its model's tokenizer.

    Raises:
        InputError: no tokenizer, or the model is a checkpoint or export that was trained under another contract.
    """
    tokenizer = load_tokenizer(spec.model_name_or_path)
    eos_token, eos_token_id = eos_of(tokenizer, spec.text_template)
    contract = TextContract(
        text_template=spec.text_template,
        instructions=spec.query_instructions,
        training_instructions=spec.training_instructions,
        max_seq_length=spec.max_seq_length,
        pooling_mode=spec.pooling_mode,
        eos_token=eos_token,
        eos_token_id=eos_token_id,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    require_contract_of(Path(spec.model_name_or_path).expanduser(), contract)
    return contract


def require_contract_of(model: Path, contract: TextContract) -> None:
    """Refuse a model folder whose `anchor.json` promises another treatment of texts; without one anything goes.

    Raises:
        InputError: the first difference; the hint says how to agree.
    """
    if not (model / CONTRACT).is_file():
        return
    found = [line for line in differences(read_contract(model), contract) if line.split(":")[0] in _OF_THE_MODEL]
    if any(line.startswith("tokenizer_fingerprint") for line in found):
        raise InputError(
            f"{model}: was trained with another tokenizer than this run's",
            "take the tokenizer.json that belongs to it, and data prepared with that",
        )
    if found:
        raise InputError(
            f"{model}: was trained under another text contract: {found[0]}",
            f"put the first value into the spec, or begin from a model without {CONTRACT}",
        )


def prepared_data(spec: RunSpec, contract: TextContract) -> Path:
    """The prepared folder of the spec's data: itself, or one made now (and found again) below `output_dir`.

    Raises:
        InputError: prepared for another tokenizer, template, instruction or length, or not readable.
    """
    source = Path(spec.dataset_file_path).expanduser()
    if (source / MANIFEST).is_file():
        return source
    folder = _prepared_folder(spec, source, contract)
    if not (folder / MANIFEST).is_file():
        from anchor_cli.data.prepare import prepare

        say(f"{source}: raw data; preparing it once into {folder}")
        prepare(
            [str(spec.dataset_file_path)],
            folder,
            tokenizer=spec.model_name_or_path,
            max_seq_length=contract.max_seq_length,
            text_template=contract.text_template,
            instructions=contract.instructions,
            training_instructions=contract.training_instructions,
            num_proc=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1,
        )
    return folder


def _prepared_folder(spec: RunSpec, source: Path, contract: TextContract) -> Path:
    """Where the data of a raw source are prepared; a name for each state of the source and each contract."""
    from anchor_cli.data.nanobeir import revision_of
    from anchor_cli.data.sources import is_hub_id

    below = Path(spec.output_dir).expanduser() / "prepared"
    if not is_hub_id(spec.dataset_file_path):
        told = f"{source.absolute()}\n{_age(source)}\n{contract.model_dump_json()}"
        name = re.sub(r"[*?\[\]]", "", source.name.split(".")[0]) or "files"
        return below / f"{name}-{_digest(told)}"
    stem = f"{source.name}-{_digest(spec.dataset_file_path + contract.model_dump_json())}"
    revision = revision_of(spec.dataset_file_path)
    if revision is not None:
        return below / f"{stem}-{revision[:12]}"
    earlier = sorted(below.glob(f"{glob.escape(stem)}-*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    if not earlier:
        return below / f"{stem}-unknown"
    say(f"{spec.dataset_file_path}: the Hub cannot be asked; taking what was prepared last, {earlier[-1].parent}")
    return earlier[-1].parent


def _digest(told: str) -> str:
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _age(source: Path) -> str:
    """Sizes and times of the source's files: a raw source that changed is prepared again."""
    from anchor_cli.data.sources import matching_files

    files = sorted(source.rglob("*")) if source.is_dir() else matching_files(str(source))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
    return json.dumps(stats)


def open_data(folder: Path, contract: TextContract) -> PreparedPairs:
    """The prepared pairs, refused when they were made for another contract."""
    pairs = PreparedPairs.open(folder)
    pairs.require(contract)
    return pairs


def resume_point(spec: RunSpec, data_fingerprint: str) -> dict[str, Any]:
    """What this experiment continues from: {"checkpoint": path or None, "state": its training state or None}.

    The newest whole checkpoint is taken; newer damaged ones are named. A changed spec or data set is refused.

    Raises:
        InputError: the differences that matter, one after the other.
    """
    checkpoint, damaged = newest_whole(spec.run_folder)
    for line in damaged:
        warn(line)
    if checkpoint is None:
        if damaged:
            warn("no whole checkpoint is left; training starts from the beginning")
        return {"checkpoint": None, "state": None}
    state = read_state(checkpoint)
    found = differences_that_matter(state["spec"], spec.model_dump(), state["global_batch_size"])
    if state["data_fingerprint"] != data_fingerprint:
        found.append("the training data are not the ones it began with")
    if found:
        raise InputError(
            f"{checkpoint}: this experiment began with another spec: {'; '.join(found)}",
            hint="put the values back, or give the new run its own experiment_id",
        )
    return {"checkpoint": str(checkpoint), "state": state}


def differences_that_matter(old: dict[str, Any], new: dict[str, Any], global_batch_size: int) -> list[str]:
    """`key: old -> new` for every key the result depends on. The global batch stays what the run began with."""
    found = []
    for key in new:
        if key in NOT_OF_THE_RESULT | _PATHS | _BATCH:
            continue
        if old.get(key) != new[key]:
            was, is_now = (json.dumps(value, ensure_ascii=False) for value in (old.get(key), new[key]))
            found.append(f"{key}: {was} -> {is_now}")
    if new["global_batch_size"] is not None and new["global_batch_size"] != global_batch_size:
        found.append(f"global_batch_size: {global_batch_size} -> {new['global_batch_size']}")
    if new["global_batch_size"] is None:
        old_product = old["per_device_train_batch_size"] * old["gradient_accumulation_steps"]
        product = new["per_device_train_batch_size"] * new["gradient_accumulation_steps"]
        if old["global_batch_size"] is None and product != old_product:
            found.append(f"per_device_train_batch_size x gradient_accumulation_steps: {old_product} -> {product}")
    return found
