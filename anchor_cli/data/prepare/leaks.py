"""Training rows that are in a benchmark: found by normalised equality and by long runs of equal words.

A text is normalised to NFKC, case-folded words; punctuation and white space do not count; each ideograph or kana is a
word, since Chinese and Japanese do not put spaces. A run of 13 words is the overlap that GPT-3's authors looked for
(Brown et al. 2020, arXiv 2005.14165, appendix C); for Korean, whose words are longer, the same number is an assumption
on the lenient side. Keys are 64-bit hashes; 10 million of them make a false hit once in 1e12 looks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt

from anchor_cli.data.benchmarks.benchmarks import Benchmark

NGRAM_WORDS = 13

Keys = npt.NDArray[np.uint64]
Owners = npt.NDArray[np.int32]

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing (Knuth's golden ratio)
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # finaliser of MurmurHash3


@dataclass(frozen=True)
class Leak:
    """Where a text was found."""

    reason: str
    """`leak_query`, `leak_document` or `leak_ngram`."""
    benchmark: str
    """Name of the benchmark, such as `ko/NanoNQ`."""


def words_of(text: str) -> list[str]:
    """Case-folded NFKC words, without punctuation."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _word_hashes(words: list[str]) -> Keys:
    """(words,) 64 bits a word: CRC-32 of it forwards and backwards; unlike hash(), the same in every process."""
    encoded = [word.encode() for word in words]
    low = np.array([crc32(word) for word in encoded], dtype=np.uint64)
    high = np.array([crc32(word[::-1]) for word in encoded], dtype=np.uint64)
    hashes = (low | (high << np.uint64(32))) * _FACTOR
    hashes ^= hashes >> np.uint64(33)
    hashes *= _MIX
    return hashes ^ (hashes >> np.uint64(29))


def _run_keys(hashes: Keys, num_words: int) -> Keys:
    """(max(words - num_words + 1, 0),) a key for each run of `num_words` words."""
    num = len(hashes) - num_words + 1
    if num <= 0:
        return np.empty(0, dtype=np.uint64)
    keys = np.zeros(num, dtype=np.uint64)
    for offset in range(num_words):
        keys = keys * _FACTOR + hashes[offset : offset + num]
    return keys


def _whole_key(hashes: Keys) -> np.uint64:
    return np.uint64(_run_keys(hashes, len(hashes))[0] if len(hashes) else 0)


@dataclass(frozen=True)
class LeakIndex:
    """What benchmarks consist of. Arrays are sorted by key; owners number `names`."""

    names: tuple[str, ...]
    ngram_words: int
    queries: tuple[Keys, Owners]
    documents: tuple[Keys, Owners]
    ngrams: tuple[Keys, Owners]

    @classmethod
    def build(cls, benchmarks: Iterable[Benchmark], ngram_words: int = NGRAM_WORDS) -> LeakIndex:
        """Index every query and document. Memory: 12 bytes a run of words, about 1 GB for a million documents."""
        names: list[str] = []
        queries, documents, ngrams = _Entries(), _Entries(), _Entries()
        for owner, benchmark in enumerate(benchmarks):
            names.append(benchmark.name)
            for texts, exact in ((benchmark.queries, queries), (benchmark.corpus, documents)):
                for text in texts.values():
                    hashes = _word_hashes(words_of(text))
                    if len(hashes):
                        exact.add(np.array([_whole_key(hashes)]), owner)
                        ngrams.add(_run_keys(hashes, ngram_words), owner)
        return cls(tuple(names), ngram_words, queries.sorted(), documents.sorted(), ngrams.sorted())

    def find(self, text: str) -> Leak | None:
        """The benchmark that holds `text`, or a long run of its words; None when there is none."""
        hashes = _word_hashes(words_of(text))
        if not len(hashes):
            return None
        whole = np.array([_whole_key(hashes)])
        for reason, index, keys in (
            ("leak_query", self.queries, whole),
            ("leak_document", self.documents, whole),
            ("leak_ngram", self.ngrams, _run_keys(hashes, self.ngram_words)),
        ):
            owner = _look_up(index, keys)
            if owner is not None:
                return Leak(reason, self.names[owner])
        return None

    def save(self, folder: Path) -> None:
        """Write the index as .npy files, so that processes can share it."""
        for name in ("queries", "documents", "ngrams"):
            keys, owners = getattr(self, name)
            np.save(folder / f"{name}-keys.npy", keys)
            np.save(folder / f"{name}-owners.npy", owners)
        (folder / "names").write_text("\n".join([str(self.ngram_words), *self.names]), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LeakIndex:
        """Memory-map what `save` wrote."""
        num, *names = (folder / "names").read_text(encoding="utf-8").split("\n")

        def pair(name: str) -> tuple[Keys, Owners]:
            keys = np.load(folder / f"{name}-keys.npy", mmap_mode="r")
            return keys, np.load(folder / f"{name}-owners.npy", mmap_mode="r")

        return cls(tuple(names), int(num), pair("queries"), pair("documents"), pair("ngrams"))


class _Entries:
    def __init__(self) -> None:
        self._keys: list[Keys] = []
        self._owners: list[Owners] = []

    def add(self, keys: Keys, owner: int) -> None:
        self._keys.append(keys)
        self._owners.append(np.full(len(keys), owner, dtype=np.int32))

    def sorted(self) -> tuple[Keys, Owners]:
        """Distinct keys, each with its first owner."""
        if not self._keys:
            return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int32)
        keys, first = np.unique(np.concatenate(self._keys), return_index=True)
        return keys, np.concatenate(self._owners)[first]


def _look_up(index: tuple[Keys, Owners], keys: Keys) -> int | None:
    known, owners = index
    if not len(known) or not len(keys):
        return None
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    hits = np.flatnonzero(known[at] == keys)
    return int(owners[at[hits[0]]]) if len(hits) else None
