"""Prepared pairs, memory-mapped: what `anchor prepare` writes and training reads.

A prepared folder is a `datasets.save_to_disk` folder (Arrow stream files) with `anchor.json` (the text contract),
`prepare.json` (the manifest), `rejected.jsonl` and `report.html`. It appears by one rename, so a folder with a manifest
is whole. Shapes: R rows of the set, n tokens of one text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anchor_cli.base.contract import TextContract, differences, read_contract
from anchor_cli.base.errors import InputError
from anchor_cli.base.files import writer_of
from anchor_cli.data.text import Int32Array, canonical, content_of, split_record

MANIFEST = "prepare.json"
FORMAT = 1
"""Version of the folder's layout; another one is refused."""

TEXT_COLUMNS = ("anchor", "positive", "language")
ID_COLUMNS = ("query_ids", "document_ids")
NUMBER_COLUMNS = (
    "query_length",  # tokens, [EOS] included
    "document_length",
    "query_content_start",  # index of the first content token
    "document_content_start",
    "query_inner_eos",  # [EOS] ids before the closing one: special-token strings in the text
    "document_inner_eos",
)
SCORE_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("scores",),
    ("cross_encoder_positive_score", "cross_encoder_negative_scores"),
    ("positive_score", "negative_scores"),
)
"""Columns of scores that a row's documents may have, the best teacher first: one list (the positive's, then the
negatives'), or the positive's and the negatives' apart."""
NOT_OF_THE_ROWS = frozenset({"pooling_mode", "instructions", "attention", "dtype"})
"""Keys of the contract that change no prepared row."""


def text_key(text: str) -> int:
    """64 bits, signed, of a text's canonical form: NFC, every run of white space one space."""
    return int.from_bytes(hashlib.blake2b(canonical(text).encode(), digest_size=8).digest(), "little", signed=True)


class _Ids(NamedTuple):
    """One id column of one record batch; views of the memory-mapped file."""

    offsets: Int32Array  # (rows of the batch + 1,)
    values: Int32Array  # (tokens of the batch,)

    def row(self, index: int) -> Int32Array:
        return self.values[self.offsets[index] : self.offsets[index + 1]].copy()


def _column(name: str, what: str) -> cached_property[Int32Array]:
    """A column of numbers that is read when it is first asked for."""
    column: cached_property[Int32Array] = cached_property(lambda pairs: pairs.column(name))
    column.__doc__ = f"(R,) {what}."
    return column


