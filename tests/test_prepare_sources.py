"""Every form of a source gives the same prepared rows; what is damaged or ambiguous is said in one line."""

from __future__ import annotations

import csv
import gzip
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import zstandard
from data_fixtures import AWKWARD, needs_shared, tokenizer_folder

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.data.sources import files as source_files
from anchor_cli.data.sources import sources
from anchor_cli.data.sources.files import Columns, Limits, read_parts
from anchor_cli.data.sources.sources import SourceOptions, choose_columns

__all__ = ["tokenizer_folder"]
ROWS = [{"query": f"{text.strip()} {index}?", "document": f"{text}\n{index}"} for index, text in enumerate(AWKWARD * 3)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def delimited(rows: list[dict[str, Any]], path: Path, delimiter: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def arrow_file(rows: list[dict[str, Any]], path: Path) -> None:
    with pa.ipc.new_file(path, table(rows).schema) as writer:
        writer.write_table(table(rows))


def split_files(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir()
    (folder / "b.jsonl").write_bytes(lines(rows[20:]))
    (folder / "empty.jsonl").touch()  # as Spark leaves them
    (folder / "a.jsonl").write_bytes(lines(rows[:20]))


def compressed_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    plain = path.with_suffix(".plain")
    pq.write_table(table(rows), plain, row_group_size=7)
    path.write_bytes(zstandard.compress(plain.read_bytes()))


def two_pieces(rows: list[dict[str, Any]], compress: Callable[[bytes], bytes]) -> bytes:
    """As `cat a.gz b.gz` makes it."""
    return compress(lines(rows[:9])) + compress(lines(rows[9:]))


FORMS: dict[str, Callable[[list[dict[str, Any]], Path], Any]] = {
    "rows.jsonl": lambda rows, path: path.write_bytes(lines(rows)),
    "bom.jsonl": lambda rows, path: path.write_bytes(b"\xef\xbb\xbf" + lines(rows)),
    "crlf.jsonl": lambda rows, path: path.write_bytes(lines(rows).replace(b"\n", b"\r\n")),
    "unended.jsonl": lambda rows, path: path.write_bytes(lines(rows).rstrip(b"\n")),
    "rows.jsonl.gz": lambda rows, path: path.write_bytes(two_pieces(rows, gzip.compress)),
    "rows.jsonl.zst": lambda rows, path: path.write_bytes(two_pieces(rows, zstandard.compress)),
    "rows.json": lambda rows, path: path.write_text(json.dumps(rows), encoding="utf-8"),
    "pretty.json": lambda rows, path: path.write_text(json.dumps(rows, indent=4, ensure_ascii=False), encoding="utf-8"),
    "lines.json": lambda rows, path: path.write_bytes(lines(rows)),
    "rows.json.gz": lambda rows, path: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.csv": lambda rows, path: delimited(rows, path, ","),
    "rows.tsv": lambda rows, path: delimited(rows, path, "\t"),
    "rows.parquet": lambda rows, path: pq.write_table(table(rows), path, row_group_size=11),
    "rows.parquet.zst": compressed_parquet,
    "rows.arrow": arrow_file,
    "disk": lambda rows, path: datasets.Dataset.from_list(rows).save_to_disk(str(path), num_shards=3),
    "dict": lambda rows, path: datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:2])
    ).save_to_disk(str(path)),
    "folder": split_files,
}


def made(rows: list[dict[str, Any]], form: str, tmp_path: Path) -> str:
    path = tmp_path / form
    FORMS[form](rows, path)
    return str(path)


