"""Another model that judges which candidates may be negatives: any folder or Hub id that `anchor eval` can load."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from anchor_cli.data.contrast_rows import ContrastData, StepTexts
from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.evaluate.places import resolve_models
from anchor_cli.processes.ranks import Ranks

IntArray = npt.NDArray[np.int64]


class Guide:
    """Encodes a step's texts with the guide's own prompts; every rank a share, every rank gets all."""

    def __init__(self, name: str, data: ContrastData, ranks: Ranks) -> None:
        (place,) = resolve_models([name])
        self._embedder = load_embedder(place.folder, device=str(ranks.device))
        self._data, self._ranks = data, ranks

    def encode(self, texts: StepTexts) -> tuple[torch.Tensor, torch.Tensor]:
        """(G, D') of the queries and (N, D') of the documents."""
        num, world = len(texts.ids), self._ranks.world_size
        shares = [np.arange(rank, num, world) for rank in range(world)]
        embeddings = gather_texts(self._encode_share(texts, shares[self._ranks.rank]), shares, self._ranks)
        queries, documents = (torch.from_numpy(side).to(embeddings.device) for side in (texts.queries, texts.documents))
        return embeddings[queries], embeddings[documents]

    def _encode_share(self, texts: StepTexts, share: IntArray) -> torch.Tensor:
        """(n, D') of some of the step's texts, given as they came in."""
        by_kind: dict[str | None, list[tuple[int, str]]] = {}
        for at, text in enumerate(share.tolist()):
            row, place = texts.places[text]
            query, positive, language = self._data.pairs.texts(row)
            content = query if place == 0 else positive if place == 1 else self._data.negative_texts(row)[place - 2]
            by_kind.setdefault(language if place == 0 else None, []).append((at, content))
        vectors = np.zeros((len(share), self._embedder.dimension), dtype=np.float32)
        for kind, members in by_kind.items():
            contents = [content for _, content in members]
            places = [at for at, _ in members]
            if kind is None:
                vectors[places] = self._embedder.encode_documents(contents, "")
            else:
                vectors[places] = self._embedder.encode_queries(contents, kind)
        return torch.from_numpy(vectors).to(self._ranks.device)


def gather_texts(own: torch.Tensor, shares: list[IntArray], ranks: Ranks) -> torch.Tensor:
    """(n, D) encodings of this rank's texts -> (U, D) of all texts in the step's order, float32, on every rank."""
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    everyone = [own]
    if ranks.world_size > 1:
        padded = own.new_zeros(max(map(len, shares)), own.shape[1])
        padded[: len(own)] = own
        everyone = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(everyone, padded)
    out = own.new_empty(sum(map(len, shares)), own.shape[1])
    for part, share in zip(everyone, shares, strict=True):
        out[torch.from_numpy(share).to(own.device)] = part[: len(share)]
    return out
