"""Models by name: a checkpoint, an export, a folder, a Hub id. Nothing is loaded, so a wrong name is known at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anchor_cli.base.checkpoints import (
    checkpoint_of,
    default_checkpoint,
    find_checkpoint,
    list_checkpoints,
    require_whole,
)
from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError, first_line
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent, is_hub_id

_NOT_WEIGHTS = ["*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.ot", "openvino/*", "onnx/*", "*.gguf"]


@dataclass(frozen=True)
class ModelPlace:
    """A model to evaluate."""

    name: str
    """As shown and as in the JSON: its folder, or its Hub id."""
    folder: Path


def resolve_models(names: Sequence[str], *, default: bool = True) -> list[ModelPlace]:
    """The folders that `names` mean: paths, checkpoints of runs, Hub ids. Without names the default checkpoint.

    Raises:
        InputError: not found, here or on the Hub; ambiguous, half-written, or not a model folder.
    """
    if not names and default:
        folder = default_checkpoint("evaluating", "anchor eval")
        return [_checked(str(folder), folder)]
    places = [_place(name) for name in names]
    for index, place in enumerate(places):
        if place.folder.resolve() in [other.folder.resolve() for other in places[:index]]:
            raise InputError(f"{names[index]}: given twice, {place.folder}")
    return places


def model_or_run(name: str) -> ModelPlace:
    """One of `resolve_models`; of a run the best checkpoint, else the newest. Raises InputError."""
    try:
        folder = find_checkpoint(name)
    except InputError:
        return _place(name)
    if list_checkpoints(folder):
        folder = checkpoint_of(folder, "this run", "searching with", "anchor search")
    return _checked(str(folder), folder)


def _place(name: str) -> ModelPlace:
    try:
        folder = find_checkpoint(name)
    except InputError as error:
        if not is_hub_id(name) or "checkpoint" in name:
            raise
        return _checked(name, _from_hub(name, error))
    return _checked(str(folder), folder)


def _checked(name: str, folder: Path) -> ModelPlace:
    """The place, once it is sure that a whole model is there."""
    require_whole(folder)
    if (folder / "config.json").is_file() or (folder / "modules.json").is_file():
        return ModelPlace(name, folder)
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: an adapter (PEFT), not a model", "merge it into its base model first")
    inside = [path.name for path in list_checkpoints(folder)]
    hint = f"name one of its checkpoints: {', '.join(inside)}" if inside else "expected a checkpoint or a model folder"
    raise InputError(f"{folder}: not a model: no config.json and no modules.json", hint)


def _from_hub(name: str, not_here: InputError) -> Path:
    go_offline_if_the_hub_is_silent()
    from huggingface_hub import snapshot_download

    say(f"{name}: fetching from the Hub")
    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_WEIGHTS))
    except Exception as error:
        raise InputError(f"{not_here.message}; nor on the Hub: {first_line(error)}", not_here.hint) from error
