"""The process's surroundings made safe at its start: standard streams, whatever they are, and a home folder."""

from __future__ import annotations

import codecs
import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from anchor_cli.base.errors import RunError, first_line

_IN_ASCII = {"→": "->", "…": "...", "×": "x", "·": "-", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "²": "^2", "✓": "ok"}
_stdout_was_closed = False


def prepare_streams() -> None:
    """Make printing safe: a closed stream becomes `/dev/null`, a character that the encoding lacks is written in ASCII.

    Closed descriptors are opened, too: else the next file that is opened takes their number, and what C code prints.
    """
    global _stdout_was_closed
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    _stdout_was_closed = sys.stdout is None
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    codecs.register_error("anchor", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure and not (stream.encoding or "").lower().startswith("utf"):
            reconfigure(errors="anchor")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(
        _IN_ASCII.get(each) or each.encode("ascii", "backslashreplace").decode() for each in missing
    ), error.end


def write_result(text: str, *, ascii_text: str | None = None) -> None:
    """Write a command's result to stdout; `ascii_text` where its encoding cannot say `text`.

    Raises:
        RunError: stdout is closed or full.
    """
    if _stdout_was_closed:
        raise RunError("standard output is closed: the result could not be written")
    if ascii_text is not None:
        try:
            text.encode(sys.stdout.encoding or "ascii")
        except UnicodeEncodeError:
            text = ascii_text
    with _errors_of_stdout():
        sys.stdout.write(text)
        sys.stdout.flush()


def flush_results() -> None:
    """Raises RunError when stdout cannot take what was written; BrokenPipeError when its reader has gone."""
    with _errors_of_stdout():
        sys.stdout.flush()


@contextlib.contextmanager
def _errors_of_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer must go somewhere at exit
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        reason = error.strerror or first_line(error)
        raise RunError(f"standard output: {reason}: the result could not be written") from None


def prepare_home() -> None:
    """Give a user without HOME and without an account (a container's arbitrary uid) a home in the temporary folder.

    Our cache, `~` in paths, and libraries (torch, huggingface_hub, matplotlib) look for one.
    """
    if "HOME" not in os.environ and not _has_account():
        os.environ["HOME"] = str(_own_folder(Path(tempfile.gettempdir(), f"anchor-{os.getuid()}")))
    if not _has_account():
        os.environ.setdefault("USER", f"uid-{os.getuid()}")  # torch names its compile cache by it


def _has_account() -> bool:
    import pwd

    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return True


def _own_folder(folder: Path) -> Path:
    """`folder`, if it can be made ours alone; else a new one."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        known = folder.lstat()
        if stat.S_ISDIR(known.st_mode) and known.st_uid == os.getuid():
            return folder
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
