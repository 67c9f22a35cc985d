"""Rows to a `datasets.save_to_disk` folder, byte for byte the same for the same rows.

Record batches and files are cut by rows and bytes of the rows themselves, so neither the number of processes nor the
chunks that rows arrive in change the result. Memory: one record batch (32 MiB, or its one row when larger).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from anchor_cli.base.files import write_json
from anchor_cli.data.pairs import ID_COLUMNS, NUMBER_COLUMNS, SCORE_COLUMNS, TEXT_COLUMNS

BATCH_ROWS = 2048
BATCH_BYTES = 32 << 20
SHARD_BYTES = 512 << 20

NEGATIVE_COLUMNS: dict[str, pa.DataType] = {
    "negatives": pa.list_(pa.string()),
    "negative_ids": pa.list_(pa.int32()),  # of all negatives of the row, one after the other
    "negative_lengths": pa.list_(pa.int32()),
    "negative_content_starts": pa.list_(pa.int32()),
    "query_key": pa.int64(),  # `pairs.text_key`: equal for the same text
    "document_key": pa.int64(),
    "negative_keys": pa.list_(pa.int64()),
}
"""Columns of Stage II, after those of pairs."""


def schema_of(*, negatives: bool = False, scores: Sequence[str] = ()) -> pa.Schema:
    """The columns of a prepared set, with what `datasets` wants to know of them."""
    columns: dict[str, pa.DataType] = {
        **dict.fromkeys(TEXT_COLUMNS, pa.string()),
        **dict.fromkeys(ID_COLUMNS, pa.list_(pa.int32())),
        **dict.fromkeys(NUMBER_COLUMNS, pa.int32()),
        **(NEGATIVE_COLUMNS if negatives else {}),
        **{name: pa.list_(pa.float32()) if name.endswith("scores") else pa.float32() for name in scores},
    }
    features = json.dumps({"info": {"features": {name: _feature(kind) for name, kind in columns.items()}}})
    return pa.schema(list(columns.items()), metadata={"huggingface": features})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    return {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}


SCHEMA = schema_of()
"""Of pairs alone, as Stage I needs them."""


class _HashingFile:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self._file, self._digest, self.num_bytes = path, open(path, "wb"), hashlib.sha256(), 0  # noqa: SIM115

    closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._digest.update(view)
        self.num_bytes += view.nbytes
        return self._file.write(view)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
        self.closed = True

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class ShardWriter:
    """Writes tables of `schema` into `folder`; `finish` names the files, `describe` is for `load_from_disk`."""

    def __init__(self, folder: Path, schema: pa.Schema = SCHEMA) -> None:
        self._folder, self._schema = folder, schema
        self._pending: list[pa.Table] = []
        self._pending_rows = self._pending_bytes = 0
        self._files: list[_HashingFile] = []
        self._stream: pa.ipc.RecordBatchStreamWriter | None = None
        self._row_bytes: list[npt.NDArray[np.int64]] = []
        self.num_rows = 0

    def write(self, table: pa.Table) -> None:
        """Take the rows of `table`; full record batches go to the file."""
        if not table.num_rows:
            return
        row_bytes = _row_bytes(table)
        self._pending.append(table)
        self._row_bytes.append(row_bytes)
        self._pending_rows += table.num_rows
        self._pending_bytes += int(row_bytes.sum())
        self.num_rows += table.num_rows
        if self._pending_rows >= BATCH_ROWS or self._pending_bytes >= BATCH_BYTES:
            self._write_full_batches()

    def finish(self, fingerprint_of: str) -> tuple[list[dict[str, Any]], str]:
        """Write what is left. Returns (name, bytes, SHA-256, rows of every file; fingerprint of the set).

        The fingerprint is the SHA-256 of `fingerprint_of` (the contract) and of the files' hashes.
        """
        self._write_full_batches(last=True)
        if self._stream is None:
            self._open_shard()  # a set without rows is one empty file
        self._close_shard()
        files = []
        for index, file in enumerate(self._files):
            name = f"data-{index:05d}-of-{len(self._files):05d}.arrow"
            file.path.rename(self._folder / name)
            files.append({"name": name, "bytes": file.num_bytes, "sha256": file.sha256})
        hashed = json.dumps([fingerprint_of, [file["sha256"] for file in files]])
        return files, hashlib.sha256(hashed.encode()).hexdigest()

    def _write_full_batches(self, last: bool = False) -> None:
        if not self._pending:
            return
        table = pa.concat_tables(self._pending).combine_chunks()
        row_bytes = np.concatenate(self._row_bytes)
        first = 0
        while first < table.num_rows:
            ends = np.cumsum(row_bytes[first : first + BATCH_ROWS])
            num = max(int(np.searchsorted(ends, BATCH_BYTES, side="right")), 1)
            if num == len(ends) < BATCH_ROWS and not last:
                break  # may take more rows
            self._write_batch(table.slice(first, num), int(ends[num - 1]))
            first += num
        rest = table.slice(first)
        self._pending, self._row_bytes = ([rest], [row_bytes[first:]]) if rest.num_rows else ([], [])
        self._pending_rows, self._pending_bytes = rest.num_rows, int(row_bytes[first:].sum())

    def _write_batch(self, table: pa.Table, num_bytes: int) -> None:
        if self._stream is not None and self._files[-1].num_bytes + num_bytes > SHARD_BYTES:
            self._close_shard()
        if self._stream is None:
            self._open_shard()
        assert self._stream is not None
        columns = [_exact(column.combine_chunks()) for column in table.columns]
        self._stream.write_batch(pa.RecordBatch.from_arrays(columns, schema=self._schema))

    def _open_shard(self) -> None:
        self._files.append(_HashingFile(self._folder / f"shard-{len(self._files):05d}.part"))
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._files[-1], mode="w"), self._schema)

    def _close_shard(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._files[-1].close()
            self._stream = None

    def describe(self, files: list[dict[str, Any]], fingerprint: str) -> None:
        """Write what `load_from_disk` needs; before, it does not load the folder. Both as `finish` returned them."""
        state: dict[str, Any] = {
            "_data_files": [{"filename": file["name"]} for file in files],
            "_fingerprint": fingerprint[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        features = {field.name: _feature(field.type) for field in self._schema}
        info = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
        write_json(self._folder / "dataset_info.json", info)
        write_json(self._folder / "state.json", state)


def _exact(column: pa.Array) -> pa.Array:
    """The same values in buffers of exactly their size: Arrow writes the spare bytes of a buffer too."""
    if pa.types.is_primitive(column.type):
        return pa.array(column.to_numpy())
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset : column.offset + len(column) + 1]
    offsets = offsets if len(offsets) else np.zeros(1, dtype=np.int32)
    begin, end = int(offsets[0]), int(offsets[-1])
    if pa.types.is_list(column.type):
        values = _exact(column.values[begin:end])
        return pa.ListArray.from_arrays(pa.array(offsets - begin), values, type=column.type)
    data = (column.buffers()[2] or pa.py_buffer(b"")).slice(begin, end - begin)
    return pa.StringArray.from_buffers(len(column), pa.py_buffer(offsets - begin), data)


def _row_bytes(table: pa.Table) -> npt.NDArray[np.int64]:
    """(rows,) bytes of texts and ids of each row."""
    total = np.full(table.num_rows, 4 * len(NUMBER_COLUMNS), dtype=np.int64)
    for name in TEXT_COLUMNS:
        total += pa.compute.binary_length(table.column(name)).to_numpy()
    for name in ("query_length", "document_length"):
        total += 4 * table.column(name).to_numpy().astype(np.int64)
    for name in table.column_names:
        if name in NEGATIVE_COLUMNS or any(name in names for names in SCORE_COLUMNS):
            total += _bytes_of(table.column(name).combine_chunks())
    return total


def _bytes_of(column: pa.Array) -> npt.NDArray[np.int64]:
    """(rows,) bytes of the values of a column of numbers or lists."""
    if not pa.types.is_list(column.type):
        return np.full(len(column), column.type.bit_width // 8, dtype=np.int64)
    lengths = pa.compute.list_value_length(column).to_numpy().astype(np.int64)
    if not pa.types.is_string(column.type.value_type):
        return np.asarray(lengths * (column.type.value_type.bit_width // 8))
    ends = np.concatenate([[0], np.cumsum(pa.compute.binary_length(column.flatten()).to_numpy())]).astype(np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    sizes: npt.NDArray[np.int64] = ends[bounds[1:]] - ends[bounds[:-1]]
    return sizes
