"""The texts that are mined: distinct queries and documents of prepared pairs, by number, without holding the texts.

    R rows of the pairs, Q distinct queries, N distinct documents (positives first, then the further corpus)

Two texts are the same when their canonical forms are (NFC, white space folded); a text is the one that came first. Of
every text 8 bytes of its hash and a few numbers are held; the texts stay in the memory-mapped files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.text import canonical

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
Uint64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Corpus:
    """Distinct queries and documents, and which rows they belong to."""

    pairs: PreparedPairs
    further: Sequence[str]
    query_of_row: Int64Array
    """(R,) number of each row's query."""
    document_of_row: Int64Array
    """(R,) number of each row's positive."""
    query_source: Int64Array
    """(Q,) row that a query's text is taken from."""
    document_source: Int64Array
    """(N,) row that a document's text is taken from, or -1 - index of `further`."""
    query_keys: Uint64Array
    """(Q,) hash of the canonical text."""
    document_keys: Uint64Array
    document_characters: Int32Array
    """(N,) length of the canonical text."""

    @property
    def num_queries(self) -> int:
        return len(self.query_source)

    @property
    def num_documents(self) -> int:
        return len(self.document_source)

    def query(self, number: int) -> tuple[str, str]:
        """(text, language) of a query."""
        text, _, language = self.pairs.texts(int(self.query_source[number]))
        return text, language

    def document(self, number: int) -> str:
        """Text of a document."""
        source = int(self.document_source[number])
        return self.pairs.texts(source)[1] if source >= 0 else self.further[-1 - source]

    @cached_property
    def _rows_by_query(self) -> tuple[Int64Array, Int64Array]:
        order = np.argsort(self.query_of_row, kind="stable")
        return order, np.searchsorted(self.query_of_row[order], np.arange(self.num_queries + 1))

    def rows_of(self, query: int) -> Int64Array:
        """Rows with this query, in order."""
        order, starts = self._rows_by_query
        return order[starts[query] : starts[query + 1]]

    def positives_of(self, query: int) -> Int64Array:
        """Every known positive of a query: the documents of all its rows, each once."""
        return np.unique(self.document_of_row[self.rows_of(query)])


def corpus_of(pairs: PreparedPairs, further: Sequence[str] = ()) -> Corpus:
    """Number the distinct texts of prepared pairs and of further documents, in one pass over both."""
    queries, documents = _Numbers(), _Numbers()
    query_of_row = np.empty(len(pairs), np.int64)
    document_of_row = np.empty(len(pairs), np.int64)
    for row, (query, document) in enumerate(_sides(pairs)):
        query_of_row[row] = queries.number(query, row)
        document_of_row[row] = documents.number(document, row)
    for index, text in enumerate(further):
        documents.number(canonical(text), -1 - index)
    return Corpus(
        pairs,
        further,
        query_of_row,
        document_of_row,
        np.array(queries.sources, np.int64),
        np.array(documents.sources, np.int64),
        np.array(queries.keys, np.uint64),
        np.array(documents.keys, np.uint64),
        np.array(documents.characters, np.int32),
    )


def _sides(pairs: PreparedPairs) -> Iterator[tuple[str, str]]:
    for row in range(len(pairs)):
        query, document, _ = pairs.texts(row)
        yield canonical(query), canonical(document)


def key_of(text: str) -> int:
    """64 bits of BLAKE2b of a canonical text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class _Numbers:
    """Numbers for distinct texts in the order in which they come; 8 bytes of hash stand for a text."""

    def __init__(self) -> None:
        from array import array

        self._known: dict[int, int] = {}
        self.sources, self.keys, self.characters = array("q"), array("Q"), array("i")

    def number(self, text: str, source: int) -> int:
        key = key_of(text)
        number = self._known.setdefault(key, len(self.keys))
        if number == len(self.keys):
            self.sources.append(source)
            self.keys.append(key)
            self.characters.append(len(text))
        return number
