"""What a SOURCE of the command line means: which files or Hub data set, which columns, how many rows, which bytes.

DIR         written by `datasets.save_to_disk`: a Dataset, or a DatasetDict (its `train` split, or the one `split`
            names); or a folder of data files
FILE, GLOB  .jsonl .json .csv .tsv .parquet .arrow, each also .gz or .zst; the files of a glob in order of name
hf://ORG/NAME  a data set of the Hub, streamed
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError, RunError, first_line, nearest
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent, hub_set, revision_of
from anchor_cli.data.pairs import SCORE_COLUMNS
from anchor_cli.data.sources.file_bytes import format_of
from anchor_cli.data.sources.files import (
    Columns,
    Limits,
    Part,
    RawPair,
    column_names,
    first_objects,
    read_parts,
    row_parts,
)
from anchor_cli.data.sources.locate import SPLITS_FILE, folder_files, matching_files
from anchor_cli.data.sources.mistaken import is_blank, misplaced_rows, require_its_format
from anchor_cli.data.sources.sizes import digest_and_rows

QUERY_NAMES = ("anchor", "query", "question", "q", "query_text", "sentence1")
DOCUMENT_NAMES = tuple("positive document context passage answer pos positives doc text sentence2".split())
LANGUAGE_NAMES = ("language", "lang")
_NEGATIVE = re.compile(r"negative(_\d+)?")
_USUAL_PAIRS = (("anchor", "positive"), ("query", "document"))  # a set that holds these means these


@dataclass(frozen=True)
class PairFile:
    """One file of a source, or a whole data set of the Hub."""

    name: str
    """Path as the user will know it, or `ORG/NAME[split]`."""
    columns: Columns
    path: Path | None
    """None for the Hub."""
    hub: HubSet | None = None

    def parts(self, limits: Limits) -> Iterator[Part]:
        """All its rows, in order."""
        if self.path is not None:
            yield from read_parts(self.path, self.columns, limits)
        elif self.hub is not None:
            yield from row_parts(self.hub.rows(self.columns), limits)


@dataclass(frozen=True)
class HubSet:
    """A data set of the Hub, as `load_dataset(id, subset, split=split, streaming=True)` gives it."""

    identifier: str
    subset: str | None
    split: str

    def open(self) -> Any:
        """The library's IterableDataset.

        Raises:
            InputError: no such data set, subset or split. RunError: the Hub cannot be reached.
        """
        go_offline_if_the_hub_is_silent()
        import datasets

        try:
            return datasets.load_dataset(self.identifier, self.subset, split=self.split, streaming=True)
        except ValueError as error:  # no such subset or split
            remedy = "--split and --subset name parts of it"
            raise InputError(f"{self.identifier}: {first_line(error)}", remedy) from None
        except Exception as error:  # no network, no such set, no access: the libraries raise a dozen kinds
            message = f"{self.identifier}: the Hub does not give it: {first_line(error)}"
            raise RunError(message, "check the name, the network and HF_TOKEN") from None

    def rows(self, columns: Columns) -> Iterator[RawPair]:
        """(query, document, language) of every row, as the Hub gives them. Raises RunError when it stops giving."""
        rows, number = iter(self.open()), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                message = f"{self.identifier}: the Hub stopped giving after row {number}: {first_line(error)}"
                raise RunError(message, "run the same command again; it starts over") from None
            number += 1
            yield columns.of(row)


@dataclass(frozen=True)
class Source:
    """One SOURCE of the command line."""

    spec: str
    files: list[PairFile]
    fingerprint: str
    """SHA-256 over its files' bytes; for the Hub, over the identifier, revision and split."""
    rows_hint: int | None
    """How many rows it has, for the progress bar; None when only reading would tell."""
    num_bytes: int | None = None
    """Of its files as they lie on the disk; None for the Hub."""

    def count_rows(self, limits: Limits) -> int:
        """Exactly how many rows it has: reads all of it."""
        return sum(part.num_rows for file in self.files for part in file.parts(limits))


@dataclass(frozen=True)
class SourceOptions:
    """Options that apply to all sources; columns that are None are guessed, and reported."""

    query_column: str | None = None
    document_column: str | None = None
    language_column: str | None = None
    split: str | None = None
    subset: str | None = None
    negatives: bool = False
    """Read hard negatives and teacher scores, too, where a source has them."""
    reported: set[str] | None = field(default_factory=set)
    """Guesses that were printed already. None: neither they nor notes on instructions are printed."""


def open_source(spec: str, options: SourceOptions) -> Source:
    """Find out what `spec` means, read its columns and fingerprint.

    Raises:
        InputError: nothing is there, or its columns are not those asked for or cannot be guessed.
        RunError: the Hub cannot be reached, or does not give it.
    """
    if (identifier := hub_set(spec)) is not None:
        return _hub_source(spec, identifier, options)
    place = Path(spec).expanduser()
    paths = folder_files(place, options.split) if place.is_dir() else matching_files(spec)
    files = []
    for path in paths:
        require_its_format(path)
        names = column_names(path)
        if not names and len(paths) > 1 and is_blank(path):
            say(f"{path}: empty, passed over")
        else:
            files.append(PairFile(str(path), _columns_of(path, names, options), path))
    fingerprint, rows_hint = digest_and_rows(paths)
    return Source(spec, files, fingerprint, rows_hint, sum(path.stat().st_size for path in paths))


