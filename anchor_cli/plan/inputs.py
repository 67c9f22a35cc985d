"""What `anchor plan` reads: the model's shape, the rows' lengths, the GPUs. No torch, no weights read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anchor_cli.base.errors import AnchorError, InputError
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent, has_hub_form, hub_hint, hub_set
from anchor_cli.data.contrast_rows import ContrastData
from anchor_cli.data.pairs import MANIFEST, PreparedPairs
from anchor_cli.plan.contrast import Negatives
from anchor_cli.plan.flops import ModelShape
from anchor_cli.plan.hardware import gpu_named, gpu_of_device_name
from anchor_cli.plan.result import Hardware
from anchor_cli.plan.rows import Rows, assumed_rows, scaled
from anchor_cli.processes.gpus import local_gpus
from anchor_cli.spec.spec import RunSpec

SAMPLE_ROWS = 2000
"""Rows of raw data that are tokenised to estimate lengths, evenly spread over the source."""
# Shapes of models that a laptop without network and without the model should be able to plan for (their config.json).
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    f"Qwen/Qwen3-{size}": {
        "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
        "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads, "tie_word_embeddings": tied,
    }
    for size, hidden, width, layers, heads, tied in (
        ("0.6B", 1024, 3072, 28, 16, True), ("1.7B", 2048, 6144, 28, 16, True), ("4B", 2560, 9728, 36, 32, True),
        ("8B", 4096, 12288, 36, 32, False),
    )
}  # fmt: skip


def shape_of(model_name_or_path: str) -> tuple[ModelShape, str]:
    """The shape and where it was read. Raises InputError: no config.json, or one that lacks a size."""
    config, where = config_of(model_name_or_path)
    try:
        return ModelShape.from_config(config), where
    except KeyError as error:
        raise InputError(f"{where}: no {error.args[0]}, expected a decoder-only language model") from None


def config_of(model_name_or_path: str) -> tuple[dict[str, Any], str]:
    """config.json and where it was read: the folder's, else the built-in one of a known model (needs no network), else
    the Hub's. Raises InputError: there is none."""
    path = Path(model_name_or_path).expanduser() / "config.json"
    known = KNOWN_CONFIGS.get(model_name_or_path.removesuffix("-Base"))
    file = path if path.is_file() else None if known else _from_hub(model_name_or_path)
    if file is not None:
        return _read(file), str(file)
    if known is not None:
        return known, f"the known shape of {model_name_or_path}"
    raise InputError(
        f"model_name_or_path: {model_name_or_path}: no config.json there, and the Hub does not give it",
        hint="give a folder with config.json, or a Hub id that this host can reach",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    return config if isinstance(config, dict) else {}


def _from_hub(model_id: str) -> Path | None:
    """config.json from the local Hub cache or, with a network, from the Hub; None without."""
    if not has_hub_form(model_id):
        return None
    go_offline_if_the_hub_is_silent()
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model_id, "config.json"))
    except Exception:  # the library raises many kinds; every one of them means: not to be had here
        return None


def hardware_of(gpu: str | None, num_gpus: int | None) -> Hardware:
    """The GPUs named, else this machine's, else CPU processes. Raises InputError for an unknown name."""
    if gpu is not None:
        named = gpu_named(gpu)
        return Hardware(named, num_gpus or 1, named.memory_gib * 2**30)
    cards = local_gpus()
    if not cards:
        return Hardware(None, num_gpus or 1, None)
    name, memory_gib = cards[0]
    kind = gpu_of_device_name(name)
    if kind is None:
        raise InputError(f"{name}: this GPU's peak is not known", hint="name the nearest one: --gpu")
    return Hardware(kind, num_gpus or len(cards), memory_gib * 2**30)


def rows_of(
    spec: RunSpec, num_rows: int | None, mean_query: int | None = None, mean_document: int | None = None
) -> Rows:
    """Lengths of the spec's data: exact when prepared, of a sample when raw; where only the count is known, assumed or
    of the given means. Data that are here, and a count: the data are a sample of so many rows.

    Raises:
        InputError: the data are not there and `num_rows` was not given, or they cannot be read.
    """
    place = place_of(spec.dataset_file_path)
    if place == "prepared":
        prepared = _prepared(spec, Path(spec.dataset_file_path).expanduser())
        return prepared if num_rows is None else scaled(prepared, num_rows)
    if place != "raw":
        if num_rows is not None:
            return assumed_rows(num_rows, spec, mean_query, mean_document)
        reason = "from the Hub, which a plan does not read" if place == "hub" else "not found on this machine"
        raise InputError(
            f"dataset_file_path: {spec.dataset_file_path}: {reason}",
            hint="; ".join(
                filter(
                    None, ["pass the number of rows, --rows N, to plan without it", hub_hint(spec.dataset_file_path)]
                )
            ),
        )
    return _sampled(spec, num_rows)


