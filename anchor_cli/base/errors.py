"""What can go wrong, in the user's words: one line that says it, one line that says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnchorError(Exception):
    """A failure with a message for a person.

    `message` is one line naming the file, the key or row, the value and what was expected.
    `hint` is the remedy, printed as a second line. `exit_code` is the process's exit status.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n{self.hint}"

    def __reduce__(self) -> tuple[type[AnchorError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)  # the hint survives a trip between processes


class RunError(AnchorError):
    """Failed while running: exit code 1."""

    exit_code = 1


class InputError(AnchorError):
    """Wrong usage, spec or input: exit code 2."""

    exit_code = 2


class Stopped(AnchorError):
    """Stopped by a signal after saving; the same command goes on: exit code 75 (BSD's EX_TEMPFAIL)."""

    exit_code = 75


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an exception's text, at most `limit` characters; its type's name where it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:limit]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that `name` is most likely a slip of, or None when none is near.

    Case, '-' and '_' do not count: 'Learning-Rate' is 'learning_rate'.
    """
    plain = {known.lower().replace("-", "_"): known for known in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(plain), n=1, cutoff=0.6)
    return plain[close[0]] if close else None
