"""A row's hard negatives and teacher scores, for Stage II: checked one by one, tokenised, and as columns.

A negative that cannot be used is left out of its row and counted; the row stays, without negatives if need be. Scores
belong to documents by their place, so scores that are not one number for each of a row's documents reject the row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from anchor_cli.data.pairs import text_key
from anchor_cli.data.prepare.checks import text_fault
from anchor_cli.data.prepare.leaks import LeakIndex
from anchor_cli.data.prepare.shards import NEGATIVE_COLUMNS, SCORES
from anchor_cli.data.sources.files import Columns, Fault
from anchor_cli.data.text import TokenisedText, canonical, content_of


@dataclass
class Negatives:
    """The negatives of one row that are used, best first."""

    texts: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    """A teacher's scores of the positive and of `texts`; None where the source has no such column."""
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class NegativeChecks:
    """What a negative is checked against, besides its own row."""

    max_characters: int
    leaks: LeakIndex | None
    separator_as_text: bool = False

    def __call__(
        self, columns: Columns, values: Sequence[Any], query: str, document: str, escaped: bool
    ) -> Negatives | None:
        """The usable negatives of a row with `values` in `columns.extra`. None: its scores are not one a document."""
        texts = _texts(values[: len(columns.negatives)])
        if not self.separator_as_text:
            texts = [content_of(text) if isinstance(text, str) else text for text in texts]
        scores = _scores(values[len(columns.negatives) :], len(texts)) if columns.scores else None
        if columns.scores and scores is None:
            return None
        found = Negatives(scores=None if scores is None else scores[:1])
        taken = {canonical(query): "negative_is_query", canonical(document): "negative_is_positive"}
        for place, text in enumerate(texts, 1):
            fault = (
                text.reason if isinstance(text, Fault) else text_fault(text, self.max_characters, escaped_bytes=escaped)
            )
            fault = fault or taken.get(canonical(text))
            if fault is None and self.leaks is not None and (leak := self.leaks.find(text)) is not None:
                fault = leak.reason
            if fault is not None:
                found.left_out[fault] += 1
                continue
            taken[canonical(text)] = "negative_repeated"
            found.texts.append(text)
            if found.scores is not None and scores is not None:
                found.scores.append(scores[place])
        return found


def _texts(values: Sequence[Any]) -> list[Any]:
    """Lists as they are; of columns such as negative_1, negative_2 those that the row has."""
    texts: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            texts += value
        elif value is not None:
            texts.append(value)
    return texts


def _scores(values: Sequence[Any], num_negatives: int) -> list[float] | None:
    """[positive, negative 1, …] from `scores`, or from `positive_score` and `negative_scores`."""
    scores: list[Any] = []
    for value in values:
        scores += value if isinstance(value, list | tuple) else [value]
    usable = all(isinstance(score, int | float) and math.isfinite(score) for score in scores)
    return [float(score) for score in scores] if usable and len(scores) == 1 + num_negatives else None


def encode_negatives(
    rows: Sequence[Negatives], encode: Callable[[list[str]], list[TokenisedText | None]]
) -> list[list[TokenisedText]]:
    """The tokens of every row's negatives; those without a token of content are left out of the row."""
    encoded = iter(encode([text for row in rows for text in row.texts]))
    tokens: list[list[TokenisedText]] = []
    for row in rows:
        texts = [next(encoded) for _ in row.texts]
        usable = [text is not None and text.content_start < len(text.ids) - 1 for text in texts]
        for text, good in zip(texts, usable, strict=True):
            if not good:
                row.left_out["no_room" if text is None else "no_tokens"] += 1
        row.texts = [text for text, good in zip(row.texts, usable, strict=True) if good]
        if row.scores is not None:
            row.scores = [score for score, good in zip(row.scores, [True, *usable], strict=True) if good]
        tokens.append([text for text, good in zip(texts, usable, strict=True) if good and text is not None])
    return tokens


def negative_columns(
    pairs: Sequence[tuple[str, str]], rows: Sequence[Negatives], tokens: Sequence[Sequence[TokenisedText]], scores: bool
) -> list[pa.Array]:
    """The columns of `shards.schema_of` after those of pairs; `pairs` are (query, document)."""
    ids = [np.concatenate([text.ids for text in row]) if row else np.empty(0, np.int32) for row in tokens]
    columns: dict[str, pa.Array] = {
        "negatives": pa.array([row.texts for row in rows], pa.list_(pa.string())),
        "negative_ids": _lists(ids, np.int32),
        "negative_lengths": _lists([[len(text.ids) for text in row] for row in tokens], np.int32),
        "negative_content_starts": _lists([[text.content_start for text in row] for row in tokens], np.int32),
        "query_key": pa.array(np.array([text_key(query) for query, _ in pairs], dtype=np.int64)),
        "document_key": pa.array(np.array([text_key(document) for _, document in pairs], dtype=np.int64)),
        "negative_keys": _lists([[text_key(text) for text in row.texts] for row in rows], np.int64),
    }
    if scores:
        columns[SCORES] = _lists([row.scores or [] for row in rows], np.float32)
    return [columns[name] for name in (*NEGATIVE_COLUMNS, *([SCORES] if scores else []))]


def _lists(rows: Sequence[Any], dtype: Any) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if len(rows) else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
