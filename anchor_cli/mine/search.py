"""The exact nearest documents of many queries, by cosine, in blocks on the device.

    Q queries, N documents, D dimensions, k wanted, q and n of a block

Two passes. Blocks of unit rows are multiplied in float32 and only what can still be among the best is kept: a block of
scores is looked at through the maxima of groups of documents, and a group whose maximum does not reach a query's k-th
score so far is never looked at again. The kept candidates are then scored again in float64 and ordered by (score
descending, document ascending). A float32 product errs by at most `error_bound(D)`; a query whose k-th score lies too
near the end of its candidates is searched again with more of them, so the result is that of float64 over everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

QUERIES_A_BLOCK = 2048  # documents are brought to unit length once for so many queries
DOCUMENTS_A_BLOCK = 8192
GROUP = 64  # documents whose scores are first looked at through their maximum
SLACK = 32  # candidates kept beyond k in the float32 pass


@dataclass(frozen=True)
class Nearest:
    """The best documents of q queries, best first; ties by document."""

    documents: Int64Array
    """(q, k) rows of the documents."""
    scores: Float64Array
    """(q, k) cosines, float64."""


def error_bound(dimension: int) -> float:
    """How far a float32 cosine of unit rows in D dimensions can be from the float64 one of the stored vectors.

    D products and sums of magnitude at most 1, each rounded at 2^-24 (Higham, Accuracy and Stability, 3.1), and both
    rows' own rounding to unit length.
    """
    return (dimension + 4) * 2.0**-24


def nearest(
    queries: Float32Array, documents: Float32Array, k: int, *, device: str = "cpu", block: int = DOCUMENTS_A_BLOCK
) -> Iterator[Nearest]:
    """The `k` nearest documents of every query, a block of queries at a time, in order.

    Args:
        queries: (Q, D), not necessarily of length 1; may be memory-mapped.
        documents: (N, D), likewise. A zero row has cosine 0 to everything.
        k: documents wanted of each query; N if there are fewer.
        device: where products are computed, in float32 (never TF32).
        block: documents multiplied at once; changes time and memory only.
    """
    for start in range(0, len(queries), QUERIES_A_BLOCK):
        yield nearest_of_block(queries[start : start + QUERIES_A_BLOCK], documents, k, device=device, block=block)


def nearest_of_block(
    queries: Float32Array, documents: Float32Array, k: int, *, device: str = "cpu", block: int = DOCUMENTS_A_BLOCK
) -> Nearest:
    """`nearest` of at most `QUERIES_A_BLOCK` queries (q, D)."""
    k = min(k, len(documents))
    found, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float64)
    todo, width = np.arange(len(queries)), k + SLACK
    while len(todo):
        width = min(width, len(documents))
        rows, floor = _candidates(queries[todo], documents, width, device, block)
        exact = _cosines(queries[todo], documents, rows)
        order = np.lexsort((rows, -exact), axis=1)[:, :k]
        found[todo], scores[todo] = np.take_along_axis(rows, order, 1), np.take_along_axis(exact, order, 1)
        if width == len(documents):
            break
        todo, width = todo[floor + error_bound(queries.shape[1]) >= scores[todo, -1]], 4 * width
    return Nearest(found, scores)


def _candidates(
    queries: Float32Array, documents: Float32Array, width: int, device: str, block: int
) -> tuple[Int64Array, Float64Array]:
    """(q, width) documents with the highest float32 scores, in no order, and (q,) the lowest of these scores."""
    torch.set_float32_matmul_precision("highest")  # an environment can switch TF32 on, whose error is beyond the bound
    left = unit_rows(queries, device)
    best = torch.full((len(queries), width), -torch.inf, device=device)
    rows = torch.zeros((len(queries), width), dtype=torch.int64, device=device)
    products = torch.empty(len(queries) * min(block, len(documents)), device=device)  # fresh memory costs as much again
    for start in range(0, len(documents), block):
        right = unit_rows(documents[start : start + block], device)
        scores = products[: len(queries) * len(right)].view(len(queries), len(right))
        torch.mm(left, right.T, out=scores)  # (q, n)
        new, places = _above(scores, best.amin(dim=1, keepdim=True), width)
        merged, taken = torch.cat([best, new], dim=1).topk(width, dim=1, sorted=False)
        rows = torch.cat([rows, places + start], dim=1).gather(1, taken)
        best = merged
    return rows.cpu().numpy(), best.amin(dim=1).double().cpu().numpy()


def _above(scores: Tensor, threshold: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scores (q, m) above each query's threshold and their columns, filled up with -inf; at most the best `width`."""
    num_queries, num_documents = scores.shape
    if num_documents <= width or bool((threshold == -torch.inf).all()):
        values, places = scores.topk(min(width, num_documents), dim=1, sorted=False)
        return values, places
    if num_documents % GROUP:
        scores = torch.nn.functional.pad(scores, (0, -num_documents % GROUP), value=-torch.inf)
    groups = scores.view(num_queries, -1, GROUP)
    query, group = (groups.amax(dim=2) > threshold).nonzero(as_tuple=True)
    members = groups[query, group]  # (hits, GROUP)
    hit, place = (members > threshold[query]).nonzero(as_tuple=True)
    query, column = query[hit], group[hit] * GROUP + place
    counts = torch.bincount(query, minlength=num_queries)
    if int(counts.max()) > width:
        values, places = scores.topk(width, dim=1, sorted=False)
        return values, places
    offset = torch.arange(len(query), device=scores.device) - (counts.cumsum(0) - counts)[query]
    values = torch.full((num_queries, int(counts.max())), -torch.inf, device=scores.device)
    places = torch.zeros(values.shape, dtype=torch.int64, device=scores.device)
    values[query, offset], places[query, offset] = scores[query, column], column
    return values, places


def unit_rows(vectors: Float32Array, device: str) -> Tensor:
    """(n, D) float32 rows of length 1 on the device; a zero row stays zero."""
    rows = torch.from_numpy(np.ascontiguousarray(vectors)).to(device)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-12)


def _cosines(queries: Float32Array, documents: Float32Array, rows: Int64Array) -> Float64Array:
    """(q, m) float64 cosines of every query and its own candidates `rows` (q, m)."""
    scores = np.empty(rows.shape, np.float64)
    for index, candidates in enumerate(rows):
        scores[index] = cosines(queries[index], documents[candidates])
    return scores


def cosines(query: Float32Array, documents: Float32Array) -> Float64Array:
    """(m,) float64 cosines of one query (D,) and documents (m, D); 0 where one of them is zero.

    Summed row by row, so that equal documents get equal scores wherever they stand.
    """
    left, right = query.astype(np.float64), documents.astype(np.float64)
    lengths = np.sqrt(np.square(right).sum(axis=1)) * np.sqrt(np.square(left).sum())
    scores: Float64Array = (right * left).sum(axis=1) / np.maximum(lengths, 1e-12)
    return scores
