"""Stale compiler locks: a build killed halfway makes every later run wait for ever.

PyTorch compiles C++/CUDA extensions on first use (DeepSpeed's `FusedAdam`, `DeepSpeedCPUAdam`, `utils`) and guards the
build with a file named `lock`, which it creates with O_EXCL and keeps **open** while it builds. The file outlives a
process that was killed, and the next one waits for it without a time limit and without a word
(https://github.com/pytorch/pytorch/issues/189245, replaced by an OS lock in later PyTorch).

A lock is called *stale* here when no live process of this host has the file open **and** it is older than
`MIN_AGE_S`. The age guards against a holder that cannot be seen from here: another user's process, another
container, or another host that shares the home folder (assumption: no extension of ours takes longer to build).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

MIN_AGE_S = 600.0
"""Seconds after which an unheld lock counts as left behind (assumption: FusedAdam builds in about a minute)."""


def extension_folders() -> list[Path]:
    """Folders in which PyTorch builds extensions: `$TORCH_EXTENSIONS_DIR`, else `~/.cache/torch_extensions`.

    PyTorch's own default also depends on `$XDG_CACHE_HOME`; all that exist are given.
    """
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return [folder for folder in [Path(named)] if folder.is_dir()]
    caches = [Path.home() / ".cache"]
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and Path(xdg) not in caches:
        caches.insert(0, Path(xdg))
    return [cache / "torch_extensions" for cache in caches if (cache / "torch_extensions").is_dir()]


def extension_locks() -> list[Path]:
    """Every lock file of a PyTorch extension build on this host, held or not.

    A build folder lies one level down (`$TORCH_EXTENSIONS_DIR/<name>/lock`) or two (`py311_cu130/<name>/lock`).
    """
    found: set[Path] = set()
    for folder in extension_folders():
        for pattern in ("*/lock", "*/*/lock"):
            found.update(path for path in folder.glob(pattern) if path.is_file())
    return sorted(found)


def open_files(paths: list[Path]) -> set[Path]:
    """Those of `paths` that a live process of this host has open (Linux `/proc/<pid>/fd`; else none can be told)."""
    wanted: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        wanted[(stat.st_dev, stat.st_ino)] = path
    held: set[Path] = set()
    if not wanted:
        return held
    for fd_folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            entries = list(os.scandir(fd_folder))
        except OSError:  # the process is gone, or belongs to somebody else
            continue
        for entry in entries:
            try:
                stat = os.stat(entry.path)
            except OSError:
                continue
            path_or_none = wanted.get((stat.st_dev, stat.st_ino))
            if path_or_none is not None:
                held.add(path_or_none)
    return held


def stale_extension_locks(min_age_s: float = MIN_AGE_S, now: float | None = None) -> list[Path]:
    """Locks that no live process holds and that are older than `min_age_s` seconds.

    Args:
        min_age_s: seconds since the lock was made (its mtime: the holder never writes to it).
        now: unix seconds to compare with; the clock when None.
    """
    moment = time.time() if now is None else now
    old: list[Path] = []
    for path in extension_locks():
        try:
            if moment - path.stat().st_mtime >= min_age_s:
                old.append(path)
        except OSError:  # released in the meantime
            continue
    held = open_files(old)
    return [path for path in old if path not in held]


def clear_stale_locks(min_age_s: float = MIN_AGE_S, now: float | None = None) -> list[Path]:
    """Remove the stale locks and return those removed; safe to call from several processes at once.

    Never removes a lock that a live process has open, nor one younger than `min_age_s`. The half-built folder stays:
    ninja rebuilds what is missing.
    """
    removed: list[Path] = []
    for path in stale_extension_locks(min_age_s, now):
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError:  # not ours to remove: doctor names it
            continue
        removed.append(path)
    return removed
