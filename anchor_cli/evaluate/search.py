"""Exact nearest documents by cosine, in blocks, and the health of a set of embeddings.

    Q queries, N documents, D dimensions, k wanted

No (Q, N) matrix is ever held: a block of queries meets a block of documents, and only the best k scores are kept. A
score is the cosine computed in float64 and rounded to a multiple of 2^-30, so that it depends neither on the size of
the blocks nor on where in a block a document stands, and equal vectors tie exactly; a float32 product promises neither.
Score and tie order are one int64 key, so that "the best k" has one answer even when every document ties.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from anchor_cli.base.errors import RunError
from anchor_cli.base.metric_names import ALIGNMENT, MEAN_COSINE, NEAR_IDENTICAL, UNIFORMITY
from anchor_cli.processes.gpus import on_gpu

Float32Array = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

_QUERIES_A_BLOCK = 512
_BLOCK_BYTES = 96 << 20
_BYTES_A_SCORE = 48  # float64 score, its rounding, int64 steps and key, and the top-k's own copies
_STEPS = 2.0**30  # steps of a score from 0 to 1: far above the noise of float64, far below that of float32
_LOW_32_BITS = 0xFFFFFFFF
NEAR_IDENTICAL_COSINE = 0.999
"""Assumption: two different texts above this cosine are one point for a retriever."""


def unit_rows(vectors: Tensor) -> Tensor:
    """(N, D) float64 rows of length 1; a zero row stays zero, as with torch's and sentence-transformers' normalize."""
    wide: Tensor = vectors.to(torch.float64)
    lengths: Tensor = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    return wide / lengths.clamp_min(1e-12)


def check_finite(vectors: Float32Array, what: str) -> None:
    """Raises:
    RunError: a row holds NaN or infinity; such a row would be ranked by accident.
    """
    for start in range(0, len(vectors), 65536):
        bad = ~np.isfinite(vectors[start : start + 65536]).all(axis=1)
        if bad.any():
            first = start + int(np.flatnonzero(bad)[0])
            raise RunError(f"{what}: embedding {first} of {len(vectors)} is not finite", "the model has diverged")


def tie_ranks(ids: Sequence[str], ascending: bool) -> Int64Array:
    """(N,) place of every document in the tie order: 0 goes first among documents of equal score."""
    order = sorted(range(len(ids)), key=ids.__getitem__, reverse=not ascending)
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[order] = np.arange(len(ids))
    return ranks


def search(
    queries: Float32Array,
    documents: Float32Array,
    k: int,
    ties: Int64Array | None = None,
    *,
    device: str = "cpu",
    block_bytes: int = _BLOCK_BYTES,
) -> tuple[Int64Array, FloatArray]:
    """The `k` best documents of every query by cosine: indices (Q, min(k, N)) and scores, best first.

    `queries` (Q, D), `documents` (N, D; may be memory-mapped), not necessarily of length 1. `ties` (N,): a permutation,
    lower goes first among equal scores; by default the documents' own order. Memory beyond the arguments and the result
    stays near `block_bytes`, whatever Q and N.

    Raises:
        RunError: an embedding is not finite.
    """
    check_finite(queries, "queries")
    check_finite(documents, "documents")
    num_documents = len(documents)
    k = min(k, num_documents)
    ties = np.arange(num_documents, dtype=np.int64) if ties is None else ties
    by_tie = np.empty(num_documents, dtype=np.int64)
    by_tie[ties] = np.arange(num_documents)
    indices = np.empty((len(queries), k), dtype=np.int64)
    scores = np.empty((len(queries), k), dtype=np.float64)
    for start in range(0, len(queries), _QUERIES_A_BLOCK):
        stop = min(start + _QUERIES_A_BLOCK, len(queries))
        best = _best_keys(unit_rows(_on(queries[start:stop], device)), documents, k, ties, device, block_bytes)
        indices[start:stop] = by_tie[(_LOW_32_BITS - (best & _LOW_32_BITS)).cpu().numpy()]
        scores[start:stop] = ((best >> 32).to(torch.float64) / _STEPS).cpu().numpy()
    return indices, scores


def _best_keys(
    queries: Tensor, documents: Float32Array, k: int, ties: Int64Array, device: str, block_bytes: int
) -> Tensor:
    """(q, k) largest keys of a block of queries (q, D; unit rows) among all documents, largest first."""
    per_document = _BYTES_A_SCORE * len(queries) + 3 * 8 * documents.shape[1]
    size = max(1, block_bytes // per_document)
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    for start in range(0, len(documents), size):
        block = unit_rows(_on(documents[start : start + size], device))
        keys = _keys(queries @ block.T, _on(ties[start : start + size], device))
        both = torch.cat([best, keys.topk(min(k, keys.shape[1]), dim=1, sorted=False).values], dim=1)
        best = both.topk(min(k, both.shape[1]), dim=1).values
    return best


def device_of(device: str | None) -> str:
    """The device asked for, else the GPU if there is one. Raises InputError: it cannot be used."""
    return device or ("cuda" if on_gpu() else "cpu")


def _on(array: npt.NDArray[np.generic], device: str) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _keys(cosines: Tensor, ties: Tensor) -> Tensor:
    """(q, n) int64 that order as (score descending, tie rank ascending) when sorted descending."""
    steps: Tensor = (cosines * _STEPS).round().to(torch.int64)
    return (steps << 32) + (_LOW_32_BITS - ties)


def embedding_health(
    documents: Float32Array, pairs: tuple[Float32Array, Float32Array], *, max_documents: int = 2000, seed: int = 0
) -> dict[str, float]:
    """How the embeddings lie: documents (N, D) of distinct texts; pairs (P, D), (P, D) of query and relevant document.

    alignment       mean squared distance of a query and its relevant document, 0 to 4, lower is better; and
    uniformity      log of the mean of exp(-2 d^2) over document pairs, 0 is collapse (Wang and Isola 2020)
    mean_cosine     of document pairs: 0 is isotropic, 1 is collapse (Ethayarajh 2019)
    near_identical  share of documents with another one above cosine 0.999: 1 is collapse

    All but alignment are over a seeded sample of at most `max_documents`; they are NaN-free: one document gives 0.
    """
    queries, relevant = (unit_rows(torch.from_numpy(np.ascontiguousarray(side))) for side in pairs)
    health = {ALIGNMENT: float((queries - relevant).square().sum(1).mean()) if len(queries) else 0.0}
    rows = np.arange(len(documents))
    if len(rows) > max_documents:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), max_documents, replace=False))
    if len(rows) < 2:
        return health | {UNIFORMITY: 0.0, MEAN_COSINE: 0.0, NEAR_IDENTICAL: 0.0}
    sample = unit_rows(torch.from_numpy(np.ascontiguousarray(documents[rows])))
    cosines = sample @ sample.T
    others = ~torch.eye(len(sample), dtype=torch.bool)
    pair_cosines = cosines[others]
    nearest = cosines.masked_fill(~others, -1.0).amax(dim=1)
    return health | {
        UNIFORMITY: float(torch.exp(-2 * (2 - 2 * pair_cosines)).mean().log()),
        MEAN_COSINE: float(pair_cosines.mean()),
        NEAR_IDENTICAL: float((nearest > NEAR_IDENTICAL_COSINE).double().mean()),
    }
