"""The documents of a corpus: those of a BEIR folder or a benchmark, or those of any pairs, each distinct text once."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anchor_cli.base.console import say
from anchor_cli.base.errors import InputError
from anchor_cli.data.benchmarks.beir import CORPUS_FILE, read_jsonl, read_texts
from anchor_cli.data.benchmarks.benchmarks import load_benchmarks
from anchor_cli.data.pairs import MANIFEST
from anchor_cli.data.prepare.checks import text_fault
from anchor_cli.data.prepare.parse import rows_of_part
from anchor_cli.data.sources.files import Fault, Limits
from anchor_cli.data.sources.sources import Source, SourceOptions, open_source
from anchor_cli.data.text import content_of

_TEXT = "text"  # the column of a file that holds documents only


def read_documents(spec: str, column: str | None = None) -> dict[str, str]:
    """Text by id: the corpus of a BEIR folder or of a NanoBEIR set, or the documents of a source of pairs.

    A document of pairs has the number of its first row as its id, behind the file's name where there are several.
    Ids of several benchmarks have the benchmark's name before them. What cannot be used is counted on stderr.
    `column`: which one holds the documents; by default it is guessed as `anchor prepare` does, else `text`.

    Raises:
        InputError: nothing is there, or no document. RunError: the Hub cannot be reached.
    """
    corpus = Path(spec).expanduser() / CORPUS_FILE
    if corpus.is_file():
        documents = read_texts(read_jsonl(corpus), titles=True, repeats=False)
    elif spec.lower().startswith("nanobeir:"):
        sets = load_benchmarks([spec])
        before = [f"{each.name}/" if len(sets) > 1 else "" for each in sets]
        documents = {
            name + key: text for name, each in zip(before, sets, strict=True) for key, text in each.corpus.items()
        }
    else:
        documents = _documents_of(_open(spec, column))
    distinct = {text: key for key, text in reversed(documents.items()) if text.strip()}
    if not distinct:
        raise InputError(f"{spec}: no document with text in it")
    return {key: text for text, key in reversed(distinct.items())}


def _open(spec: str, column: str | None) -> Source:
    if column is not None:
        return open_source(spec, SourceOptions(query_column=column, document_column=column))
    try:
        prepared = (Path(spec).expanduser() / MANIFEST).is_file()  # its columns are known
        return open_source(spec, SourceOptions(reported=None) if prepared else SourceOptions())
    except InputError as error:
        try:
            return open_source(spec, SourceOptions(query_column=_TEXT, document_column=_TEXT))
        except InputError:
            raise error from None


def _documents_of(source: Source) -> dict[str, str]:
    documents: dict[str, str] = {}
    left_out: Counter[str] = Counter()
    for key, text, escaped in _given(source):
        content = content_of(text) if isinstance(text, str) else text
        if isinstance(content, Fault):
            left_out[content.reason] += 1
        elif fault := text_fault(content, sys.maxsize, escaped_bytes=escaped):
            left_out[fault] += 1
        else:
            documents[key] = content
    if left_out:
        reasons = ", ".join(f"{reason} {num:,}" for reason, num in left_out.most_common())
        say(f"{source.spec}: {left_out.total():,} documents left out: {reasons}")
    return documents


def _given(source: Source) -> Iterator[tuple[str, Any, bool]]:
    """(id, document as it came, whether its bytes were decoded with surrogateescape)."""
    for file in source.files:
        place = f"{Path(file.name).name}:" if len(source.files) > 1 else ""
        for part in file.parts(Limits()):
            for row, (_, document, *_) in rows_of_part(part, file.columns):
                many = document if isinstance(document, list) else [document]
                for index, text in enumerate(many):
                    yield f"{place}{row + 1}" + (f".{index + 1}" if len(many) > 1 else ""), text, part.kind == "rows"
