"""Retrieval sets in the layouts of the Hub: a repository there, or a local copy of one, read by `datasets`.

    configurations   corpus, queries, and qrels or default                       BEIR's, MTEB's, NanoBEIR's
                     PART-corpus, PART-queries, PART-qrels                       MTEB's sets in several languages
                     PART: one table of questions and texts that answer them     `columns`: publichealth-qa, belebele
    splits           the one named; a configuration with a single other split (`corpus`, `train`) is taken whole
    columns          _id or id (string or int), text, title; query-id, corpus-id, score (whole)

A document is `title + " " + text`. A folder or a `.zip` of BEIR's own files (`corpus.jsonl`, …) is a source, too.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from anchor_cli.base.errors import InputError, RunError, first_line, nearest
from anchor_cli.base.hub import go_offline_if_the_hub_is_silent, revision_of
from anchor_cli.data.benchmarks.beir import (
    CORPUS_FILE,
    Benchmark,
    Row,
    assemble,
    read_beir,
    read_judgements,
    read_texts,
)

_USUAL_SPLITS = ("test", "dev", "validation", "train")  # of one set; other names are sets of their own


@dataclass(frozen=True)
class RetrievalSet:
    """One benchmark of a suite, not yet read."""

    name: str
    """As shown, behind its language: `AutoRAGRetrieval` is `ko/AutoRAGRetrieval`."""
    source: str
    """Hub id, folder, or `.zip` of a BEIR folder."""
    language: str
    """Which query instruction applies."""
    split: str = "test"
    part: str | None = None
    """What stands before `-corpus`, `-queries` and `-qrels`; with `columns`, the table's configuration."""
    revision: str | None = None
    """Commit of the repository; None: the newest."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Of a table: `query`, `document` and, where texts have one, `document_id`. Equal questions are one query."""
    ignore_identical_ids: bool = False
    """As MTEB has it for this task."""
    weight: float = 1.0
    """In the average: two splits of one set that count as one have 0.5 each."""

    def read(self) -> Benchmark:
        """The benchmark.

        Raises:
            InputError: it has no such configuration or split, or a row is not as it must be.
            RunError: the Hub cannot be reached and its files are not in the cache.
        """
        benchmark = self._read()
        return replace(benchmark, ignore_identical_ids=self.ignore_identical_ids, weight=self.weight)

    def _read(self) -> Benchmark:
        name, folder = f"{self.language}/{self.name}", Path(self.source).expanduser()
        if folder.suffix == ".zip":
            return _read_zip(folder, self.language, name, self.split)
        if (folder / CORPUS_FILE).is_file() and not (folder / "README.md").is_file():
            return read_beir(folder, self.language, name, self.split)
        revision = None if folder.is_dir() else self.revision or revision_of(self.source)
        place = self.source if revision is None else f"{self.source}@{revision}"
        known = configurations(self.source, revision)
        if self.columns:
            queries, corpus, qrels = self._read_table(known, revision)
        else:
            corpus = read_texts(self._rows(known, revision, "corpus"), titles=True, repeats=True)
            queries = read_texts(self._rows(known, revision, "queries"), repeats=True)
            qrels = read_judgements(self._rows(known, revision, "qrels", "default"), repeats=True)
        return assemble(name, self.language, queries, corpus, qrels, f"{place}/{self.split}")

    def _rows(self, known: list[str], revision: str | None, *names: str) -> Iterator[Row]:
        wanted = [name if self.part is None else f"{self.part}-{name}" for name in names]
        config = next((name for name in wanted if name in known), None)
        if config is None:
            near = nearest(wanted[0], known)
            raise InputError(
                f"{self.source}: no configuration {' or '.join(wanted)}; it has {_some(known)}",
                near and f"did you mean {near}?",
            )
        yield from rows_of_split(self.source, config, self.split, revision)

    def _read_table(
        self, known: list[str], revision: str | None
    ) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
        """Queries, corpus and judgements from one table: ids are numbers of distinct questions and documents."""
        config = self.part or "default"
        if config not in known:
            near = nearest(config, known)
            raise InputError(
                f"{self.source}: no configuration {config}; it has {_some(known)}", near and f"did you mean {near}?"
            )
        query_ids: dict[str, str] = {}
        document_ids: dict[str, str] = {}
        corpus: dict[str, str] = {}
        qrels: dict[str, dict[str, int]] = {}
        for where, row in rows_of_split(self.source, config, self.split, revision):
            for column in self.columns.values():
                if column not in row:
                    raise InputError(f"{where}: no {column!r}, found {', '.join(map(repr, row))}")
            query, document = row[self.columns["query"]], row[self.columns["document"]]
            if not query or not document:
                continue
            key = str(row[self.columns["document_id"]] if "document_id" in self.columns else document)
            query_id = query_ids.setdefault(query, f"Q{len(query_ids)}")
            document_id = document_ids.setdefault(key, f"D{len(document_ids)}")
            corpus.setdefault(document_id, document)
            qrels.setdefault(query_id, {})[document_id] = 1
        return {key: text for text, key in query_ids.items()}, corpus, qrels


