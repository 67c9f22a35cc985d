"""A part of a source becomes prepared rows: parsed, checked, tokenised. This is what worker processes do.

Everything here depends on one row alone, so rows may be worked on in any number of processes and parts; what depends on
the rows before (duplicates) is decided in `prepare`, in the order of the source. Shapes: R rows that passed the checks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anchor_cli.base.contract import TextContract
from anchor_cli.data.prepare.checks import pair_key, row_language, text_fault
from anchor_cli.data.prepare.leaks import LeakIndex
from anchor_cli.data.prepare.negatives import NegativeChecks, Negatives, encode_negatives, negative_columns
from anchor_cli.data.prepare.parse import rows_of_part
from anchor_cli.data.prepare.shards import schema_of
from anchor_cli.data.sources.files import Columns, Fault, Limits, Part
from anchor_cli.data.text import Int32Array, TextEncoder, TokenisedText, canonical, load_tokenizer

_ENCODE_CHARACTERS = 1 << 18  # an encoding takes some hundred bytes a character while it lives
_ENCODE_TEXTS = 128


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
    scores: bool = False
    """Keep a teacher's scores of them."""

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


@dataclass
class _Pair:
    row: int
    item: int | None
    query: str
    document: str
    language: str
    canonical_key: int
    negatives: Negatives


