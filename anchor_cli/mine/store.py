"""What a mining keeps while it works, so that it goes on after any kill: chunks that are whole or absent.

    {out}.mining/
      plan.json                     what is mined, with what: another plan starts afresh; {} until it is known
      pairs-0123456789ab/           raw pairs, prepared
      queries.f32, documents.f32    embeddings, float32, one row a text
      documents-00012.done          the rows of chunk 12 are on the disk
      negatives-00003.npz           the negatives of the queries of chunk 3
      cross_encoder-00003.npz       a cross-encoder's scores of chunk 3

A chunk depends on nothing but the plan: which process makes it, and when, changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.console import progress
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import fsync_folder, write_json

PLAN = "plan.json"
Float32Array = npt.NDArray[np.float32]
_LOOK_EVERY_S = 0.2


def chunks_of(num_items: int, size: int) -> list[range]:
    """Numbers 0 … num_items - 1 in runs of `size`."""
    return [range(start, min(start + size, num_items)) for start in range(0, num_items, size)]


def require_ours(folder: Path) -> None:
    """Refuse a folder that holds files which no mining wrote. Raises InputError."""
    if folder.is_dir() and not (folder / PLAN).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: holds files that anchor mine did not write", "name a new folder with --work-dir")


def claim(folder: Path) -> None:
    """`require_ours`, and mark it as a mining's before anything is written into it. Raises InputError."""
    require_ours(folder)
    if not (folder / PLAN).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, {})


class Store:
    """The folder of one mining."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove everything that depends on the plan; a log, or what is not a mining's, stays."""
        of_texts = [f"{name}{ending}" for name in ("queries", "documents") for ending in (".f32", "-*.done")]
        for pattern in (*of_texts, "negatives-*.npz", "cross_encoder-*.npz", ".*.partial"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def vectors(self, name: str, num_rows: int, dimension: int) -> Float32Array:
        """(num_rows, dimension) embeddings, memory-mapped, to be written and read."""
        path, size = self.folder / f"{name}.f32", num_rows * dimension * 4
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, size)
                if hasattr(os, "posix_fallocate") and size:  # else a full disk is a SIGBUS when the map is written
                    os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
        return np.memmap(path, dtype=np.float32, mode="r+", shape=(num_rows, dimension))

    def is_done(self, name: str, chunk: int) -> bool:
        """Whether the rows of a chunk of vectors are on the disk."""
        return self._marker(name, chunk).exists()

    def mark_done(self, name: str, chunk: int) -> None:
        """Flush the file of vectors, then say that a chunk of it is there."""
        descriptor = os.open(self.folder / f"{name}.f32", os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._marker(name, chunk).touch()
        fsync_folder(self.folder)

    def _marker(self, name: str, chunk: int) -> Path:
        return self.folder / f"{name}-{chunk:05d}.done"

    def result(self, chunk: int, name: str = "negatives") -> Path:
        """The file of a chunk of negatives, or of their scores."""
        return self.folder / f"{name}-{chunk:05d}.npz"

    def write_result(self, chunk: int, arrays: dict[str, npt.NDArray[Any]], name: str = "negatives") -> None:
        """Write a chunk: whole under its name, or not there."""
        partial = self.folder / f".{name}-{chunk:05d}.{os.getpid()}.partial"
        with open(partial, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.result(chunk, name))
        fsync_folder(self.folder)


def share_out(
    label: str,
    chunks: list[range],
    is_done: Callable[[int], bool],
    work: Callable[[int], None],
    rank: int,
    world_size: int,
) -> None:
    """Do this rank's chunks of texts, then wait for the others', with a progress bar of what all have done.

    A chunk falls to one rank by its number. A rank that dies ends the others through their launcher.
    """
    with progress(label, sum(map(len, chunks)), "texts") as bar:
        shown = 0

        def show() -> bool:
            nonlocal shown
            done = sum(len(texts) for chunk, texts in enumerate(chunks) if is_done(chunk))
            bar.advance(done - shown)
            shown = done
            return done == sum(map(len, chunks))

        for chunk in range(rank, len(chunks), world_size):
            if not is_done(chunk):
                work(chunk)
            show()
        while not show():
            time.sleep(_LOOK_EVERY_S)
