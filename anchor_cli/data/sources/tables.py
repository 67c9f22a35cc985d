"""Parquet and Arrow files as record batches of plain texts, a little at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from anchor_cli.data.sources.file_bytes import COMPRESSED, format_of, opened

_BLOCK_BYTES = 1 << 20
_BATCH_ROWS = 1024


@contextmanager
def open_table(path: Path, names: Sequence[str] | None = None) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """(schema, record batches) of a Parquet, Arrow stream or Arrow file; a compressed one goes through a spool file.

    `names`: the columns that are read, of Parquet.
    """
    with opened(path) as file, tempfile.TemporaryFile() as spool:
        if path.suffix.lower() in COMPRESSED:
            while block := file.read(_BLOCK_BYTES):
                spool.write(block)
            spool.seek(0)
            file = spool
        if format_of(path) == "parquet":
            source = _WithoutArrowSchema(file)
            parquet = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)  # else it holds a whole row group
            source.is_open = True
            yield parquet.schema_arrow, parquet.iter_batches(_BATCH_ROWS, columns=names, use_threads=False)
            return
        if file.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(file)
            yield reader.schema, (reader.get_batch(index) for index in range(reader.num_record_batches))
            return
        file.seek(0)
        stream = pa.ipc.open_stream(file)
        yield stream.schema, iter(stream)


class _WithoutArrowSchema:
    """A Parquet file whose footer does not say how its columns were held in Arrow's memory.

    pyarrow restores dictionary columns from it, every batch with the whole dictionary, and has no option against it.
    """

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.is_open = file, False  # the footer is read while it is opened

    def read(self, num_bytes: int = -1) -> bytes:
        data = self._file.read(num_bytes)
        return data if self.is_open else data.replace(b"ARROW:schema", b"arrow:schema")

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        """The file is closed by whoever opened it."""


def without_dictionary(column: pa.Array) -> pa.Array:
    """The values themselves where a column holds places in a dictionary, which every piece would carry whole."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return without_dictionary(column.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return without_dictionary(pc.run_end_decode(column))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values = without_dictionary(column.flatten())
        if values.type != kind.value_type:
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            build, number = (pa.ListArray, pa.int32()) if pa.types.is_list(kind) else (pa.LargeListArray, pa.int64())
            return build.from_arrays(pa.array(offsets, number), values, mask=column.is_null())
    return column