def sets_of(source: str, names: list[str], language: str | None) -> list[RetrievalSet]:
    """The sets that SOURCE[/PART][/SPLIT] has: its test split, else dev; splits of other names are sets of their own.

    Raises:
        InputError: several parts, none of them named; or one named that is not there.
        RunError: the Hub cannot be reached.
    """
    revision = None if Path(source).is_dir() else revision_of(source)
    known = configurations(source, revision)
    parts = sorted(name.removesuffix("-corpus") for name in known if name.endswith("-corpus"))
    part = None
    if "corpus" not in known:
        wanted = names[0] if names else language if language in parts else None
        if not parts:
            message = f"{source}: no configuration corpus or PART-corpus; it has {_some(known)}"
            raise InputError(message, "a table of questions and texts is read by a suite FILE: docs/evaluation.md")
        if wanted not in parts:
            near = nearest(wanted, parts) if wanted else None
            problem = f"no part {wanted}" if wanted else "which part"
            raise InputError(f"{source}: {problem}: {_some(parts)}", f"name one: {source}/{near or parts[0]}")
        part, names = wanted, names[1:]
    base = Path(source).name if part is None or part == language else f"{Path(source).name}-{part}"
    prefix = "" if part is None else f"{part}-"
    qrels = next((prefix + name for name in ("qrels", "default") if prefix + name in known), f"{prefix}qrels")
    splits = splits_of(source, qrels, revision)
    if names and names[0] not in splits:
        near = nearest(names[0], splits)
        raise InputError(
            f"{source}: no split {names[0]}; {qrels} has {_some(splits)}", near and f"did you mean {near}?"
        )
    usual = next((split for split in _USUAL_SPLITS if split in splits), None)
    chosen = [names[0]] if names else [usual] if usual else splits
    plain = len(chosen) == 1 and chosen[0] in _USUAL_SPLITS
    return [
        RetrievalSet(base if plain else split, source, language or "", split, part=part, revision=revision)
        for split in chosen
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f", … ({len(names)})" if len(names) > 20 else "")


def configurations(source: str, revision: str | None) -> list[str]:
    """Names of a repository's configurations. Raises InputError, RunError."""
    from datasets import get_dataset_config_names

    with hub_errors(source, "configurations"):
        return list(get_dataset_config_names(source, revision=revision))


def splits_of(source: str, config: str, revision: str | None = None) -> list[str]:
    """Names of a configuration's splits. Raises InputError, RunError."""
    from datasets import get_dataset_split_names

    with hub_errors(source, config):
        return list(get_dataset_split_names(source, config, revision=revision, **own_cache(source)))


def rows_of_split(source: str, config: str, split: str, revision: str | None = None) -> Iterator[Row]:
    """Rows with their places. A configuration that lacks the split and has a single other one is taken whole."""
    from datasets import load_dataset

    splits = splits_of(source, config, revision)
    if split not in splits and len(splits) != 1:
        near = nearest(split, splits)
        hint = near and f"did you mean {near}?"
        raise InputError(f"{source} {config}: no split {split}; it has {_some(splits)}", hint)
    split = split if split in splits else splits[0]
    with hub_errors(source, f"{config}/{split}"):
        table = load_dataset(source, config, split=split, revision=revision, **own_cache(source))
    for number, row in enumerate(table, start=1):
        yield f"{source} {config}/{split}: row {number}", row


def own_cache(source: str) -> dict[str, str]:
    """`cache_dir` for a local copy of a repository: `datasets` tells folders apart by their last name alone.

    Two copies called `set`, or one that has changed, would share one cache entry, and the second be read as the first.
    """
    import datasets

    folder = Path(source)
    if not folder.is_dir():
        return {}
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.resolve().rglob("*") if path.is_file()):
        state = path.stat()
        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return {"cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / f"local-{digest.hexdigest()[:16]}")}


@contextmanager
def hub_errors(source: str, what: str, remedy: str | None = None) -> Iterator[None]:
    """Loading from the Hub: failures become one line.

    Raises:
        InputError: no such configuration or split. RunError: the Hub cannot be reached and the cache has no copy.
    """
    if not Path(source).is_dir():
        go_offline_if_the_hub_is_silent()
    try:
        yield
    except ValueError as error:
        raise InputError(f"{source} {what}: could not be loaded: {first_line(error)}") from error
    except Exception as error:
        hint = remedy or "check the name, the network and HF_TOKEN; or name a local copy of the repository"
        raise RunError(f"{source} {what}: could not be loaded: {first_line(error)}", hint) from error


def _read_zip(path: Path, language: str | None, name: str | None, split: str) -> Benchmark:
    """A `.zip` of a BEIR folder, as BEIR itself hands its sets out. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)  # names that lead out of the folder are made harmless by zipfile
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path}: not a readable .zip: {first_line(error)}") from None
        found = sorted(Path(folder).rglob(CORPUS_FILE), key=lambda file: len(file.parts))
        if not found:
            raise InputError(f"{path}: no {CORPUS_FILE} in it", "expected a BEIR folder")
        try:
            benchmark = read_beir(found[0].parent, language, name, split)
        except InputError as error:
            raise InputError(error.message.replace(folder, str(path)), error.hint) from None
    return replace(benchmark, source=str(path))


def read_zip(path: Path, language: str | None = None) -> Benchmark:
    """A `.zip` of a BEIR folder, named after the file. Raises InputError."""
    benchmark = _read_zip(path, language, f"-/{path.stem}", "test")
    return replace(benchmark, name=f"{benchmark.language}/{path.stem}")
