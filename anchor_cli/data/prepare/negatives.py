"""A row's hard negatives and their scores, for Stage II: checked one by one, tokenised, and as columns.

A negative that cannot be used is left out of its row and counted; the row stays, without negatives if need be. Scores
belong to documents by their place, so scores that are not one number for each of a row's documents reject the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from anchor_cli.data.pairs import SCORE_COLUMNS, text_key
from anchor_cli.data.prepare.checks import text_fault
from anchor_cli.data.prepare.leaks import LeakIndex
from anchor_cli.data.prepare.shards import NEGATIVE_COLUMNS
from anchor_cli.data.sources.files import Columns, Fault
from anchor_cli.data.text import TokenisedText, canonical, content_of

_LARGEST = float(np.finfo(np.float32).max)  # scores are kept as float32


@dataclass
class Negatives:
    """The negatives of one row that are used, best first."""

    texts: list[str] = field(default_factory=list)
    scores: dict[tuple[str, ...], list[float]] = field(default_factory=dict)
    """By entry of `pairs.SCORE_COLUMNS`: the scores of the positive and of `texts`."""
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
        scores = _scores(dict(zip(columns.scores, values[len(columns.negatives) :], strict=True)), len(texts))
        if scores is None:
            return None
        used = Negatives(scores={names: of_row[:1] for names, of_row in scores.items()})
        taken = {canonical(query): "negative_is_query", canonical(document): "negative_is_positive"}
        for place, text in enumerate(texts, 1):
            fault = (
                text.reason if isinstance(text, Fault) else text_fault(text, self.max_characters, escaped_bytes=escaped)
            )
            fault = fault or taken.get(canonical(text))
            if fault is None and self.leaks is not None and (leak := self.leaks.find(text)) is not None:
                fault = leak.reason
            if fault is not None:
                used.left_out[fault] += 1
                continue
            taken[canonical(text)] = "negative_repeated"
            used.texts.append(text)
            for names, of_row in scores.items():
                used.scores[names].append(of_row[place])
        return used


def _texts(values: Sequence[Any]) -> list[Any]:
    """Lists as they are; of columns such as negative_1, negative_2 those that the row has."""
    texts: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            texts += value
        elif value is not None:
            texts.append(value)
    return texts


def _scores(values: dict[str, Any], num_negatives: int) -> dict[tuple[str, ...], list[float]] | None:
    """[positive, negative 1, …] by entry of `SCORE_COLUMNS`. None: some are not one finite number a document."""
    by_columns: dict[tuple[str, ...], list[float]] = {}
    for names in SCORE_COLUMNS:
        scores: list[Any] = []
        for value in (values[name] for name in names if name in values):
            scores += value if isinstance(value, list | tuple) else [value]
        usable = all(isinstance(score, int | float) and abs(score) <= _LARGEST for score in scores)  # NaN is not
        if names[0] in values:
            if not usable or len(scores) != 1 + num_negatives:
                return None
            by_columns[names] = [float(score) for score in scores]
    return by_columns


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
        for names, scores in row.scores.items():
            row.scores[names] = [score for score, good in zip(scores, [True, *usable], strict=True) if good]
        tokens.append([text for text, good in zip(texts, usable, strict=True) if good and text is not None])
    return tokens


def negative_columns(
    pairs: Sequence[tuple[str, str]],
    rows: Sequence[Negatives],
    tokens: Sequence[Sequence[TokenisedText]],
    scores: Sequence[str],
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
    for names in SCORE_COLUMNS:
        if names[0] in scores and len(names) == 1:
            columns[names[0]] = _lists([row.scores[names] for row in rows], np.float32)
        elif names[0] in scores:
            columns[names[0]] = pa.array(np.array([row.scores[names][0] for row in rows], dtype=np.float32))
            columns[names[1]] = _lists([row.scores[names][1:] for row in rows], np.float32)
    return [columns[name] for name in (*NEGATIVE_COLUMNS, *scores)]


def _lists(rows: Sequence[Any], dtype: Any) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if len(rows) else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