def place_of(data: str) -> Literal["prepared", "raw", "hub", "nowhere"]:
    """What a `dataset_file_path` means here, as `anchor prepare` takes it: a folder, files, a pattern, `hf://…`."""
    from anchor_cli.data.sources.locate import matching_files

    path = Path(data).expanduser()
    if (path / MANIFEST).is_file():
        return "prepared"
    if hub_set(data):
        return "hub"
    try:
        return "raw" if path.is_dir() or matching_files(data) else "nowhere"
    except InputError:
        return "nowhere"


def _prepared(spec: RunSpec, folder: Path) -> Rows:
    pairs = PreparedPairs.open(folder)
    queries, documents = pairs.query_lengths, pairs.document_lengths
    targets = int(queries.sum(dtype=np.int64) + documents.sum(dtype=np.int64)) - 2 * len(queries)
    if spec.reconstruction_targets == "content":
        starts = pairs.query_content_starts.sum(dtype=np.int64) + pairs.document_content_starts.sum(dtype=np.int64)
        targets -= int(starts) + sum(int(side.sum()) for side in pairs.eos_in_content(np.arange(len(pairs))))
    else:
        targets -= int(pairs.query_inner_eos.sum() + pairs.document_inner_eos.sum())
    share = float(np.mean((queries >= spec.max_seq_length) | (documents >= spec.max_seq_length)))
    return Rows(queries, documents, targets, share, f"{folder} (prepared, exact)", _negatives_of(spec, pairs))


def _negatives_of(spec: RunSpec, pairs: PreparedPairs) -> Negatives | None:
    """Of prepared rows, in Stage II."""
    if spec.stage == "I":
        return None
    data = ContrastData(pairs, spec.num_hard_negatives)
    tokens = data.row_lengths - pairs.query_lengths - pairs.document_lengths
    return Negatives(data.counts.astype(np.int32), tokens.astype(np.int32), data.longest_text)


def _sampled(spec: RunSpec, num_rows: int | None) -> Rows:
    """Tokenise an evenly spread sample of the raw source as `anchor prepare` would, and draw all rows from it."""
    from anchor_cli.data.prepare.rows import RowMaker
    from anchor_cli.data.prepare.work import EvenSample, Task, Work
    from anchor_cli.data.sources.files import Limits
    from anchor_cli.data.sources.sources import SourceOptions, open_source
    from anchor_cli.data.training_set import contract_for

    try:
        contract = contract_for(spec)
    except AnchorError as error:
        if num_rows is not None:
            return assumed_rows(num_rows, spec)
        raise InputError(error.message, "raw data need the model's tokenizer; or pass --rows N") from error
    limits, source = Limits(), open_source(spec.dataset_file_path, SourceOptions(negatives=spec.stage == "II"))
    about = source.rows_hint or source.count_rows(limits)  # for the spread of the sample; `first` ends as the count
    make = RowMaker(Work(spec.model_name_or_path, contract, limits, None, False, spec.stage == "II"))
    share, first, lengths, cut, targets = EvenSample(min(SAMPLE_ROWS, about), about), 0, [], 0, 0
    for file in source.files:
        for part in file.parts(limits):
            made = make(Task(part, file.columns, share, first))
            first += part.num_rows
            query, document = (made.table[name].to_numpy() for name in ("query_length", "document_length"))
            lengths.append(np.stack([query, document, *(_negative_counts(made.table) if spec.stage == "II" else ())]))
            cut += int((np.maximum(made.query_tokens, made.document_tokens) > spec.max_seq_length).sum())
            targets += _targets(spec, made.table, contract.eos_token_id)
    first = num_rows or first
    sample = np.concatenate(lengths, axis=1)
    if not sample.size:
        raise InputError(f"{spec.dataset_file_path}: no usable row among {first}", "anchor prepare says why")
    drawn = np.random.default_rng(0).integers(sample.shape[1], size=first)
    taken = sample.shape[1]
    description = f"{spec.dataset_file_path} (raw; lengths of a sample of {taken:,} rows, rejected rows not taken off)"
    queries, documents, *rest = (side[drawn].astype(np.int32) for side in sample)
    negatives = Negatives(rest[0], rest[1], int(rest[2].max())) if rest else None
    return Rows(queries, documents, round(targets * first / taken), cut / taken, description, negatives)


def _negative_counts(table: Any) -> tuple[Any, Any, Any]:
    """Of each row's negatives: how many, their tokens, the longest."""
    rows = table["negative_lengths"].to_pylist()
    return [len(row) for row in rows], [sum(row) for row in rows], [max(row, default=0) for row in rows]


def _targets(spec: RunSpec, table: Any, eos_token_id: int) -> int:
    total = 0
    for side in ("query", "document"):
        inner_eos = table[f"{side}_inner_eos"].to_numpy()
        total += int(table[f"{side}_length"].to_numpy().sum()) - table.num_rows - int(inner_eos.sum())
        if spec.reconstruction_targets == "content":
            starts = table[f"{side}_content_start"].to_numpy()
            total -= int(starts.sum())
            for row in np.flatnonzero(inner_eos).tolist():
                ids = table[f"{side}_ids"][row].values.to_numpy()
                total += int(np.count_nonzero(ids[: starts[row]] == eos_token_id))
    return total