def require_there(specs: Sequence[str]) -> None:
    """Refuse a missing file before anything is fetched for it. Raises InputError."""
    for spec in specs:
        if hub_set(spec) is None and not Path(spec).expanduser().is_dir():
            matching_files(spec)


def _columns_of(path: Path, names: Sequence[str], options: SourceOptions) -> Columns:
    """`choose_columns` of a file. Raises InputError; for JSON that holds its rows elsewhere it says where."""
    objects = first_objects(path, 2) if format_of(path) in ("json", "jsonl") else []
    try:
        columns = choose_columns(names, str(path), options)
    except InputError as error:
        raise (not is_blank(path) and misplaced_rows(path, objects, columns_fit=False)) or error from None
    if problem := misplaced_rows(path, objects, columns_fit=True):
        raise problem
    return columns


def check_split_options(specs: Sequence[str], options: SourceOptions) -> None:
    """Refuse a `--split` or `--subset` that no source has; say which of several is read whole.

    Raises:
        InputError: it would change nothing.
    """
    hub = [spec for spec in specs if hub_set(spec)]
    split = [spec for spec in specs if spec in hub or (Path(spec).expanduser() / SPLITS_FILE).is_file()]
    for option, value, having in (("split", options.split, split), ("subset", options.subset, hub)):
        without = [spec for spec in specs if spec not in having] if value is not None else []
        if without and not having:
            owner = "a data set of the Hub" if option == "subset" else "a DatasetDict or a data set of the Hub"
            hint = f"only {owner} has them; name the folder or the files that you want"
            raise InputError(f"--{option} {value}: {', '.join(without)}: no {option}s there", hint)
        for spec in without:
            say(f"{spec}: no {option}s there; read whole")


def choose_columns(names: Sequence[str], where: str, options: SourceOptions) -> Columns:
    """The columns asked for, or the only likely ones.

    Raises:
        InputError: a column is not there, or several would do.
    """
    for wanted in (options.query_column, options.document_column, options.language_column):
        if wanted is not None and wanted not in names:
            near = nearest(wanted, names)
            hint = f"did you mean {near}?" if near else None
            raise InputError(f"{where}: no column {wanted!r}, its columns are {', '.join(names) or '(none)'}", hint)
    query, document = options.query_column, options.document_column
    if query is None and document is None:
        usual = [pair for pair in _USUAL_PAIRS if set(pair) <= set(names)]
        if len(usual) == 1:
            query, document = usual[0]
    query = query or _only(QUERY_NAMES, names, document, where, "query")
    document = document or _only(DOCUMENT_NAMES, names, query, where, "document")
    language = options.language_column or next((name for name in LANGUAGE_NAMES if name in names), None)
    columns = Columns(query, document, language, *(_negatives_and_scores(names) if options.negatives else ()))
    _report_guess(columns, where, options)
    return columns


def _negatives_and_scores(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`negatives`, else `negative`, `negative_1`, `negative_2`, … by number; all columns of scores."""
    numbered = sorted((name for name in names if _NEGATIVE.fullmatch(name)), key=lambda name: int(name[9:] or 0))
    negatives = ("negatives",) if "negatives" in names else tuple(numbered)
    return negatives, tuple(name for columns in SCORE_COLUMNS if set(columns) <= set(names) for name in columns)


def _only(likely: Sequence[str], names: Sequence[str], other: str | None, where: str, side: str) -> str:
    usual = [name for name in names if name.lower() in likely and name != other]
    if len(usual) == 1:
        return usual[0]
    problem = f"{' or '.join(usual)}?" if usual else f"none of {', '.join(names) or '(no columns)'} is known as one"
    raise InputError(f"{where}: which column is the {side}: {problem}", f"name it with --{side}-column NAME")


def _report_guess(columns: Columns, where: str, options: SourceOptions) -> None:
    guessed = []
    if options.query_column is None:
        guessed.append(f"query = {columns.query}")
    if options.document_column is None:
        guessed.append(f"document = {columns.document}")
    if options.language_column is None and columns.language is not None:
        guessed.append(f"language = {columns.language}")
    if columns.negatives:
        guessed.append(f"negatives = {' '.join(columns.negatives)}")
    if columns.scores:
        guessed.append(f"scores = {' '.join(columns.scores)}")
    line = ", ".join(guessed)
    if line and options.reported is not None and line not in options.reported:
        options.reported.add(line)
        say(f"{where}: columns guessed: {line}")


def _hub_source(spec: str, identifier: str, options: SourceOptions) -> Source:
    hub = HubSet(identifier, options.subset, options.split or "train")
    say(f"{spec}: reading split {hub.split} from the Hub")
    stream = hub.open()
    names = stream.column_names or list(next(iter(stream), {}))
    info = stream.info
    sizes = {name: part.num_examples for name, part in (info.splits or {}).items()} if info is not None else {}
    identity = json.dumps([identifier, hub.subset, hub.split, revision_of(identifier)])
    name = f"{identifier}[{hub.split}]"
    file = PairFile(name, choose_columns(names, name, options), None, hub)
    return Source(spec, [file], hashlib.sha256(identity.encode()).hexdigest(), sizes.get(hub.split))