@pytest.fixture(scope="module")
def want(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> str:
    """The fingerprint of ROWS, prepared from the simplest form."""
    folder = tmp_path_factory.mktemp("want")
    summary = prepare([made(ROWS, "rows.jsonl", folder)], folder / "out", tokenizer=tokenizer_folder)
    assert [PreparedPairs.open(folder / "out").texts(row)[:2] for row in range(len(ROWS))] == [
        (row["query"], row["document"]) for row in ROWS
    ]
    return summary.fingerprint


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_gives_the_same_rows(form: str, want: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    got = prepare([made(ROWS, form, tmp_path)], tmp_path / "out", tokenizer=tokenizer_folder)
    assert got.tally.num_kept == len(ROWS)
    assert got.fingerprint == want


def test_glob_and_several_sources_in_order(want: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    split_files(ROWS, tmp_path / "parts")
    got = prepare([str(tmp_path / "parts" / "*.jsonl")], tmp_path / "glob", tokenizer=tokenizer_folder)
    assert got.fingerprint == want
    both = [str(tmp_path / "parts" / "a.jsonl"), str(tmp_path / "parts" / "b.jsonl")]
    assert prepare(both, tmp_path / "both", tokenizer=tokenizer_folder).fingerprint == want
    assert prepare(both[::-1], tmp_path / "other", tokenizer=tokenizer_folder).fingerprint != want


@pytest.mark.parametrize("names", [("anchor", "positive"), ("question", "context"), ("Q", "Passage")])
def test_column_names_do_not_matter(names: tuple[str, str], want: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"id": 1, names[0]: row["query"], names[1]: row["document"]} for row in ROWS]
    got = prepare([made(rows, "rows.parquet", tmp_path)], tmp_path / "out", tokenizer=tokenizer_folder)
    assert got.fingerprint == want


def test_a_hub_data_set_is_streamed(
    want: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((name, subset, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = prepare(
        ["hf://org/pairs"], tmp_path / "out", tokenizer=tokenizer_folder, options=Options(split="dev", subset="ko")
    )
    assert got.fingerprint == want
    assert set(asked) == {("org/pairs", "ko", "dev", True)}
    assert "reading split dev from the Hub" in capsys.readouterr().err


def test_no_network_is_said(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RunError, match="org/pairs: the Hub does not give it"):
        prepare(["hf://org/pairs"], tmp_path / "out", tokenizer=tokenizer_folder)


def test_a_hub_that_stops_in_the_middle_is_said(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate() -> Iterator[dict[str, str]]:
        yield from ROWS[:7]
        raise TimeoutError("read timed out")

    stream = datasets.IterableDataset.from_generator(generate)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    with pytest.raises(RunError, match="org/pairs: the Hub stopped giving after row 7: read timed out"):
        prepare(["hf://org/pairs"], tmp_path / "out", tokenizer=tokenizer_folder)
    assert not (tmp_path / "out").exists()


def test_lists_of_positives_are_one_pair_each(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"query": "one?", "positives": ["a", "", "b"]}, {"query": "two?", "positives": []}]
    for form in ("rows.jsonl", "rows.json", "rows.parquet"):
        out = tmp_path / f"out-{form}"
        summary = prepare([made(rows, form, tmp_path)], out, tokenizer=tokenizer_folder)
        pairs = PreparedPairs.open(out)
        assert [pairs.texts(row)[:2] for row in range(pairs.num_rows)] == [("one?", "a"), ("one?", "b")]
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        found = [(line["row"], line.get("item"), line["reason"]) for line in rejected]
        assert found == [(0, 1, "empty"), (1, None, "empty")]
        assert summary.tally.num_in == 4


def test_weights_take_the_scarcest_source_whole(tmp_path: Path, tokenizer_folder: Path) -> None:
    many = [{"query": f"many {index}", "document": f"text {index}"} for index in range(100)]
    few = [{"query": f"few {index}", "document": f"text {index}"} for index in range(10)]
    both = [made(many, "rows.jsonl", tmp_path), made(few, "rows.csv", tmp_path)]
    summary = prepare(both, tmp_path / "out", tokenizer=tokenizer_folder, options=Options(weights=(3, 1)))
    pairs = PreparedPairs.open(tmp_path / "out")
    queries = [pairs.texts(row)[0].split() for row in range(pairs.num_rows)]
    assert [name for name, _ in queries] == ["many"] * 30 + ["few"] * 10  # 3 : 1 with ten of the second
    spread = [int(index) for name, index in queries if name == "many"]
    assert max(b - a for a, b in zip(spread, spread[1:], strict=False)) <= 4  # evenly: every 3rd or 4th
    assert (summary.tally.num_in, summary.tally.num_left_out) == (40, 70)
    with pytest.raises(InputError, match="3 weights for 2 sources"):
        prepare(both, tmp_path / "no", tokenizer=tokenizer_folder, options=Options(weights=(1, 1, 1)))


@pytest.mark.parametrize(
    ("names", "asked", "want"),
    [
        (["anchor", "positive", "negative"], {}, ("anchor", "positive", None)),
        (["query", "document", "question", "lang"], {}, ("query", "document", "lang")),
        (["a", "question", "context"], {}, ("question", "context", None)),
        (["x", "y"], {"query_column": "x", "document_column": "y"}, ("x", "y", None)),
        (["query", "text", "answer"], {"document_column": "text"}, ("query", "text", None)),
        (["question", "context", "answer"], {}, "which column is the document: context or answer"),
        (["x", "y"], {}, "which column is the query: none of x, y"),
        (["query", "document"], {"query_column": "querry"}, "no column 'querry'"),
        ([], {}, r"\(no columns\)"),
    ],
)
def test_columns_are_guessed_only_when_unambiguous(
    names: list[str], asked: dict[str, str], want: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(want, str):
        with pytest.raises(InputError, match=want):
            choose_columns(names, "file", SourceOptions(**asked))
        return
    assert choose_columns(names, "file", SourceOptions(**asked)) == Columns(*want)
    said = capsys.readouterr().err
    assert ("guessed" in said) == (len(asked) < 2)


def fields(path: Path, content: str) -> list[tuple[Any, ...]]:
    path.write_text(content, encoding="utf-8", newline="")
    return [row[:2] for part in read_parts(path, Columns("query", "document"), Limits()) for row in part.data]


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ('"열린 따옴표\td 1\nq2\td 2\n', [('"열린 따옴표', "d 1"), ("q2", "d 2")]),  # one open quote
        ('q1\t"one" more\nq2\td 2\n', [("q1", '"one" more'), ("q2", "d 2")]),
        ('"a\td 1\nq2\t"d 2"\n', [('"a', "d 1"), ("q2", '"d 2"')]),
        ('q1\t5"\nq2\td 2\n', [("q1", '5"'), ("q2", "d 2")]),
        ('q1\t"two\nlines, ""x"""\n"q\t2"\td 2\n', [("q1", 'two\nlines, "x"'), ("q\t2", "d 2")]),  # really quoted
    ],
)
def test_quotes_of_a_tsv_count_only_when_it_is_quoted(content: str, want: Any, tmp_path: Path) -> None:
    assert fields(tmp_path / "rows.tsv", "query\tdocument\n" + content) == want


def test_a_quoted_tsv_may_have_a_quoted_header_and_much_before_its_first_quote(tmp_path: Path) -> None:
    assert fields(tmp_path / "a.tsv", '"query"\t"document"\nq\t"a\nb"\n') == [("q", "a\nb")]
    header, quoted, plain = "query\tdocument\n", 'q\t"a\nb"\n', f"plain\t{'plain' * 24}\n" * 40_000  # 5 MB
    assert fields(tmp_path / "b.tsv", header + plain + quoted)[-2:] == [("plain", "plain" * 24), ("q", "a\nb")]
    with pytest.raises(InputError, match="c.tsv:40004: the row that begins here is not TSV, found at line 40004"):
        fields(tmp_path / "c.tsv", header + quoted + plain + '"open\td\n')


def test_a_run_away_quote_is_named_before_it_has_swallowed_the_file(tmp_path: Path) -> None:
    content = 'query,document\na,"b\n' + "question,document\n" * 250_000 + 'a,"b"\n'  # 4.5 MB
    with pytest.raises(InputError, match="long.csv:2: a quote opened in this row is not closed in 4,000,0"):
        fields(tmp_path / "long.csv", content)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("absent.jsonl", None, "no such file"),
        ("text.txt", b"x", "unknown kind of file"),
        ("cut.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)[:-20], "cannot be read"),
        ("cut.jsonl.zst", zstandard.compress(lines(ROWS))[:-5], "cannot be read"),
        ("bad.parquet", b"PAR1 no", "cannot be read"),
        ("bad.arrow", b"\x00" * 100, "cannot be read"),
        ("cut.json", json.dumps(ROWS).encode()[:-30], "item 44 is not JSON"),
        ("empty.jsonl", b"", r"\(no columns\)"),
        ("open.csv", b'query,document\na,"b\n' + b"q,d\n" * 9, "open.csv:2: .* found at line 11: unexpected end"),
        ("stray.csv", b'query,document\nq,d\na,"b\nq,d\nq,"d"\n', "stray.csv:3: the row .* found at line 5: ',' exp"),
    ],
)
def test_what_cannot_be_read_is_said_and_leaves_nothing(
    name: str, content: bytes | None, match: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        prepare([str(tmp_path / name)], tmp_path / "out", tokenizer=tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


def test_a_cut_off_arrow_stream_is_said_with_the_remedy(tmp_path: Path, tokenizer_folder: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "disk"))
    [path] = (tmp_path / "disk").glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=f"{path.name}: cannot be read to its end") as caught:
        prepare([str(tmp_path / "disk")], tmp_path / "out", tokenizer=tokenizer_folder)
    assert "copy it again" in str(caught.value.hint)


def test_a_parquet_file_is_read_piece_by_piece(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(2000).hex() for _ in range(8000)]  # one row group of 32 MB
    rows = [{"query": str(row), "document": text} for row, text in enumerate(texts)]
    pq.write_table(table(rows), tmp_path / "a.parquet")
    tracemalloc.start()  # sees the bytes read from the file: 34 MB when the row group is read at once
    read = sum(part.num_rows for part in read_parts(tmp_path / "a.parquet", Columns("query", "document"), Limits()))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == len(texts)
    assert most < 12e6


def as_dictionary(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(values).dictionary_encode().cast(pa.dictionary(kind or pa.int32(), pa.string()))


DICTIONARIES: dict[str, Callable[[list[str]], pa.Array]] = {
    "dictionary": as_dictionary,
    "int8": lambda values: as_dictionary(values, pa.int8()),
    "run_end": lambda values: pc.run_end_encode(pa.array(values)),
    "lists": lambda values: pa.array([[value] for value in values], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "large": lambda values: pa.array(values, pa.large_string()).dictionary_encode(),
}


def written(columns: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(columns, path, row_group_size=1500)
    else:
        with pa.ipc.new_file(path, columns.schema) as writer:
            writer.write_table(columns)
    return path


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "arrow") for kind in DICTIONARIES), ("dictionary", "parquet"), ("lists", "parquet")]
)
def test_dictionary_columns_are_read_like_texts(
    kind: str, form: str, want: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    encode = DICTIONARIES[kind]
    columns = {name: [row[name] for row in ROWS] for name in ("query", "document")}
    query = encode(columns["query"]) if kind != "lists" else pa.array(columns["query"])
    path = written(pa.table({"query": query, "document": encode(columns["document"])}), tmp_path / f"rows.{form}")
    assert prepare([str(path)], tmp_path / "out", tokenizer=tokenizer_folder).fingerprint == want


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_missing_and_broken_values_of_a_dictionary_keep_their_reasons(
    form: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    raw = pa.array([b"good", b"bad \xff"], pa.binary())
    texts = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    query = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 0], pa.int32()), texts)
    lists = pa.array([["x"], ["x"], ["x"], None], pa.list_(pa.dictionary(pa.int32(), pa.string())))
    columns = pa.table({"query": query, "document": lists, "language": as_dictionary(["ko", "en", "ko", "en"])})
    path = written(columns, tmp_path / f"rows.{form}")
    summary = prepare([str(path)], tmp_path / "out", tokenizer=tokenizer_folder)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["reason"] for line in rejected] == ["broken_utf8", "missing", "missing"]
    assert summary.as_dict()["languages"] == {"ko": 1}


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["query", "document"])
def test_a_part_does_not_carry_the_dictionary(form: str, column: str, tmp_path: Path) -> None:
    dictionary = pa.array(["x" * 1000 + str(index) for index in range(20_000)])  # 20 MB
    encoded = pa.DictionaryArray.from_arrays(pa.array(range(0, 20_000, 10), pa.int32()), dictionary)  # 2,000 rows
    plain = pa.array([str(index) for index in range(len(encoded))])
    path = written(pa.table({"query": plain, "document": plain} | {column: encoded}), tmp_path / f"rows.{form}")
    parts = list(read_parts(path, Columns("query", "document"), Limits()))
    assert sum(part.num_rows for part in parts) == len(encoded)
    assert max(len(part.data) for part in parts) < 1.5e6 and len(parts) < 10


