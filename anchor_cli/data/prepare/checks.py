"""What is wrong with a pair, in one word; and which form two texts share when they say the same.

Every function looks at one row alone. Duplicates need the rows before: `Seen` keeps 8 bytes a row of them.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anchor_cli.base.language import language_of

REASONS = {
    "unreadable": "the line is not a JSON object, or the CSV row has not the header's number of fields",
    "missing": "the column is absent or null",
    "not_a_string": "the value is a number, a list in a list, …",
    "empty": "the text is ''",
    "over_long": "the text, or its whole line, is beyond --max-characters",
    "nul": "the text holds a NUL character",
    "broken_utf8": "the bytes are not UTF-8",
    "lone_surrogate": "the text holds half of a surrogate pair, such as \\ud800",
    "whitespace": "nothing in the text is visible",
    "query_is_document": "query and document are the same text",
    "unknown_language": "no instruction is given for the row's language, or its value is no text",
    "leak_query": "the text is one of a benchmark's queries",
    "leak_document": "the text is one of a benchmark's documents",
    "leak_ngram": "the text shares a long run of words with a benchmark",
    "no_room": "template and instruction leave no room for content",
    "no_tokens": "the tokenizer makes no token of the content",
    "duplicate_pair": "the same query and document, character by character, came before",
    "same_query_same_document": "the same pair came before, in another Unicode form or with other white space",
    "scores_unlike": "the teacher's scores are not one finite number for each of the row's documents",
    "near_duplicate": "a nearly equal query with a nearly equal document came before (--near-duplicates)",
}
"""Every reason a row is rejected for, in the order in which it is looked for."""

_INVISIBLE = r"\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u115f\u1160\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff"
_VISIBLE = re.compile(f"[^{_INVISIBLE}]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")  # how Python's surrogateescape writes a byte that is not UTF-8


def text_fault(value: Any, max_characters: int, *, escaped_bytes: bool = False) -> str | None:
    """The reason to reject a query or a document, or None.

    `escaped_bytes`: the text was decoded with surrogateescape, so U+DC80..U+DCFF stand for bytes that are not UTF-8.
    """
    if value is None:
        return "missing"
    if not isinstance(value, str):
        return "not_a_string"
    if not value:
        return "empty"
    if len(value) > max_characters:
        return "over_long"
    if "\0" in value:
        return "nul"
    if not value.isascii() and _SURROGATE.search(value):
        return "broken_utf8" if escaped_bytes and _ESCAPED_BYTE.search(value) else "lone_surrogate"
    return None if _VISIBLE.search(value) else "whitespace"


def row_language(given: Any, query: str, document: str) -> str | None:
    """The language column's value, else decided by the script of the query (of the document if it has no letter).

    None for a value that is no text: a number, half of a surrogate pair, or a byte that is not UTF-8.
    """
    if given is not None and (not isinstance(given, str) or _SURROGATE.search(given)):
        return None
    if given and given.strip():
        return str(given.strip())
    return language_of(query if any(map(str.isalpha, query)) else document[:1000])


def pair_key(query: str, document: str) -> int:
    """64 bits of BLAKE2b over both texts; 0xFF, which UTF-8 never contains, keeps them apart."""
    both = query.encode() + b"\xff" + document.encode()
    return int.from_bytes(hashlib.blake2b(both, digest_size=8).digest(), "little")


class Seen:
    """Which 64-bit keys came before: sorted runs, merged as they grow, 8 bytes a key.

    Runs of more than `spill` keys lie in files of `folder`, so memory stays flat. Two different rows share a key with
    probability n^2 / 2^65: 1e-7 for two million rows, 3e-4 for a hundred million.
    """

    def __init__(self, folder: Path | None = None, spill: int = 1 << 22) -> None:
        self._folder, self._spill = folder, spill
        self._runs: list[npt.NDArray[np.uint64]] = []  # each sorted, sizes falling at least by half

    def add(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """(n,) True where a key was not seen before, neither earlier nor further up in `keys` (n,)."""
        distinct, first = np.unique(keys, return_index=True)
        new = np.ones(len(distinct), dtype=bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, distinct), len(run) - 1)
            new &= run[at] != distinct
        fresh = np.zeros(len(keys), dtype=bool)
        fresh[first[new]] = True
        if new.any():
            self._append(distinct[new])
        return fresh

    def _append(self, run: npt.NDArray[np.uint64]) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            other = self._runs.pop()
            merged = self._room(len(other) + len(run))
            merged[: len(other)] = other
            merged[len(other) :] = run
            merged.sort()
            run = merged
        self._runs.append(run)

    def _room(self, num: int) -> npt.NDArray[np.uint64]:
        if self._folder is None or num <= self._spill:
            return np.empty(num, dtype=np.uint64)
        with tempfile.TemporaryFile(dir=self._folder) as file:  # has no name: it goes when the array goes
            file.truncate(8 * num)
            if hasattr(os, "posix_fallocate"):  # else a full disk is a SIGBUS when the map is written
                os.posix_fallocate(file.fileno(), 0, 8 * num)
            return np.memmap(file, dtype=np.uint64, mode="r+", shape=num)
