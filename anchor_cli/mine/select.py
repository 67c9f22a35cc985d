"""Which of a query's nearest documents are taken as negatives of one row: pure functions of scores and texts.

    k candidates, best first; documents are rows of the corpus

In this order: what can never be a negative is taken out (known positives, the query itself, texts too short); the
rank window is laid over what is left; thresholds of score are applied; then negatives are taken, the best first or at
random, each only if its text is no near-duplicate of a known positive.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import InputError

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

REJECTED = {
    "known_positive": "a positive of the same query, in this row or another one",
    "query_itself": "the text of the query",
    "too_short": "fewer characters than --min-characters",
    "rank": "outside --range-min … --range-max",
    "min_score": "less similar to the query than --min-score",
    "max_score": "more similar to the query than --max-score",
    "absolute_margin": "more similar than the positive less --absolute-margin",
    "relative_margin": "more similar than the positive less --relative-margin of it",
    "near_duplicate": "nearly the text of a known positive",
}
"""Every reason for which a candidate is rejected, in the order in which it is looked for."""
REJECTED_BY_A_THRESHOLD = ("min_score", "max_score", "absolute_margin", "relative_margin", "near_duplicate")

SHINGLE = 5  # characters
NEAR_DUPLICATE = 0.8
"""Assumption: texts whose sets of 5-character runs overlap by so much (Jaccard) say the same."""


@dataclass(frozen=True)
class Rules:
    """Which candidates are negatives. Names and meaning are those of sentence-transformers' `mine_hard_negatives`."""

    num_negatives: int = 7
    """Negatives of a row at most; a row with fewer keeps what it has."""
    range_min: int = 0
    """Candidates passed over: the nearest ones, known positives not counted."""
    range_max: int = 100
    """Candidates looked at."""
    min_score: float | None = None
    """Lowest cosine of a negative."""
    max_score: float | None = None
    """Highest cosine of a negative."""
    absolute_margin: float | None = None
    """A negative's cosine is at most the positive's less this."""
    relative_margin: float | None = 0.05
    """A negative's cosine is at most the positive's less this share of its absolute value."""
    sampling: Literal["top", "random"] = "top"
    seed: int = 42
    """Of random sampling; together with the row it decides, whatever the order in which rows are mined."""
    min_characters: int = 10
    """Shorter documents are never negatives."""

    def __post_init__(self) -> None:
        """Raises InputError: an empty window of ranks, or a threshold that is no number."""
        if self.range_min >= self.range_max:
            raise InputError(f"--range-min {self.range_min}: not below --range-max {self.range_max}")
        for name in ("min_score", "max_score", "absolute_margin", "relative_margin"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise InputError(f"--{name.replace('_', '-')} {value}: expected a finite number")


def choose(
    row: int,
    candidates: Int64Array,
    scores: Float64Array,
    positive_score: float,
    rules: Rules,
    never: dict[str, npt.NDArray[np.bool_]],
    near_duplicate: Callable[[int], bool],
    rejected: Counter[str],
) -> list[int]:
    """Places in `candidates` (k,) of a row's negatives, best first.

    Args:
        never: (k,) by reason, candidates that can never be negatives.
        near_duplicate: whether a document is nearly the text of a known positive; asked only where it decides.
        rejected: counts by reason, added to.
    """
    left = np.ones(len(candidates), dtype=bool)
    for reason, mask in never.items():
        rejected[reason] += int((left & mask).sum())
        left &= ~mask
    rank = np.cumsum(left) - 1
    limits = {
        "rank": (rank < rules.range_min) | (rank >= rules.range_max),
        "min_score": _beyond(scores, rules.min_score, below=True),
        "max_score": _beyond(scores, rules.max_score),
        "absolute_margin": _beyond(scores, _less(positive_score, rules.absolute_margin, 1.0)),
        "relative_margin": _beyond(scores, _less(positive_score, rules.relative_margin, abs(positive_score))),
    }
    for reason, mask in limits.items():
        rejected[reason] += int((left & mask).sum())
        left &= ~mask
    places = np.flatnonzero(left)
    if rules.sampling == "random":
        places = np.random.default_rng([rules.seed, row]).permutation(places)
    taken: list[int] = []
    for place in places:
        if len(taken) == rules.num_negatives:
            break
        if near_duplicate(int(candidates[place])):
            rejected["near_duplicate"] += 1
        else:
            taken.append(int(place))
    return sorted(taken)


def _less(positive_score: float, margin: float | None, unit: float) -> float | None:
    return None if margin is None else positive_score - margin * unit


def _beyond(scores: Float64Array, limit: float | None, *, below: bool = False) -> npt.NDArray[np.bool_]:
    """(k,) scores above the limit (or below it); none without a limit."""
    if limit is None:
        return np.zeros(len(scores), dtype=bool)
    return scores < limit if below else scores > limit


def is_near_duplicate(text: str, others: Sequence[str]) -> bool:
    """Whether a canonical text nearly equals one of the others.

    It does when the shorter is at least `NEAR_DUPLICATE` as long as the longer, give or take one run, and their sets of
    5-character runs overlap by at least as much (Jaccard).
    """
    own: set[str] | None = None
    for other in others:
        short, long = sorted((len(text), len(other)))
        if short < NEAR_DUPLICATE * long - SHINGLE:
            continue
        own = own if own is not None else _shingles(text)
        theirs = _shingles(other)
        if len(own & theirs) >= NEAR_DUPLICATE * len(own | theirs):
            return True
    return False


def _shingles(text: str) -> set[str]:
    return {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}