class PreparedPairs:
    """The rows of a prepared folder. Nothing is read before it is asked for; lengths are read once, ids row by row."""

    contract: TextContract
    """How texts became token ids."""
    fingerprint: str
    """SHA-256 over contract and rows: equal exactly when the prepared rows are."""
    num_rows: int
    manifest: dict[str, Any]
    """`prepare.json`: counts, sources, options, code version."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], contract: TextContract, batches: list[pa.RecordBatch]
    ) -> None:
        self.folder, self.manifest, self.contract, self._batches = folder, manifest, contract, batches
        self.fingerprint = str(manifest["fingerprint"])
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in batches)])  # (batches + 1,)
        self.num_rows = int(self._first_rows[-1])
        self._ids: dict[int, tuple[_Ids, _Ids]] = {}

    query_lengths = _column("query_length", "tokens, [EOS] included")
    document_lengths = _column("document_length", "tokens, [EOS] included")
    query_content_starts = _column("query_content_start", "index of the first content token")
    document_content_starts = _column("document_content_start", "index of the first content token")
    query_inner_eos = _column("query_inner_eos", "[EOS] ids before the closing one")
    document_inner_eos = _column("document_inner_eos", "[EOS] ids before the closing one")

    @classmethod
    def open(cls, folder: str | Path) -> PreparedPairs:
        """Memory-map a prepared folder.

        Raises:
            InputError: `folder` was not made by `anchor prepare`, is of another layout version, or is damaged.
        """
        folder = Path(folder)
        return cls.described(folder, _read_manifest(folder))

    @classmethod
    def described(cls, folder: Path, manifest: dict[str, Any]) -> PreparedPairs:
        """`open` with a manifest that is not in the folder yet. Raises InputError for files that are not as it says."""
        contract = read_contract(folder)
        batches = [batch for entry in manifest["files"] for batch in _read_shard(folder, entry)]
        pairs = cls(folder, manifest, contract, batches)
        if pairs.num_rows != manifest["num_rows"]:
            counted = f"{pairs.num_rows} rows, {MANIFEST} says {manifest['num_rows']}"
            raise InputError(f"{folder}: {counted}", _remedy(folder))
        return pairs

    def __len__(self) -> int:
        return self.num_rows

    def require(self, want: TextContract) -> None:
        """Refuse to go on with data made for another tokenizer, template, instruction or length.

        Raises:
            InputError: names the first difference; the hint says how to make the right data.
        """
        differing = [line for line in differences(self.contract, want) if line.split(":")[0] not in NOT_OF_THE_ROWS]
        if differing:
            more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            message = f"{self.folder}: prepared otherwise than this run needs: {differing[0]}{more}"
            raise InputError(message, _remedy(self.folder))

    def tokens(self, rows: npt.ArrayLike) -> tuple[list[Int32Array], list[Int32Array]]:
        """(query ids, document ids) of `rows`, in the order asked; each text is a fresh int32 array (n,)."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise IndexError(f"row {int(rows.min())}..{int(rows.max())} of {self.num_rows} rows")
        queries: list[Int32Array] = []
        documents: list[Int32Array] = []
        batches = np.searchsorted(self._first_rows, rows, side="right") - 1
        for batch, index in zip(batches.tolist(), (rows - self._first_rows[batches]).tolist(), strict=True):
            query, document = self._batch_ids(batch)
            queries.append(query.row(index))
            documents.append(document.row(index))
        return queries, documents

    def eos_in_content(self, rows: npt.NDArray[np.int64]) -> tuple[Int32Array, Int32Array]:
        """[EOS] ids in the content of the queries and documents of `rows` (n,): the inner ones, less those that the
        template or an instruction puts before the content. Only rows with an inner [EOS] are read."""
        counts = self.query_inner_eos[rows], self.document_inner_eos[rows]  # indexing copies
        starts = self.query_content_starts[rows], self.document_content_starts[rows]
        having = np.flatnonzero(counts[0] + counts[1])
        for first in range(0, len(having), 4096):
            places = having[first : first + 4096]
            for count, start, texts in zip(counts, starts, self.tokens(rows[places]), strict=True):
                for place, ids in zip(places.tolist(), texts, strict=True):
                    count[place] -= np.count_nonzero(ids[: start[place]] == self.contract.eos_token_id)
        return counts

    def texts(self, row: int) -> tuple[str, str, str]:
        """(query, document, language) of one row; of a record its content, without instruction and separator."""
        query, document, language = self._cells(row, TEXT_COLUMNS)
        return self._content(query), self._content(document), language

    def query_head(self, row: int) -> str | None:
        """`{instruction}; ` of a row that has an instruction of its own, or empty; None for any other row."""
        record = split_record(self.cell(row, "anchor")) if self.has_records else None
        return None if record is None else record[0]

    @cached_property
    def has_records(self) -> bool:
        """Whether some rows are records, with an instruction of their own."""
        return bool(set(self.manifest.get("counts", {}).get("forms", ())) - {"plain"})

    def _content(self, text: str) -> str:
        return content_of(text) if self.has_records else text

    def content_starts(self, row: int) -> tuple[int, int]:
        """Index of the first content token of one row's query and document, without loading the columns."""
        query, document = self._cells(row, ("query_content_start", "document_content_start"))
        return query, document

    def language(self, row: int) -> str:
        """Language of one row."""
        return str(self.cell(row, "language"))

    def has_column(self, name: str) -> bool:
        """Whether the set was prepared with a column, such as those of negatives."""
        return bool(self._batches) and name in self._batches[0].schema.names

    def cell(self, row: int, name: str) -> Any:
        """One value, as Python's."""
        return self._cells(row, (name,))[0]

    def list_cell(self, name: str, row: int, dtype: Any) -> npt.NDArray[Any]:
        """One list of numbers, a view of the file."""
        batch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        column, index = self._batches[batch].column(name), row - int(self._first_rows[batch])
        offsets = _buffer(column.offsets, np.int32)
        return _buffer(column.values, dtype)[offsets[index] : offsets[index + 1]]

    def lists(self, name: str) -> tuple[npt.NDArray[np.int64], Int32Array]:
        """A column of int32 lists: (R + 1,) offsets and all values."""
        counts = [np.diff(_buffer(batch.column(name).offsets, np.int32)) for batch in self._batches]
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts or [np.empty(0, np.int32)]))])
        values = [_buffer(batch.column(name).values, np.int32) for batch in self._batches]
        return offsets.astype(np.int64), np.concatenate(values or [np.empty(0, np.int32)])

    def numbers(self, name: str, dtype: Any) -> npt.NDArray[Any]:
        """(R,) a column of numbers."""
        return np.concatenate([_buffer(batch.column(name), dtype) for batch in self._batches])

    def strings(self, name: str) -> Iterator[str]:
        """A column of texts, row by row; of a record its content."""
        for batch in self._batches:
            yield from map(self._content, batch.column(name).to_pylist())

    def _cells(self, row: int, names: tuple[str, ...]) -> list[Any]:
        batch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        index = row - int(self._first_rows[batch])
        return [self._batches[batch].column(name)[index].as_py() for name in names]

    def column(self, name: str) -> Int32Array:
        """(R,) one of `NUMBER_COLUMNS`, read from the files."""
        values = np.empty(self.num_rows, dtype=np.int32)
        for first, batch in zip(self._first_rows[:-1].tolist(), self._batches, strict=True):
            values[first : first + batch.num_rows] = _int32(batch.column(name))
        return values

    def _batch_ids(self, batch: int) -> tuple[_Ids, _Ids]:
        if batch not in self._ids:
            query, document = (_views(self._batches[batch].column(name)) for name in ID_COLUMNS)
            self._ids[batch] = query, document
        return self._ids[batch]


