"""Prepared folders: what is written is read, by us and by `datasets`; what is not whole is refused with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest

from anchor_cli.base.contract import TextContract, write_contract
from anchor_cli.base.errors import InputError
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare import shards
from anchor_cli.data.prepare.shards import SCHEMA, ShardWriter

CONTRACT = TextContract(tokenizer_fingerprint="f" * 64)


def rows(num: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    made = []
    for index in range(num):
        query, document = (rng.integers(0, 100, rng.integers(3, 30)).tolist() for _ in range(2))
        numbers = dict(zip(SCHEMA.names[5:], [len(query), len(document), 1, 2, 0, index % 3], strict=True))
        texts = {"anchor": f"질문 {index}", "positive": "문서 " * (index % 7), "language": "ko"}
        made.append({**texts, "query_ids": query, "document_ids": document, **numbers})
    return made


def write(folder: Path, content: list[dict[str, Any]], chunk: int) -> str:
    folder.mkdir()
    writer = ShardWriter(folder)
    for first in range(0, len(content), chunk):
        writer.write(pa.Table.from_pylist(content[first : first + chunk], SCHEMA))
    files, fingerprint = writer.finish("contract")
    writer.describe(files, fingerprint)
    write_contract(folder, CONTRACT)
    manifest = {"format": 1, "num_rows": writer.num_rows, "fingerprint": fingerprint, "files": files}
    (folder / "prepare.json").write_text(json.dumps(manifest))
    return fingerprint


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_ROWS", 50)
    monkeypatch.setattr(shards, "BATCH_BYTES", 9000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 50_000)


@pytest.mark.usefixtures("small_files")
def test_random_rows_come_back_in_the_order_asked(tmp_path: Path) -> None:
    want = rows(501)
    fingerprint = write(tmp_path / "data", want, chunk=77)
    pairs = PreparedPairs.open(tmp_path / "data")
    assert len(pairs.manifest["files"]) > 2
    assert (pairs.num_rows, len(pairs), pairs.fingerprint, pairs.contract) == (501, 501, fingerprint, CONTRACT)
    order = np.random.default_rng(1).integers(0, 501, 300)
    queries, documents = pairs.tokens(order)
    for index, query, document in zip(order, queries, documents, strict=True):
        assert query.tolist() == want[index]["query_ids"]
        assert document.tolist() == want[index]["document_ids"]
        assert query.dtype == np.int32 and query.flags.writeable
    for ours, theirs in [
        (pairs.query_lengths, "query_length"),
        (pairs.document_lengths, "document_length"),
        (pairs.query_content_starts, "query_content_start"),
        (pairs.document_content_starts, "document_content_start"),
        (pairs.query_inner_eos, "query_inner_eos"),
        (pairs.document_inner_eos, "document_inner_eos"),
    ]:
        assert ours.dtype == np.int32
        assert ours.tolist() == [row[theirs] for row in want]
    for row in (0, 49, 50, 500):
        assert pairs.content_starts(row) == (want[row]["query_content_start"], want[row]["document_content_start"])
    assert pairs.texts(300) == (want[300]["anchor"], want[300]["positive"], "ko")
    with pytest.raises(IndexError):
        pairs.tokens([501])
    assert pairs.tokens([]) == ([], [])


@pytest.mark.usefixtures("small_files")
def test_load_from_disk_reads_the_same(tmp_path: Path) -> None:
    want = rows(120)
    write(tmp_path / "data", want, chunk=13)
    assert datasets.load_from_disk(str(tmp_path / "data")).to_list() == want


@pytest.mark.usefixtures("small_files")
def test_files_do_not_depend_on_how_rows_arrive(tmp_path: Path) -> None:
    content = rows(400)
    content[7]["positive"] = "x" * 20_000  # larger than a batch
    first = write(tmp_path / "a", content, chunk=1)
    assert write(tmp_path / "b", content, chunk=400) == first
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert write(tmp_path / "c", content[:-1], chunk=400) != first


def test_a_set_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "data", [], chunk=1)
    assert PreparedPairs.open(tmp_path / "data").num_rows == 0
    assert len(datasets.load_from_disk(str(tmp_path / "data"))) == 0


def test_what_is_not_whole_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "data"

    def refused(match: str) -> None:
        with pytest.raises(InputError, match=match) as caught:
            PreparedPairs.open(folder)
        assert f"anchor prepare SOURCE… --spec SPEC --out {place}" in str(caught.value.hint)
        assert not place.exists()  # --out must not

    place = folder
    refused("no such folder")
    place = tmp_path / "data-new"
    write(folder, rows(30), chunk=30)
    shard = folder / "data-00000-of-00001.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    refused("bytes, prepare.json says")
    shard.write_bytes(b"\xff" * len(content))
    refused("damaged")
    shard.unlink()
    refused("missing")
    manifest = (folder / "prepare.json").read_text()
    (folder / "prepare.json").write_text(manifest.replace('"format": 1', '"format": 99'))
    refused("format 99")
    (folder / "prepare.json").unlink()
    refused("not whole: prepare.json is missing")


def test_data_for_another_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data", rows(3), chunk=3)
    pairs = PreparedPairs.open(tmp_path / "data")
    pairs.require(CONTRACT)
    pairs.require(CONTRACT.model_copy(update={"pooling_mode": "mean"}))  # does not change the rows
    for change in ({"tokenizer_fingerprint": "0" * 64}, {"text_template": "x{text}<|im_end|>"}, {"max_seq_length": 99}):
        with pytest.raises(InputError, match=next(iter(change))) as caught:
            pairs.require(CONTRACT.model_copy(update=change))
        remedy = f"--spec SPEC --out {tmp_path / 'data'}-new, and name that in dataset_file_path"
        assert str(caught.value.hint).endswith(remedy)