class RowMaker:
    """Turns tasks into prepared rows."""

    def __init__(self, work: Work) -> None:
        self._work, self._contract = work, work.contract
        tokenizer = load_tokenizer(work.tokenizer)
        self._encoder = TextEncoder(tokenizer, work.contract.text_template, work.contract.max_seq_length)

    @cached_property
    def _negative_checks(self) -> NegativeChecks:
        return NegativeChecks(self._work.limits.characters, self._leaks)

    @cached_property
    def _leaks(self) -> LeakIndex | None:
        return None if self._work.leak_folder is None else LeakIndex.load(self._work.leak_folder)

    def __call__(self, task: Task) -> Prepared:
        """Parse, check and tokenise one part."""
        rejected: list[Rejected] = []
        pairs: list[_Pair] = []
        num_in = num_left_out = 0
        for row, item, query, document, language, extra in self._items(task):
            if task.sample is not None and not task.sample.takes(task.first_in_source + row - task.part.first_row):
                num_left_out += 1
                continue
            num_in += 1
            escaped = task.part.kind == "rows"
            checked = self._check(row, item, query, document, language, escaped=escaped)
            if isinstance(checked, _Pair) and task.columns.extra:
                negatives = self._negative_checks(task.columns, extra, query, document, escaped)
                unlike = Rejected(row, item, "scores_unlike", None)
                checked = unlike if negatives is None else replace(checked, negatives=negatives)
            (rejected if isinstance(checked, Rejected) else pairs).append(checked)  # type: ignore[arg-type]
        return self._prepared(num_in, num_left_out, rejected, pairs)

    def _items(self, task: Task) -> Iterator[tuple[int, int | None, Any, Any, Any, Sequence[Any]]]:
        for row, (query, document, language, *extra) in rows_of_part(task.part, task.columns):
            if isinstance(document, list | tuple) and document:
                for item, one in enumerate(document):
                    yield row, item, query, one, language, extra
            else:
                yield row, None, query, "" if document == [] else document, language, extra

    def _check(
        self, row: int, item: int | None, query: Any, document: Any, language: Any, escaped: bool
    ) -> _Pair | Rejected:
        most = self._work.limits.characters
        for side, text in (("query", query), ("document", document)):
            fault = text.reason if isinstance(text, Fault) else text_fault(text, most, escaped_bytes=escaped)
            if fault is not None:
                whole_row = isinstance(query, Fault) and isinstance(document, Fault)
                return Rejected(row, item, fault, None if whole_row else side)
        same_query, same_document = canonical(query), canonical(document)
        if same_query == same_document:
            return Rejected(row, item, "query_is_document", None)
        language = None if isinstance(language, Fault) else row_language(language, query, document)
        if language is None or self._instruction(language) is None:
            return Rejected(row, item, "unknown_language", None)
        if self._leaks is not None:
            for side, text in (("query", query), ("document", document)):
                if (leak := self._leaks.find(text)) is not None:
                    return Rejected(row, item, leak.reason, side, leak.benchmark)
        return _Pair(row, item, query, document, language, pair_key(same_query, same_document), Negatives())

    def _instruction(self, language: str) -> str | None:
        known = self._contract.training_instructions
        return known.get(language, known.get("*"))

    def _prepared(self, num_in: int, num_left_out: int, rejected: list[Rejected], pairs: list[_Pair]) -> Prepared:
        queries: list[TokenisedText | None] = [None] * len(pairs)
        by_instruction: dict[str, list[int]] = {}
        for index, pair in enumerate(pairs):
            by_instruction.setdefault(self._instruction(pair.language) or "", []).append(index)
        for instruction, members in by_instruction.items():
            encoded = self._encode([pairs[index].query for index in members], instruction or None)
            for index, text in zip(members, encoded, strict=True):
                queries[index] = text
        documents = self._encode([pair.document for pair in pairs], None)
        kept: list[tuple[_Pair, TokenisedText, TokenisedText]] = []
        for pair, query, document in zip(pairs, queries, documents, strict=True):
            for side, text in (("query", query), ("document", document)):
                if text is None or text.content_start == len(text.ids) - 1:
                    reason = "no_room" if text is None else "no_tokens"
                    rejected.append(Rejected(pair.row, pair.item, reason, side))
                    break
            else:
                assert query is not None and document is not None
                kept.append((pair, query, document))
        return self._columns(num_in, num_left_out, rejected, kept)

    def _encode(self, texts: list[str], instruction: str | None) -> list[TokenisedText | None]:
        encoded: list[TokenisedText | None] = []
        batch: list[str] = []
        characters = 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if len(batch) == _ENCODE_TEXTS or characters >= _ENCODE_CHARACTERS:
                encoded += self._encoder.try_encode_batch(batch, instruction)
                batch, characters = [], 0
        return encoded + self._encoder.try_encode_batch(batch, instruction) if batch else encoded

    def _columns(
        self,
        num_in: int,
        num_left_out: int,
        rejected: list[Rejected],
        kept: Sequence[tuple[_Pair, TokenisedText, TokenisedText]],
    ) -> Prepared:
        pairs = [pair for pair, _, _ in kept]
        sides = [[query for _, query, _ in kept], [document for _, _, document in kept]]
        eos = self._contract.eos_token_id
        lengths, starts, inner = [], [], []
        for side in sides:
            lengths.append(np.array([len(text.ids) for text in side], dtype=np.int32))
            starts.append(np.array([text.content_start for text in side], dtype=np.int32))
            inner.append(np.array([np.count_nonzero(text.ids[:-1] == eos) for text in side], dtype=np.int32))
        texts = [[pair.query for pair in pairs], [pair.document for pair in pairs], [pair.language for pair in pairs]]
        columns = [pa.array(column, pa.string()) for column in texts]
        columns += [_ids_column(side, length) for side, length in zip(sides, lengths, strict=True)]
        columns += [pa.array(column) for column in (*lengths, *starts, *inner)]
        left_out: Counter[str] = Counter()
        if self._work.negatives:
            rows = [pair.negatives for pair in pairs]
            tokens = encode_negatives(rows, lambda texts: self._encode(texts, None))
            both = [(pair.query, pair.document) for pair in pairs]
            columns += negative_columns(both, rows, tokens, self._work.scores)
            for row in rows:
                left_out += row.left_out
        near = None
        if self._work.near_duplicates:
            from anchor_cli.data.prepare.near import near_keys

            near = near_keys([(pair.query, pair.document) for pair in pairs])
        return Prepared(
            num_in,
            num_left_out,
            rejected,
            pa.Table.from_arrays(columns, schema=self._work.schema),
            np.array([pair.row for pair in pairs], dtype=np.int64),
            np.array([-1 if pair.item is None else pair.item for pair in pairs], dtype=np.int64),
            np.array([pair_key(pair.query, pair.document) for pair in pairs], dtype=np.uint64),
            np.array([pair.canonical_key for pair in pairs], dtype=np.uint64),
            near,
            np.array([text.num_tokens for text in sides[0]], dtype=np.int32),
            np.array([text.num_tokens for text in sides[1]], dtype=np.int32),
            left_out,
        )


def _ids_column(texts: list[TokenisedText], lengths: Int32Array) -> pa.Array:
    offsets = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = np.concatenate([text.ids for text in texts]) if texts else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
