"""One line of a checklist: what was looked at, ok, warn or fail, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the doctor. `remedy` is there unless the status is ok."""

    name: str
    status: Status
    message: str
    remedy: str | None = None
