"""What goes to a worker process and what comes back: a part of a source, and its prepared rows.

Shapes: R rows of a part that passed the checks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anchor_cli.base.contract import TextContract
from anchor_cli.data.prepare.shards import schema_of
from anchor_cli.data.sources.files import Columns, Limits, Part
from anchor_cli.data.text import Int32Array


@dataclass(frozen=True)
class Work:
    """What every worker process gets once."""

    tokenizer: str
    contract: TextContract
    limits: Limits
    leak_folder: Path | None
    near_duplicates: bool
    negatives: bool = False
    """Keep hard negatives, for Stage II."""
    scores: tuple[str, ...] = ()
    """Columns of scores that are kept."""
    separator_as_text: bool = False
    """Read `!@#$%^&*()` as text: no row is a record with an instruction of its own."""

    @property
    def schema(self) -> pa.Schema:
        """Columns of the prepared rows."""
        return schema_of(negatives=self.negatives, scores=self.scores)


@dataclass(frozen=True)
class EvenSample:
    """Take `wanted` of `available` rows, evenly spread: the weight of a source."""

    wanted: int
    available: int

    def takes(self, row: int) -> bool:
        """Whether row `row` (from 0, in the source) is one of them."""
        return (row + 1) * self.wanted // self.available > row * self.wanted // self.available


@dataclass(frozen=True)
class Task:
    """A part, where it comes from, and which of its rows are wanted."""

    part: Part
    columns: Columns
    sample: EvenSample | None
    first_in_source: int


@dataclass(frozen=True)
class Rejected:
    """A row that is left out."""

    row: int
    """From 0, in its file."""
    item: int | None
    """Which of the row's list of documents."""
    reason: str
    """A key of `checks.REASONS`."""
    side: str | None
    """`query` or `document` where one of them is at fault."""
    benchmark: str | None = None


@dataclass(frozen=True)
class Prepared:
    """The rows of a part that passed, and those that did not."""

    num_in: int
    num_left_out: int
    rejected: list[Rejected]
    table: pa.Table
    rows: npt.NDArray[np.int64]  # (R,) row in its file
    items: npt.NDArray[np.int64]  # (R,) which of a list of documents; -1 without a list
    exact_keys: npt.NDArray[np.uint64]  # (R,)
    canonical_keys: npt.NDArray[np.uint64]  # (R,)
    near_keys: npt.NDArray[np.uint64] | None  # (R, bands)
    query_tokens: Int32Array  # (R,) before truncation
    document_tokens: Int32Array  # (R,) before truncation
    negatives_left_out: Counter[str]
    uses: list[Use]  # R


class Use(NamedTuple):
    """How a row is used."""

    language: str
    instruction: str
    """That of its query; empty without one."""
    form: str
    """A key of `instructions.FORMS`."""
