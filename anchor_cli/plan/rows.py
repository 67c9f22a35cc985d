"""Lengths of the rows that a plan is made for: counted, sampled or assumed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anchor_cli.plan.contrast import Negatives, assumed_negatives
from anchor_cli.spec.spec import RunSpec

IntArray = npt.NDArray[np.int32]
ASSUMED_MEAN_SHARE, ASSUMED_DOCUMENT_TOKENS = 0.72, 493
"""Mean document length where no data are at hand: a share of max_seq_length, and not more than what documents have that
are hardly cut (measured on 9,821 Korean and English rows: 368 at 512, 493 at 2,048)."""
ASSUMED_QUERY_TOKENS = 42
"""Mean query length with KURE's instruction (measured on 9,827 rows)."""


@dataclass(frozen=True)
class Rows:
    """Lengths in tokens, [EOS] included. `source`: where they come from, as it is printed."""

    query_lengths: IntArray  # (R,)
    document_lengths: IntArray  # (R,)
    num_targets: int
    truncated_share: float | None
    source: str
    negatives: Negatives | None = None
    """Of Stage II."""

    @property
    def num_rows(self) -> int:
        return len(self.query_lengths)


def assumed_rows(num_rows: int, spec: RunSpec, mean_query: int | None = None, mean_document: int | None = None) -> Rows:
    """Lengths where the data are not at hand: the means given or assumed, and one longest row."""
    usual = min(round(ASSUMED_MEAN_SHARE * spec.max_seq_length), ASSUMED_DOCUMENT_TOKENS)
    document = min(max(4, mean_document or usual), spec.max_seq_length)
    query = min(max(4, mean_query or ASSUMED_QUERY_TOKENS), spec.max_seq_length)
    lengths = np.full(num_rows, document, dtype=np.int32)
    lengths[0] = spec.max_seq_length
    queries = np.full(num_rows, query, dtype=np.int32)
    targets = int(queries.sum(dtype=np.int64) + lengths.sum(dtype=np.int64)) - 2 * num_rows
    negatives = assumed_negatives(num_rows, document, spec) if spec.stage == "II" else None
    kind = "given" if mean_query and mean_document else "assumed"
    source = f"{kind}: queries of {query}, documents of {document} tokens on average"
    if max(mean_query or 0, mean_document or 0) > spec.max_seq_length:
        source += f", cut at max_seq_length {spec.max_seq_length}"
    return Rows(queries, lengths, targets, None, source, negatives)


def scaled(rows: Rows, num_rows: int) -> Rows:
    """A sample of the data, drawn with replacement to the rows of the whole."""
    drawn = np.random.default_rng(0).integers(rows.num_rows, size=num_rows)
    targets = round(rows.num_targets * num_rows / rows.num_rows)
    source = f"{rows.source}, {rows.num_rows:,} rows taken as a sample of {num_rows:,}"
    negatives = rows.negatives
    if negatives is not None:
        negatives = Negatives(negatives.counts[drawn], negatives.tokens[drawn], negatives.longest)
    lengths = rows.query_lengths[drawn], rows.document_lengths[drawn]
    return Rows(*lengths, targets, rows.truncated_share, source, negatives)
