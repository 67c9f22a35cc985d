"""Mines prepared pairs with hashed bags of words in place of a model: `mine_worker.py PREPARED STORE RULES.json`.

A real model would cost minutes here and rank no differently; the vectors are deterministic, many of them tie, and
texts that share words are near each other.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.mine import mine
from anchor_cli.mine.corpus import Corpus, corpus_of
from anchor_cli.mine.select import Rules
from anchor_cli.mine.store import Store


class BagOfWords:
    """(N, D) sums of a fixed random direction a word."""

    name = "bag of words"
    dimension = 24

    def encode_training_queries(self, texts: Sequence[str], prefix: str, language: str) -> npt.NDArray[np.float32]:
        return self.encode_documents([prefix + text for text in texts], language)

    def encode_documents(self, texts: Sequence[str], language: str) -> npt.NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for index, text in enumerate(texts):
            for word in text.split():
                generator = np.random.default_rng(zlib.crc32(word.encode()))
                vectors[index] += generator.standard_normal(self.dimension, dtype=np.float32)
        return vectors


def mined(prepared: Path, folder: Path, rules: Rules, further: Sequence[str] = ()) -> tuple[Store, Corpus]:
    """Mine in this process."""
    corpus, embedder = corpus_of(PreparedPairs.open(prepared), further), BagOfWords()
    store = mine.begin(folder, mine.plan_of({"pairs": corpus.pairs.fingerprint, "model": embedder.name}, rules))
    mine.encode(corpus, embedder, store, mine.Place())
    mine.search(corpus, embedder.dimension, store, rules, mine.Place())
    return store, corpus


if __name__ == "__main__":
    mined(Path(sys.argv[1]), Path(sys.argv[2]), Rules(**json.loads(Path(sys.argv[3]).read_text())))
