"""The texts that are mined: distinct queries and documents of prepared pairs, by number, without holding the texts.

    R rows of the pairs, Q distinct queries, N distinct documents (positives first, then the further corpus)

Two texts are the same when their canonical forms are (NFC, white space folded); a text is the one that came first. A
query is its text behind the instruction of its row, as training encodes it: rows of one text under two instructions
are two queries, with the same known positives. Of every text 8 bytes of its hash and a few numbers are held; the texts
stay in the memory-mapped files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from anchor_cli.base.contract import query_prefix
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
    """(N,) row that a document's text is taken from, or R + index of `further`."""
    query_keys: Uint64Array
    """(Q,) hash of the canonical text, without the instruction."""
    document_keys: Uint64Array
    document_characters: Int32Array
    """(N,) length of the canonical text."""

    @property
    def num_queries(self) -> int:
        return len(self.query_source)

    @property
    def num_documents(self) -> int:
        return len(self.document_source)

    def query(self, number: int) -> tuple[str, str, str]:
        """(text, what its row puts before it, language) of a query."""
        row = int(self.query_source[number])
        text, _, language = self.pairs.texts(row)
        return text, prefix_of_row(self.pairs, row, language), language

    def document(self, number: int) -> str:
        """Text of a document."""
        source = int(self.document_source[number])
        return self.pairs.texts(source)[1] if source < len(self.pairs) else self.further[source - len(self.pairs)]

    @cached_property
    def _rows_by_query(self) -> tuple[Int64Array, Int64Array]:
        return _grouped(self.query_of_row, self.num_queries)

    @cached_property
    def _text_of_query(self) -> Int64Array:
        """(Q,) a number for each query's text, whatever the instruction."""
        return np.unique(self.query_keys, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def _rows_by_text(self) -> tuple[Int64Array, Int64Array]:
        return _grouped(self._text_of_query[self.query_of_row], self.num_queries)

    def rows_of(self, query: int) -> Int64Array:
        """Rows with this query, in order."""
        order, starts = self._rows_by_query
        return order[starts[query] : starts[query + 1]]

    def positives_of(self, query: int) -> Int64Array:
        """Every known positive of a query's text: the documents of all its rows, each once."""
        order, starts = self._rows_by_text
        text = self._text_of_query[query]
        return np.unique(self.document_of_row[order[starts[text] : starts[text + 1]]])


def prefix_of_row(pairs: PreparedPairs, row: int, language: str) -> str:
    """What training puts before a row's query: its own instruction, else the set's for the language."""
    own = pairs.query_head(row)
    known = pairs.contract.training_instructions
    return query_prefix(known.get(language, known.get("*"))) if own is None else own


def corpus_of(pairs: PreparedPairs, further: Sequence[str] = ()) -> Corpus:
    """Number the distinct texts of prepared pairs and of further documents, in one pass over both."""
    num_rows, num_documents = len(pairs), len(pairs) + len(further)
    query_keys, whole_keys = np.empty(num_rows, np.uint64), np.empty(num_rows, np.uint64)
    document_keys, characters = np.empty(num_documents, np.uint64), np.empty(num_documents, np.int32)
    for row in range(num_rows):
        query, document, language = pairs.texts(row)
        query, document = canonical(query), canonical(document)
        query_keys[row] = key_of(query)
        whole_keys[row] = key_of(f"{prefix_of_row(pairs, row, language)}\0{query}")
        document_keys[row], characters[row] = key_of(document), len(document)
    for place, document in enumerate(map(canonical, further), num_rows):
        document_keys[place], characters[place] = key_of(document), len(document)
    query_of_row, query_source = _numbered(whole_keys)
    document_of_text, document_source = _numbered(document_keys)
    return Corpus(
        pairs,
        further,
        query_of_row,
        document_of_text[:num_rows],
        query_source,
        document_source,
        query_keys[query_source],
        document_keys[document_source],
        characters[document_source],
    )


def key_of(text: str) -> int:
    """64 bits of BLAKE2b of a canonical text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _numbered(keys: Uint64Array) -> tuple[Int64Array, Int64Array]:
    """(n,) number of each key's text, in the order in which texts come, and the place where each first came."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    numbers = np.empty_like(order)
    numbers[order] = np.arange(len(order))
    return numbers[which], first[order]


def _grouped(numbers: Int64Array, count: int) -> tuple[Int64Array, Int64Array]:
    """Rows in the order of their numbers, and (count + 1,) where each number's rows start there."""
    order = np.argsort(numbers, kind="stable")
    return order, np.searchsorted(numbers[order], np.arange(count + 1))
