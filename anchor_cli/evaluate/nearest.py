"""`anchor search`: the documents nearest to a question, to look at what a model finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anchor_cli.base.console import progress
from anchor_cli.base.language import language_of
from anchor_cli.evaluate.embedder import Embedder
from anchor_cli.evaluate.evaluate import encode_distinct
from anchor_cli.evaluate.search import search, tie_ranks


@dataclass(frozen=True)
class Neighbour:
    """One document of a result."""

    rank: int
    id: str
    score: float
    """Cosine similarity."""
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Index:
    """The vectors of a corpus. Encoded once, searched exactly, as in evaluation."""

    def __init__(self, embedder: Embedder, documents: Mapping[str, str], device: str) -> None:
        self._embedder, self._device = embedder, device
        self._ids, self._texts = list(documents), list(documents.values())
        self._ties = tie_ranks(self._ids, ascending=True)
        with progress(f"encoding {len(documents):,} documents", len(set(self._texts)), "texts") as bar:
            vectors, rows = encode_distinct(
                lambda texts: embedder.encode_documents(texts, "en"), self._texts, bar.advance
            )
        self._vectors = vectors[rows]

    def nearest(self, query: str, k: int, language: str | None = None) -> list[Neighbour]:
        """The `k` documents of the highest cosine, equal scores by id. The language chooses the instruction."""
        vector = self._embedder.encode_queries([query], language or language_of(query))
        rows, scores = search(np.asarray(vector), self._vectors, k, self._ties, device=self._device)
        pairs = zip(rows[0], scores[0], strict=True)
        return [
            Neighbour(rank, self._ids[row], float(score), self._texts[row])
            for rank, (row, score) in enumerate(pairs, start=1)
        ]
