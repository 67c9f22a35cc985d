"""Stale compiler locks: a build killed halfway makes every later run wait for ever.

PyTorch compiles C++/CUDA extensions on first use (DeepSpeed's `FusedAdam`, `DeepSpeedCPUAdam`, `utils`) and guards the
build with a file named `lock`, which it creates with O_EXCL and keeps **open** while it builds. The file outlives a
process that was killed, and the next one waits for it without a time limit and without a word
(https://github.com/pytorch/pytorch/issues/189245, replaced by an OS lock in later PyTorch).

A lock is *stale* when no live process of this host has the file open **and** it is older than `MIN_AGE_S`. The age
guards against a holder that cannot be seen from here: another user's process, another container or host.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

MIN_AGE_S = 600.0
"""Seconds after which an unheld lock counts as left behind (assumption: FusedAdam builds in about a minute)."""


def extension_locks() -> list[Path]:
    """Every lock file of a PyTorch extension build on this host, held or not.

    Builds are one level below `$TORCH_EXTENSIONS_DIR` (`<name>/lock`) or two (`py311_cu130/<name>/lock`). Without the
    variable, `torch_extensions` of `$XDG_CACHE_HOME` and of `~/.cache` are searched.
    """
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    caches = {Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"), Path.home() / ".cache"}
    folders = [Path(named)] if named else [cache / "torch_extensions" for cache in caches]
    locks = {path for folder in folders for pattern in ("*/lock", "*/*/lock") for path in folder.glob(pattern)}
    return sorted(path for path in locks if path.is_file())


def stale_extension_locks(min_age_s: float = MIN_AGE_S, now: float | None = None) -> list[Path]:
    """Locks that no live process holds and that are older than `min_age_s` seconds at `now` (unix time)."""
    moment, old = time.time() if now is None else now, {}
    for path in extension_locks():
        with contextlib.suppress(OSError):  # released in the meantime
            stat = path.stat()
            if moment - stat.st_mtime >= min_age_s:  # the time it was made: the holder never writes to it
                old[stat.st_dev, stat.st_ino] = path
    for descriptor in Path("/proc").glob("[0-9]*/fd/*") if old else ():  # Linux; another user's cannot be seen
        with contextlib.suppress(OSError):
            stat = descriptor.stat()
            old.pop((stat.st_dev, stat.st_ino), None)
    return sorted(old.values())


def clear_stale_locks(min_age_s: float = MIN_AGE_S, now: float | None = None) -> list[Path]:
    """Remove the stale locks and return those removed; safe to call from several processes at once.

    The half-built folder stays: ninja rebuilds what is missing.
    """
    removed = []
    for path in stale_extension_locks(min_age_s, now):
        with contextlib.suppress(OSError):  # gone already, or not ours to remove: doctor names it
            path.unlink()
            removed.append(path)
    return removed
