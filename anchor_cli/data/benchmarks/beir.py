"""One benchmark, and its reading from a BEIR folder (corpus.jsonl, queries.jsonl, qrels/test.tsv), faults by line.

Texts follow sentence-transformers' NanoBEIREvaluator: a document or query whose text is empty is left out (text of
blanks is not empty), and a query without a judgement is left out. Whatever was left out is counted in `notes`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anchor_cli.base.errors import InputError
from anchor_cli.base.language import language_of

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands (`file:line`) and its fields."""

CORPUS_FILE, QUERIES_FILE, QRELS_FILE = "corpus.jsonl", "queries.jsonl", "qrels/test.tsv"


@dataclass
class Benchmark:
    """A retrieval test: find the judged documents of every query in the corpus."""

    name: str
    """`ko/NanoNQ`, or `{lang}/{folder name}`."""
    language: str
    """Which query instruction applies."""
    queries: dict[str, str]
    """Text by query id; only queries with a judgement."""
    corpus: dict[str, str]
    """Text by document id."""
    qrels: dict[str, dict[str, int]]
    """Grade by document id by query id; documents that `corpus` lacks are kept, the ideal ranking counts them."""
    source: str = ""
    """Folder, or Hub id and subset."""
    ignore_identical_ids: bool = False
    """Leave a document with the query's own id out of the ranking, as BEIR does, and MTEB for tasks such as ArguAna."""
    weight: float = 1.0
    """In the average over benchmarks."""
    notes: list[str] = field(default_factory=list)
    """What was left out of the source, one line each."""


def read_beir(folder: Path, language: str | None = None, name: str | None = None, split: str = "test") -> Benchmark:
    """The benchmark in a BEIR folder. A document is `title + " " + text` where it has a title.

    Raises:
        InputError: a file is missing or a line of it is not as it must be; the message has the line.
    """
    qrels_file = f"qrels/{split}.tsv"
    for file in (CORPUS_FILE, QUERIES_FILE, qrels_file):
        if not (folder / file).is_file():
            raise InputError(f"{folder / file}: not found", _remedy(folder, file))
    queries = read_texts(read_jsonl(folder / QUERIES_FILE), repeats=False)
    corpus = read_texts(read_jsonl(folder / CORPUS_FILE), titles=True, repeats=False)
    qrels = read_judgements(read_tsv(folder / qrels_file), repeats=False)
    language = language or language_of(" ".join(queries.values()))
    return assemble(name or f"{language}/{folder.resolve().name}", language, queries, corpus, qrels, str(folder))


def _remedy(folder: Path, file: str) -> str:
    if file.startswith("qrels/") and (others := sorted((folder / "qrels").glob("*.tsv"))):
        return f"the judgements are read from {file}; found {', '.join(other.name for other in others)}"
    inside = [path.name for path in sorted(folder.iterdir()) if (path / CORPUS_FILE).is_file()]
    if inside:
        return f"name one of the BEIR folders in it: {', '.join(inside)}"
    return f"a BEIR folder holds {CORPUS_FILE}, {QUERIES_FILE} and {QRELS_FILE}"