def test_a_near_name_is_suggested(tmp_path: Path, tokenizer_folder: Path) -> None:
    made(ROWS, "rows.jsonl", tmp_path)
    with pytest.raises(InputError) as caught:
        prepare([str(tmp_path / "row.jsonl")], tmp_path / "out", tokenizer=tokenizer_folder)
    assert caught.value.hint == f"did you mean {tmp_path / 'rows.jsonl'}?"


@pytest.mark.parametrize("name", ["data/pairs", "squad", "yjoonjang/pairs-ko", "data/pairs.v2"])
def test_a_missing_folder_is_no_data_set_of_the_hub(
    name: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub was asked"))
    for _ in range(2):  # the second time with a folder of that owner, and a near name in it
        with pytest.raises(InputError, match=f"{name}: no such file or folder") as caught:
            prepare([name], tmp_path / "out", tokenizer=tokenizer_folder)
        assert f"a data set of the Hub is named hf://{name}" in str(caught.value.hint)
        Path(name).parent.mkdir(exist_ok=True)
        Path(f"{name}s").mkdir(exist_ok=True)
    assert f"did you mean {name}s?" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c", "hf://org/pairs@main", "hf://../pairs", "hf://datasets/"])
def test_what_follows_hf_must_be_a_name(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(InputError, match="is no data set of the Hub"):
        prepare([name], tmp_path / "out", tokenizer=tokenizer_folder)


def test_a_dict_of_splits_wants_one_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    two = {name: datasets.Dataset.from_list(ROWS[:3]) for name in ("dev", "test")}
    datasets.DatasetDict(two).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(InputError, match="which split: dev, test"):
        prepare([str(tmp_path / "dict")], tmp_path / "out", tokenizer=tokenizer_folder)
    summary = prepare(
        [str(tmp_path / "dict")], tmp_path / "out", tokenizer=tokenizer_folder, options=Options(split="dev")
    )
    assert summary.tally.num_in == 3


def test_a_split_that_changes_nothing_is_refused(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("split", "subset"):
        (tmp_path / option).mkdir()
        for form in ("rows.jsonl", "disk", "folder"):
            with pytest.raises(InputError, match=f"--{option} dev: .*{form}: no {option}s there"):
                parts: dict[str, Any] = {option: "dev"}
                prepare(
                    [made(ROWS, form, tmp_path / option)],
                    tmp_path / "out",
                    tokenizer=tokenizer_folder,
                    options=Options(**parts),
                )
    capsys.readouterr()
    both = [made(ROWS, "dict", tmp_path), str(tmp_path / "split" / "folder")]
    summary = prepare(both, tmp_path / "out", tokenizer=tokenizer_folder, options=Options(split="test"))
    assert summary.tally.num_in == 2 + len(ROWS)
    said = capsys.readouterr().err
    assert f"{both[1]}: reading 3 files: a.jsonl, b.jsonl, empty.jsonl" in said
    assert f"{both[1]}: no splits there; read whole" in said


def parts_of(path: Path, limits: Limits) -> Iterator[tuple[str, int, int]]:
    for part in read_parts(path, Columns("query", "document"), limits):
        yield part.kind, part.first_row, part.num_rows


def test_small_blocks_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("rows.jsonl", "pretty.json", "rows.csv"):
        path = Path(made(ROWS, form, tmp_path))
        monkeypatch.setattr(source_files, "_BLOCK_BYTES", 1 << 20)
        whole = sum(num for _, _, num in parts_of(path, Limits()))
        for block in (1, 7, 64):
            monkeypatch.setattr(source_files, "_BLOCK_BYTES", block)
            monkeypatch.setattr(source_files, "_PART_CHARACTERS", block)
            found = list(parts_of(path, Limits()))
            assert sum(num for _, _, num in found) == whole == len(ROWS)
            ends = [first + num for _, first, num in found]
            assert [first for _, first, _ in found] == [0, *ends[:-1]]


@needs_shared
def test_the_shared_rows_from_every_form(shared_data: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    shared = datasets.load_from_disk(str(shared_data / "pairs" / "train_ko_en"))
    rows = shared.select(range(0, len(shared), 500)).to_list()
    prints = {
        form: prepare([made(rows, form, tmp_path)], tmp_path / f"out-{form}", tokenizer=tokenizer_folder).fingerprint
        for form in FORMS
    }
    assert len(set(prints.values())) == 1


def test_the_first_rows_of_a_hub_set_name_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate() -> Iterator[dict[str, str]]:
        yield from ROWS

    monkeypatch.setattr(
        sources.HubSet,
        "open",
        lambda self: datasets.IterableDataset.from_generator(generate),  # knows no columns
    )
    source = sources.open_source("hf://datasets/org/pairs", SourceOptions())
    assert source.files[0].columns == Columns("query", "document")
    assert source.rows_hint is None
    assert source.count_rows(Limits()) == len(ROWS)
