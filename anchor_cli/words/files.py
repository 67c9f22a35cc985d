"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anchor_cli.words.errors import InputError

_BLOCK_BYTES = 1 << 20


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def fsync_folder(path: Path) -> None:
    """Flush a file or a folder's entries to the disk: after a rename, of the parent folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: str | Path) -> None:
    """Flush every file below `folder`, then every folder, `folder` itself last."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                fsync_folder(path)
        fsync_folder(Path(parent))


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) so that a reader, or a crash, sees the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json(path: str | Path, obj: Any) -> None:
    """`write_text_atomic` of `obj` as indented JSON, keys in their given order, Korean readable."""
    write_text_atomic(path, json.dumps(obj, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextmanager
def staged_folder(final: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when whole.

    Yields `.{name}.partial-<pid>` beside `final`. On success all of it is flushed to the disk and renamed once; on any
    exception it is removed. An existing `final` is refused, before and at the rename.

    Raises:
        InputError: `final` exists.
    """
    final = Path(final)
    if final.exists():
        raise InputError(f"{final}: exists already", "choose another name or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        fsync_tree(partial)
        if final.exists():  # os.rename would silently replace an empty folder
            raise InputError(f"{final}: appeared while it was being written", "was the same command started twice?")
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(final.parent)


def free_bytes(path: str | Path) -> int:
    """Free bytes, for this user, on the disk that holds `path` or would hold it."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
