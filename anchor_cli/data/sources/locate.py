"""Which files a SOURCE of the command line means: a file, a glob, a folder of save_to_disk, a folder of data files."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError, nearest
from anchor_cli.base.hub import hub_hint
from anchor_cli.data.sources.file_bytes import format_of

KNOWN_FORMATS = "expected .jsonl .json .csv .tsv .parquet .arrow, plain, .gz or .zst"
SPLITS_FILE = "dataset_dict.json"
_OTHER_PACKING = {".bz2", ".xz", ".zip", ".7z", ".lz4", ".br", ".snappy", ".tar", ".tgz", ".rar", ".z"}


def matching_files(spec: str) -> list[Path]:
    """The file, or the files of a glob in order of name.

    Raises:
        InputError: there is none, or one is of an unknown kind.
    """
    paths = _matching(spec)
    for path in paths:
        if format_of(path) is None:
            raise InputError(f"{path}: unknown kind of file", KNOWN_FORMATS)
    return paths


def _matching(spec: str) -> list[Path]:
    place = Path(spec).expanduser()
    if place.is_file():
        return [place]
    if not glob.has_magic(spec):
        hints = [_near_file(place), None if format_of(spec) else hub_hint(spec)]
        raise InputError(f"{spec}: no such file or folder", "; ".join(hint for hint in hints if hint) or None)
    paths = [Path(name) for name in sorted(glob.glob(str(place), recursive=True)) if Path(name).is_file()]
    if not paths:
        raise InputError(f"{spec}: no file matches", "quote a pattern, so that the shell leaves it alone")
    return paths


def _near_file(place: Path) -> str | None:
    if not place.parent.is_dir():
        return f"{place.parent} is no folder either"
    near = nearest(place.name, [path.name for path in place.parent.iterdir()])
    return f"did you mean {place.parent / near}?" if near else None


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The data files of a Dataset, of a DatasetDict's split, or of a plain folder, in their order.

    Raises:
        InputError: there is none, a file is missing, or which split is meant is not clear.
    """
    if (folder / SPLITS_FILE).is_file():
        splits: list[str] = _json(folder / SPLITS_FILE).get("splits", [])
        chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else None)
        if chosen is None or chosen not in splits:
            raise InputError(f"{folder}: which split: {', '.join(splits)}", "name one with --split NAME")
        if split is None:
            say(f"{folder}: split {chosen} of {', '.join(splits)}")
        folder = folder / chosen
    if (folder / "state.json").is_file():
        state = _json(folder / "state.json")
        if state.get("_indices_data_files"):
            remedy = "load_from_disk(…).flatten_indices().save_to_disk(…) writes it anew"
            raise InputError(f"{folder}: written by an old datasets, with an indices mapping", remedy)
        paths = [folder / entry["filename"] for entry in state.get("_data_files", [])]
        if missing := [path for path in paths if not path.is_file()]:
            raise InputError(f"{missing[0]}: not found, but {folder / 'state.json'} names it", "is the folder whole?")
        return paths
    return _data_files(folder)


def _data_files(folder: Path) -> list[Path]:
    """A plain folder's data files in order of name; names that begin with a dot are hidden files, such as macOS's ._x.

    Raises:
        InputError: there is none, or data are packed in a way that is not read.
    """
    entries = sorted(folder.iterdir())
    paths = [path for path in entries if path.is_file() and format_of(path) and not path.name.startswith(".")]
    for path in entries:
        if format_of(path) is None and format_of(path.stem) and path.suffix.lower() in _OTHER_PACKING:
            raise InputError(f"{path}: {path.suffix} is not read", f"unpack it; {KNOWN_FORMATS}")
    if not paths:
        inside = [path.name for path in entries if path.is_dir() and any(map(format_of, path.iterdir()))]
        hint = f"name a folder in it: {', '.join(inside)}" if inside else "expected save_to_disk's files, or data files"
        raise InputError(f"{folder}: no data in it", hint)
    say(f"{folder}: reading {len(paths)} file{'s' * (len(paths) > 1)}: {_first_five(paths)}")
    if others := [path for path in entries if path not in paths]:
        say(f"{folder}: not read: {_first_five(others)}")
    return paths


def _first_five(paths: list[Path]) -> str:
    return f"{', '.join(path.name + '/' * path.is_dir() for path in paths[:5])}{', …' * (len(paths) > 5)}"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    return content if isinstance(content, dict) else {}
