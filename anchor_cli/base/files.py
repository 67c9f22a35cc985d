"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed once."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError, RunError

_BLOCK_BYTES = 1 << 20
_HOME = re.compile(r"(?P<before>(?:--[\w-]+=)?(?:[a-z]{2,3}:)?)(?P<path>~[^/]*(?:/.*)?)", re.DOTALL)
_PARTIAL = re.compile(r"\.partial-(?:(?P<host>.+)-)?(?P<process>\d+)$")


def home_expanded(text: str) -> str:
    """`~/…` with the home folder in its place, also behind `--option=` and `LANG:`, where a shell leaves it."""
    match = _HOME.fullmatch(text)
    if match is None:
        return text
    return match["before"] + os.path.expanduser(match["path"])  # noqa: PTH111 - Path's raises for an unknown user


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


def this_host() -> str:
    """This machine's name, as it stands in the names of unfinished files."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname()) or "localhost"


def partial_of(final: Path) -> Path:
    """Where this process writes what will become `final`: `.NAME.partial-HOST-PROCESS`, beside it.

    The host is in it because on a shared disk two nodes may have a process of the same number.
    """
    return final.with_name(f".{final.name}.partial-{this_host()}-{os.getpid()}")


def writer_of(partial: str | Path) -> tuple[str, int] | None:
    """(host, process) that writes an unfinished file or folder, by its name; None for any other name.

    Names without a host were written by an older version: taken as this host's.
    """
    match = _PARTIAL.search(Path(partial).name)
    return None if match is None else (match["host"] or this_host(), int(match["process"]))


def is_abandoned(partial: str | Path) -> bool:
    """Whether an unfinished file or folder was left by a process of this host that is no more.

    Of another host's one cannot know, so it is never abandoned.
    """
    writer = writer_of(partial)
    return writer is not None and writer[0] == this_host() and not _is_alive(writer[1])


def _is_alive(process: int) -> bool:
    """A process that has ended is not, though its parent has not asked for its exit code yet: where no init process
    does (a container without one), it keeps its number for good."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    import psutil

    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:  # /proc hides it, or it has just ended: then the next look finds it gone
        return True


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8) so that a reader, or a crash, sees the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
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
def staged_folder(final: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when whole.

    Yields `partial_of(final)`. On success all of it is flushed to the disk and renamed once; on any exception it is
    removed. An existing `final` is refused, before and at the rename; with `replace` it is moved aside just before the
    rename and removed after it (`sweep_staged` puts it back if the process was killed between the two).

    Raises:
        InputError: `final` exists.
    """
    final = Path(final)
    if final.exists() and not replace:
        raise InputError(f"{final}: exists already", "choose another name or remove it")
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, old = partial_of(final), partial_of(_aside(final))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        fsync_tree(partial)
        if final.exists():  # os.rename would silently replace an empty folder
            if not replace:
                raise InputError(f"{final}: appeared while it was being written", "was the same command started twice?")
            os.rename(final, old)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep_staged(final: str | Path) -> None:
    """Remove what killed processes of this host left of `final`; put back one that was moved aside and not replaced."""
    final = Path(final)
    for name in (_aside(final).name, final.name):
        for left in final.parent.glob(f"{glob.escape(f'.{name}')}.partial-*"):
            if not is_abandoned(left):
                continue
            if name != final.name and not final.exists():
                os.rename(left, final)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _aside(final: Path) -> Path:
    return final.with_name(f"{final.name}.old")


@contextmanager
def one_at_a_time(target: Path, waiting: str) -> Iterator[None]:
    """Only one process of those that want to make `target` is inside the block; the others say `waiting` and wait.

    The kernel frees the lock of a process that ends, however it ends. Where it cannot lock, all go in at once.
    """
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(waiting)
        lock.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # filelock looks whether what it has locked is still there
        lock.release()


@contextmanager
def words_for_disk_errors(
    place: str | Path, done: str = "written", remedy: str = "make room, or choose another place"
) -> Iterator[None]:
    """A disk that is full, read-only or closed to this user is said in one line about `place`.

    Raises:
        RunError: the disk or the user's share of it is full; nothing was `done`, and the `remedy` is the hint.
        InputError: nothing may be written there, or what should be a folder is a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{place}: the disk is full; nothing was {done}", remedy) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            where = error.filename or place
            raise InputError(f"{where}: {error.strerror}", "choose a folder you may write to") from error
        raise


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def free_bytes(path: str | Path) -> int:
    """Free bytes, for this user, on the disk that holds `path` or would hold it."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def in_units(num_bytes: float) -> str:
    """`8.4 GB`, `312 MB`, `20 KB` (powers of 1000)."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes / 1e3:.0f} KB"
