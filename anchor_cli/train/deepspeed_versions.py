"""DeepSpeed releases that compute wrong gradients here, told by version number alone (nothing is imported)."""

from __future__ import annotations

import re

TESTED = "0.19.8"
"""The release whose gradients the tests compare with plain autograd."""

_REFUSED: tuple[tuple[tuple[int, int, int], tuple[int, int, int], str], ...] = (
    (
        (0, 17, 6),
        (0, 18, 2),
        "ZeRO-2 loses gradients of all but the last micro-batch (github.com/deepspeedai/DeepSpeed/issues/7718)",
    ),
    (
        (0, 18, 3),
        (0, 19, 3),
        "ZeRO-2 can drop gradients of a model used twice in one step, as Stage I uses it "
        "(github.com/deepspeedai/DeepSpeed/issues/8224)",
    ),
)


def release_of(version: str) -> tuple[int, int, int]:
    """ "0.18.2+cu130" -> (0, 18, 2); missing or odd parts count as 0."""
    numbers = [int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3]]
    padded = [*numbers, 0, 0, 0]
    return padded[0], padded[1], padded[2]


def refused_deepspeed(version: str) -> str | None:
    """Why this release must not train, in one clause with the upstream issue, or None when it may.

    The ranges are those named in the upstream reports (first and last wrong release, both included).
    """
    release = release_of(version)
    for first, last, reason in _REFUSED:
        if first <= release <= last:
            return f"deepspeed {version}: {reason}"
    return None
