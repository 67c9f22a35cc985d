"""Exact mining search against a float64 product over everything: documents, order, ties, whatever the blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from anchor_cli.mine.search import GROUP, QUERIES_A_BLOCK, SLACK, error_bound, nearest, nearest_of_block

Float32Array = npt.NDArray[np.float32]


def brute_force(queries: Float32Array, documents: Float32Array, k: int) -> tuple[npt.NDArray, npt.NDArray]:
    left, right = queries.astype(np.float64), documents.astype(np.float64)
    scores = np.empty((len(left), len(right)))
    for index, query in enumerate(left):
        lengths = np.sqrt((right * right).sum(1)) * np.sqrt((query * query).sum())
        scores[index] = (right * query).sum(1) / np.maximum(lengths, 1e-12)
    rows = np.broadcast_to(np.arange(len(right)), scores.shape)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return order, np.take_along_axis(scores, order, 1)


def vectors(seed: int, num: int, dimension: int, spread: float = 1.0) -> Float32Array:
    """Rows around one direction: the smaller the spread, the nearer all cosines are to 1 and to each other."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(num, dimension)) * spread + 1.0
    return rows.astype(np.float32)


@pytest.mark.parametrize("block", [1, 7, GROUP, 333, 5000])
@pytest.mark.parametrize("spread", [3.0, 1e-2, 1e-4])
def test_it_is_the_float64_ranking(spread: float, block: int) -> None:
    queries, documents = vectors(1, 40, 48, spread), vectors(2, 1500, 48, spread)
    want, scores = brute_force(queries, documents, 20)
    got = nearest_of_block(queries, documents, 20, block=block)
    assert (got.documents == want).all()
    assert np.array_equal(got.scores, scores)


def test_equal_documents_tie_by_row() -> None:
    documents = np.repeat(vectors(3, 11, 16), 60, axis=0)[np.random.default_rng(4).permutation(660)]
    queries = vectors(5, 9, 16)
    want, _ = brute_force(queries, documents, 100)
    got = nearest_of_block(queries, documents, 100, block=50)
    assert (got.documents == want).all()


def test_more_ties_than_candidates_are_searched_again() -> None:
    """The k-th score is shared by more documents than the float32 pass keeps: it must keep more."""
    k = 5
    documents = np.vstack([vectors(6, 50, 8), np.tile(vectors(7, 1, 8), (10 * (k + SLACK), 1)), vectors(8, 50, 8)])
    query = documents[60:61]
    got = nearest_of_block(query, documents, k, block=64)
    assert got.documents.tolist() == [list(range(50, 50 + k))]


def test_fewer_documents_than_wanted_zero_rows_and_many_blocks_of_queries() -> None:
    documents = vectors(9, 6, 4)
    documents[2] = 0
    queries = vectors(10, 2 * QUERIES_A_BLOCK + 76, 4)
    queries[3] = 0
    want, scores = brute_force(queries, documents, 10)
    got = list(nearest(queries, documents, 10))
    assert [len(block.documents) for block in got] == [QUERIES_A_BLOCK, QUERIES_A_BLOCK, 76]
    assert (np.concatenate([block.documents for block in got]) == want).all()
    assert np.array_equal(np.concatenate([block.scores for block in got]), scores)


def test_the_error_bound_holds_where_float32_is_worst() -> None:
    """Long rows of one sign: every product adds to the error. The observed error stays below."""
    queries, documents = np.abs(vectors(11, 30, 4096, 0.3)), np.abs(vectors(12, 200, 4096, 0.3))
    _, scores = brute_force(queries, documents, 200)
    left = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    right = documents / np.linalg.norm(documents, axis=1, keepdims=True)
    worst = float(np.abs(np.sort(left @ right.T, axis=1)[:, ::-1].astype(np.float64) - scores).max())
    assert 0 < worst < error_bound(4096)
