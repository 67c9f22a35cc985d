"""One line of a checklist: what was looked at, ok, warn or fail, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of `anchor doctor` or `anchor plan`. `remedy` is there unless the status is ok."""

    name: str
    status: Status
    message: str
    remedy: str | None = None


def lines_of(check: Check, width: int = 17) -> list[str]:
    """A check as one or two plain lines: `warn  shared memory    64 MB …` and `→ remedy` below."""
    lines = [f"{check.status:<5} {check.name:<{width}} {check.message}"]
    if check.remedy is not None:
        lines.append(f"{'':<5} {'':<{width}} → {check.remedy}")
    return lines
