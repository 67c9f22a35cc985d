"""What Stage II reads of prepared rows: negatives of any number, known positives of a query, teacher scores.

Sets that were prepared without negatives serve as well: their rows have none. Shapes: R rows of the set, G rows of a
step, N documents of it, U different texts of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from anchor_cli.data.pairs import SCORE_COLUMNS, PreparedPairs, text_key
from anchor_cli.data.text import Int32Array

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepTexts:
    """The texts of one step, each different one once, and whose they are; the same on every rank."""

    ids: list[Int32Array]
    """U token ids, in the order in which rows and their documents come."""
    content_starts: Int64Array  # (U,)
    queries: Int64Array  # (G,) which of `ids` is the row's query
    documents: Int64Array  # (N,) which of `ids` is the document; row 0's positive, its negatives, row 1's positive, …
    places: list[tuple[int, int]]
    """(U,) where a text first came from: (row, 0 for its query, 1 for its positive, 2 … for its negatives)."""
    first: Int64Array  # (G + 1,) row i's documents are first[i] … first[i + 1] - 1
    known_positives: Int64Array  # (2, P) (row of the step, document): the same text as a known positive of the query
    languages: Int64Array  # (G,) a number a language
    scores: npt.NDArray[np.float32] | None  # (N,) a teacher's

    @property
    def lengths(self) -> Int64Array:
        """(U,) tokens."""
        return np.array([len(text) for text in self.ids], dtype=np.int64)


class ContrastData:
    """Prepared rows as Stage II reads them. Token ids and texts stay memory-mapped; counts, lengths and keys do not."""

    def __init__(self, pairs: PreparedPairs, num_hard_negatives: int | None = None) -> None:
        self.pairs = pairs
        self._most = num_hard_negatives
        self._has_negatives = pairs.has_column("negative_ids")
        self.scores_from = next((names for names in SCORE_COLUMNS if all(map(pairs.has_column, names))), ())
        """The columns of the teacher's scores: the first of `SCORE_COLUMNS` that the rows have."""

    @cached_property
    def counts(self) -> Int64Array:
        """(R,) negatives of each row that are used."""
        if not self._has_negatives:
            return np.zeros(self.pairs.num_rows, dtype=np.int64)
        counts = np.diff(self._length_lists[0])
        return counts if self._most is None else np.minimum(counts, self._most)

    @cached_property
    def _length_lists(self) -> tuple[Int64Array, Int32Array]:
        """(R + 1,) offsets, and the lengths of all negatives."""
        return self.pairs.lists("negative_lengths")

    def text_lengths(self, rows: npt.ArrayLike) -> tuple[Int64Array, Int64Array]:
        """Tokens of every text of `rows` (query, positive, negatives), one row after the other; (rows + 1,) offsets."""
        rows = np.asarray(rows, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.counts[rows] + 2)])
        lengths = np.empty(offsets[-1], dtype=np.int64)
        lengths[offsets[:-1]] = self.pairs.query_lengths[rows]
        lengths[offsets[:-1] + 1] = self.pairs.document_lengths[rows]
        if self._has_negatives:
            starts, values = self._length_lists
            row, place = _ranges(self.counts[rows])
            lengths[offsets[row] + 2 + place] = values[starts[rows][row] + place]
        return lengths, offsets

    @cached_property
    def row_lengths(self) -> Int64Array:
        """(R,) tokens of all texts of each row."""
        lengths, offsets = self.text_lengths(np.arange(self.pairs.num_rows))
        sums = np.concatenate([[0], np.cumsum(lengths)])
        return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]])

    @cached_property
    def longest_text(self) -> int:
        """Tokens of the longest text."""
        return int(self.text_lengths(np.arange(self.pairs.num_rows))[0].max())

    @cached_property
    def _keys(self) -> tuple[Int64Array, Int64Array]:
        """(R,) keys of queries and of positives; made of the texts where the set has none."""
        if self._has_negatives:
            return self.pairs.numbers("query_key", np.int64), self.pairs.numbers("document_key", np.int64)
        both = [[text_key(text) for text in self.pairs.strings(name)] for name in ("anchor", "positive")]
        return np.array(both[0], dtype=np.int64), np.array(both[1], dtype=np.int64)

    @cached_property
    def _by_query(self) -> tuple[Int64Array, Int64Array]:
        """(R,) query keys in order, and the positive's key of each."""
        queries, documents = self._keys
        order = np.argsort(queries, kind="stable")
        return queries[order], documents[order]

    def step(self, rows: Int64Array) -> StepTexts:
        """The texts of `rows`. Texts are the same when all their token ids are."""
        unique: dict[bytes, int] = {}
        ids: list[Int32Array] = []
        starts: list[int] = []
        places: list[tuple[int, int]] = []
        queries, documents, keys, scores = [], [], [], []

        def number(text: Int32Array, start: int, row: int, place: int) -> int:
            index = unique.setdefault(text.tobytes(), len(ids))
            if index == len(ids):
                ids.append(text)
                starts.append(start)
                places.append((row, place))
            return index

        query_ids, positive_ids = self.pairs.tokens(rows)
        _, document_keys = self._keys
        for row, query, positive in zip(rows.tolist(), query_ids, positive_ids, strict=True):
            query_start, positive_start = self.pairs.content_starts(row)
            queries.append(number(query, query_start, row, 0))
            documents.append(number(positive, positive_start, row, 1))
            keys.append(document_keys[row : row + 1])
            num = int(self.counts[row])
            if num:
                texts, content_starts, negative_keys = self._negatives(row, num)
                documents += [
                    number(text, start, row, place)
                    for place, (text, start) in enumerate(zip(texts, content_starts, strict=True), 2)
                ]
                keys.append(negative_keys)
            if self.scores_from:
                scores.append(self._scores(row)[: 1 + num])
        first = np.concatenate([[0], np.cumsum(self.counts[rows] + 1)])
        documents_ = np.array(documents, dtype=np.int64)
        names = np.array([self.pairs.language(row) for row in rows.tolist()])
        return StepTexts(
            ids,
            np.array(starts, dtype=np.int64),
            np.array(queries, dtype=np.int64),
            documents_,
            places,
            first,
            self._known_positives(rows, np.concatenate(keys), documents_, first),
            np.unique(names, return_inverse=True)[1].astype(np.int64),
            np.concatenate(scores) if scores else None,
        )

    def _negatives(self, row: int, num: int) -> tuple[list[Int32Array], list[int], Int64Array]:
        lengths = self.pairs.list_cell("negative_lengths", row, np.int32)
        texts = np.split(self.pairs.list_cell("negative_ids", row, np.int32).copy(), np.cumsum(lengths)[:-1])
        starts = self.pairs.list_cell("negative_content_starts", row, np.int32)
        keys = self.pairs.list_cell("negative_keys", row, np.int64)
        return texts[:num], starts[:num].tolist(), keys[:num]

    def _scores(self, row: int) -> npt.NDArray[np.float32]:
        *alone, lists = self.scores_from
        positive = np.array([self.pairs.cell(row, name) for name in alone], dtype=np.float32)
        return np.concatenate([positive, self.pairs.list_cell(lists, row, np.float32)])

    def negative_texts(self, row: int) -> list[str]:
        """The texts of a row's negatives, for a guide that tokenises by itself."""
        texts: list[str] = self.pairs.cell(row, "negatives") if self._has_negatives else []
        return texts[: int(self.counts[row])]

    def _known_positives(
        self, rows: Int64Array, keys: Int64Array, documents: Int64Array, first: Int64Array
    ) -> Int64Array:
        """Pairs of (row, document) where the document is, by key, a positive that any row of the set gives the query.

        Documents with the very token ids of the row's positive are found, too: texts that are equal up to where they
        were cut.
        """
        queries, positives = self._by_query
        wanted = self._keys[0][rows]
        left, right = np.searchsorted(queries, wanted), np.searchsorted(queries, wanted, side="right")
        row, place = _ranges(right - left)
        by_key = _matches(row, positives[left[row] + place], keys)
        by_ids = _matches(np.arange(len(rows)), documents[first[:-1]], documents)
        return np.unique(np.concatenate([by_key, by_ids], axis=1), axis=1)


def _matches(row: Int64Array, wanted: Int64Array, have: Int64Array) -> Int64Array:
    """(2, P) pairs (row[k], c) with wanted[k] == have[c]."""
    order = np.argsort(have, kind="stable")
    left = np.searchsorted(have[order], wanted)
    right = np.searchsorted(have[order], wanted, side="right")
    which, place = _ranges(right - left)
    return np.stack([row[which], order[left[which] + place]])


def _ranges(counts: Any) -> tuple[Int64Array, Int64Array]:
    """Of counts 2, 0, 3: which 0 0 2 2 2, and place 0 1 0 1 2."""
    which = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    place = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    return which, place