def _views(column: pa.ListArray) -> _Ids:
    return _Ids(_int32(column.offsets), _int32(column.values))


def _int32(column: pa.Int32Array) -> Int32Array:
    return _buffer(column, np.int32)


def _buffer(column: pa.Array, dtype: Any) -> npt.NDArray[Any]:
    """A column of numbers without nulls, not copied. `to_numpy` does the same and imports pandas for it (0.5 s)."""
    if not len(column):
        return np.empty(0, dtype=dtype)
    return np.frombuffer(column.buffers()[1], dtype=dtype)[column.offset : column.offset + len(column)]


def _remedy(folder: Path) -> str:
    """A command that works: `--out` must not exist, and the spec says model, length, template and instructions."""
    if not folder.exists():
        return f"run: anchor prepare SOURCE… --spec SPEC --out {folder}"
    return f"run: anchor prepare SOURCE… --spec SPEC --out {folder}-new, and name that in dataset_file_path"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder", _remedy(folder))
    if writer_of(folder):  # even if every file is there: none of them was flushed to the disk for certain
        raise InputError(f"{folder}: not whole: being prepared, or left by a prepare that was killed",
                         "name the folder given as --out, when anchor prepare has ended")  # fmt: skip
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder}: not prepared data, or not whole: {MANIFEST} is missing", _remedy(folder)) from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}", _remedy(folder)) from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}", _remedy(folder))
    return manifest


def _read_shard(folder: Path, entry: dict[str, Any]) -> Iterator[pa.RecordBatch]:
    path = folder / str(entry["name"])
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry["bytes"]:
            raise InputError(f"{path}: {num_bytes} bytes, {MANIFEST} says {entry['bytes']}", _remedy(folder))
        with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
            yield from reader
    except FileNotFoundError:
        raise InputError(f"{path}: missing", _remedy(folder)) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: damaged: {error}", _remedy(folder)) from None
