"""A part of a source becomes prepared rows: parsed, checked, tokenised. This is what worker processes do.

Everything here depends on one row alone, so rows may be worked on in any number of processes and parts; what depends on
the rows before (duplicates) is decided in `prepare`, in the order of the source. Shapes: R rows that passed the checks.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from anchor_cli.base.contract import query_prefix
from anchor_cli.data.prepare.checks import pair_key, row_language, text_fault
from anchor_cli.data.prepare.leaks import LeakIndex
from anchor_cli.data.prepare.negatives import NegativeChecks, Negatives, encode_negatives, negative_columns
from anchor_cli.data.prepare.parse import rows_of_part
from anchor_cli.data.prepare.work import Prepared, Rejected, Task, Use, Work
from anchor_cli.data.sources.files import Fault
from anchor_cli.data.text import (
    SEPARATOR,
    Int32Array,
    TextEncoder,
    TokenisedText,
    canonical,
    load_tokenizer,
    split_record,
)

_ENCODE_CHARACTERS = 1 << 18  # an encoding takes some hundred bytes a character while it lives
_ENCODE_TEXTS = 128


class _Side(NamedTuple):
    """A query or a document."""

    given: Any
    """As it came."""
    head: str | None
    """`{instruction}; ` of a record, or empty; None: the text is no record."""
    content: Any


@dataclass
class _Pair:
    row: int
    item: int | None
    query: str
    document: str
    heads: tuple[str, str]
    """What stands before the content of query and document, and is no content."""
    given: tuple[str, str]
    """Query and document as they came: with their separators where the row is a record."""
    keys: tuple[int, int]
    """`pair_key` of the texts and of their canonical forms."""
    use: Use
    negatives: Negatives


class RowMaker:
    """Turns tasks into prepared rows."""

    def __init__(self, work: Work) -> None:
        self._work, self._contract = work, work.contract
        tokenizer = load_tokenizer(work.tokenizer)
        self._encoder = TextEncoder(tokenizer, work.contract.text_template, work.contract.max_seq_length)
        self._uses: dict[Use, Use] = {}

    @cached_property
    def _negative_checks(self) -> NegativeChecks:
        return NegativeChecks(self._work.limits.characters, self._leaks, self._work.separator_as_text)

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
            checked = self._check(row, item, self._side(query), self._side(document), language, escaped=escaped)
            if isinstance(checked, _Pair) and task.columns.extra:
                negatives = self._negative_checks(task.columns, extra, checked.query, checked.document, escaped)
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

    def _side(self, given: Any) -> _Side:
        record = split_record(given) if isinstance(given, str) and not self._work.separator_as_text else None
        return _Side(given, None, given) if record is None else _Side(given, *record)

    def _check(
        self, row: int, item: int | None, query: _Side, document: _Side, language: Any, escaped: bool
    ) -> _Pair | Rejected:
        sides = (("query", query), ("document", document))
        for side, given in sides:
            if (fault := self._fault(given, escaped)) is not None:
                whole_row = isinstance(query.content, Fault) and isinstance(document.content, Fault)
                return Rejected(row, item, fault, None if whole_row else side)
        if canonical(query.content) == canonical(document.content):
            return Rejected(row, item, "query_is_document", None)
        language = None if isinstance(language, Fault) else row_language(language, query.content, document.content)
        instruction = None if language is None else self._instruction(language)
        if language is None or (instruction is None and query.head is None):
            return Rejected(row, item, "unknown_language", None)
        if self._leaks is not None:
            for side, given in sides:
                if (leak := self._leaks.find(given.content)) is not None:
                    return Rejected(row, item, leak.reason, side, leak.benchmark)
        return self._pair(row, item, query, document, language, query_prefix(instruction))

    def _fault(self, side: _Side, escaped: bool) -> str | None:
        """`text_fault` of the content, and of what stands before it in a record, whatever its length."""
        if isinstance(side.content, Fault):
            return side.content.reason
        fault = text_fault(side.content, self._work.limits.characters, escaped_bytes=escaped)
        if fault is None and side.head:
            fault = text_fault(side.head + side.content, sys.maxsize, escaped_bytes=escaped)
        return fault

    def _pair(
        self, row: int, item: int | None, query: _Side, document: _Side, language: str, default_head: str
    ) -> _Pair:
        heads = (default_head if query.head is None else query.head, document.head or "")
        given_forms = sum(side.head is not None for side in (query, document))
        use = Use(language, heads[0].removesuffix("; "), ("plain", "half", "record")[given_forms])
        # the same text under another instruction is another row, whoever gives the instruction
        keyed = heads[0] + SEPARATOR + query.content, heads[1] + document.content
        keys = pair_key(*keyed), pair_key(canonical(keyed[0]), canonical(keyed[1]))
        given = query.given, document.given
        use = self._uses.setdefault(use, use)  # one object, which is sent to the parent process once a part
        return _Pair(row, item, query.content, document.content, heads, given, keys, use, Negatives())

    def _instruction(self, language: str) -> str | None:
        known = self._contract.training_instructions
        return known.get(language, known.get("*"))

    def _prepared(self, num_in: int, num_left_out: int, rejected: list[Rejected], pairs: list[_Pair]) -> Prepared:
        queries = self._encode_under([pair.query for pair in pairs], [pair.heads[0] for pair in pairs])
        documents = self._encode_under([pair.document for pair in pairs], [pair.heads[1] for pair in pairs])
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

    def _encode_under(self, texts: list[str], heads: list[str]) -> list[TokenisedText | None]:
        """Each text behind its own head; those of one head together."""
        encoded: list[TokenisedText | None] = [None] * len(texts)
        by_head: dict[str, list[int]] = {}
        for index, head in enumerate(heads):
            by_head.setdefault(head, []).append(index)
        for head, members in by_head.items():
            together = self._encode([texts[index] for index in members], head or None)
            for index, text in zip(members, together, strict=True):
                encoded[index] = text
        return encoded

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
        texts = [[pair.given[side] for pair in pairs] for side in (0, 1)] + [[pair.use.language for pair in pairs]]
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
            np.array([pair.keys[0] for pair in pairs], dtype=np.uint64),
            np.array([pair.keys[1] for pair in pairs], dtype=np.uint64),
            near,
            np.array([text.num_tokens for text in sides[0]], dtype=np.int32),
            np.array([text.num_tokens for text in sides[1]], dtype=np.int32),
            left_out,
            [pair.use for pair in pairs],
        )


def _ids_column(texts: list[TokenisedText], lengths: Int32Array) -> pa.Array:
    offsets = np.zeros(len(texts) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    values = np.concatenate([text.ids for text in texts]) if texts else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