def assemble(
    name: str,
    language: str,
    queries: dict[str, str],
    corpus: dict[str, str],
    qrels: dict[str, dict[str, int]],
    source: str,
) -> Benchmark:
    """A benchmark from what was read, with its notes.

    Raises:
        InputError: nothing is left to evaluate.
    """
    kept_corpus = {document: text for document, text in corpus.items() if text}
    kept_queries = {query: text for query, text in queries.items() if text and query in qrels}
    if not kept_queries:
        raise InputError(f"{source}: no query with text has a judgement", "do the ids of queries and judgements agree?")
    judged = {query: qrels[query] for query in kept_queries}
    missing = sum(document not in kept_corpus for documents in judged.values() for document in documents)
    if missing == sum(len(documents) for documents in judged.values()):
        raise InputError(
            f"{source}: no judged document is in the corpus", "do the ids of documents and judgements agree?"
        )
    faults = {
        "documents without text left out": len(corpus) - len(kept_corpus),
        "queries without text left out": sum(not text for text in queries.values()),
        "queries without a judgement left out": sum(bool(text) for text in queries.values()) - len(kept_queries),
        "judged queries are not in the queries": sum(query not in queries for query in qrels),
        "judged documents are not in the corpus and count as never found": missing,
    }
    notes = [f"{name}: {count:,} {fault}" for fault, count in faults.items() if count]
    return Benchmark(name, language, kept_queries, kept_corpus, judged, source, notes=notes)


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file; blank lines are passed over."""
    for where, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: {_short(row)}, expected a JSON object")
        yield where, row


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield f"{path}:{number}", line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}") from None


def read_tsv(path: Path) -> Iterator[Row]:
    """The lines of a qrels file as (query-id, corpus-id, score); its header may be absent."""
    for number, (where, line) in enumerate(_lines(path)):
        fields = line.split("\t")
        header = [field.strip().lower().replace("_", "-") for field in fields]
        if not line.strip() or (number == 0 and header == ["query-id", "corpus-id", "score"]):
            continue
        if len(fields) != 3:
            raise InputError(f"{where}: {len(fields)} fields, expected query-id, corpus-id and score separated by tabs")
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", fields[2].strip()):
            raise InputError(f"{where}: score {_short(fields[2])}, expected a whole number")
        yield where, {"query-id": fields[0], "corpus-id": fields[1], "score": int(fields[2])}


def read_texts(rows: Iterable[Row], *, titles: bool = False, repeats: bool) -> dict[str, str]:
    """Text by `_id`. `titles`: a title goes in front.

    `repeats`: a second row with the same id and text is passed over, and the column may be `id`, as on the Hub.

    Raises:
        InputError: a row without `_id` or `text`, or an id that is there twice.
    """
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, row in rows:
        key, text = (
            _identifier(row, "id" if "_id" not in row and repeats else "_id", where),
            _string(row, "text", where),
        )
        if titles and (title := _string(row, "title", where, needed=False)):
            text = f"{title} {text}".strip()
        if key in texts and not (repeats and texts[key] == text):
            raise InputError(f"{where}: _id {_short(key)} is there already, at {places[key]}", "ids must differ")
        texts[key], places[key] = text, where
    return texts


def read_judgements(rows: Iterable[Row], *, repeats: bool) -> dict[str, dict[str, int]]:
    """Grade by document id by query id. A row's `corpus-id` may be a list; without `score` it is relevant (grade 1).

    Raises:
        InputError: a row without its ids or with a score that is no whole number, or a pair judged twice.
    """
    qrels: dict[str, dict[str, int]] = {}
    for where, row in rows:
        query = _identifier(row, "query-id", where)
        grade = row.get("score", 1)
        if isinstance(grade, bool) or not (isinstance(grade, int) or (isinstance(grade, float) and grade.is_integer())):
            raise InputError(f"{where}: score {_short(grade)}, expected a whole number")
        many = row.get("corpus-id")
        for document in many if isinstance(many, list) else [many]:
            document = _identifier({"corpus-id": document}, "corpus-id", where)
            judged = qrels.setdefault(query, {})
            if document in judged and not (repeats and judged[document] == int(grade)):
                raise InputError(f"{where}: query {_short(query)} and document {_short(document)} are judged already")
            judged[document] = int(grade)
    return qrels


def _identifier(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {key} {_short(value)}, expected a string")
    return value


def _string(row: Mapping[str, Any], key: str, where: str, *, needed: bool = True) -> str:
    if needed and key not in row:
        raise InputError(f"{where}: no {key!r}, found {', '.join(map(repr, row)) or 'nothing'}")
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} {_short(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{where}: {key} holds half a surrogate pair, which is no text") from None
    return value


def _short(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
