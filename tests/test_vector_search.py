"""Exact search against brute force, its memory, and embedding health against naive loops."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anchor_cli.base.errors import RunError
from anchor_cli.evaluate.search import embedding_health, search, tie_ranks

SMALL = st.integers(-2, 2).map(float)  # zero rows, equal rows, opposite rows


def brute_force(queries: np.ndarray, documents: np.ndarray, k: int, ties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def unit(vectors: np.ndarray) -> np.ndarray:
        vectors = vectors.astype(np.float64)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    cosines = np.round((unit(queries) @ unit(documents).T) * 2**30) / 2**30 + 0.0
    order = np.array([np.lexsort((ties, -row))[:k] for row in cosines])
    return order, np.take_along_axis(cosines, order, axis=1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_search_is_brute_force_whatever_the_blocks(data: st.DataObject) -> None:
    num_documents, size = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 4))
    queries = data.draw(arrays(np.float32, (data.draw(st.integers(1, 5)), size), elements=SMALL))
    documents = data.draw(arrays(np.float32, (num_documents, size), elements=SMALL))
    ties = np.array(data.draw(st.permutations(range(num_documents))))
    k = data.draw(st.integers(1, 45))
    got = search(queries, documents, k, ties, block_bytes=data.draw(st.sampled_from([1, 3000, 1 << 20])))
    want = brute_force(queries, documents, k, ties)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_many_queries_and_real_numbers() -> None:
    random = np.random.default_rng(0)
    queries = random.standard_normal((700, 24), dtype=np.float32)  # more than one block of queries
    documents = random.standard_normal((3000, 24), dtype=np.float32)
    documents[2000:] = 4 * documents[:1000]  # every one of these ties
    want = brute_force(queries, documents, 20, np.arange(3000))
    got = search(queries, documents, 20, block_bytes=1 << 20)
    np.testing.assert_array_equal(got[0], want[0])


def test_tie_ranks_follow_the_ids() -> None:
    ids = ["10", "9", "가", "B", "a"]
    assert [ids[i] for i in np.argsort(tie_ranks(ids, ascending=True))] == ["10", "9", "B", "a", "가"]
    assert [ids[i] for i in np.argsort(tie_ranks(ids, ascending=False))] == ["가", "a", "B", "9", "10"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_an_error(bad: float) -> None:
    documents = np.ones((5, 3), dtype=np.float32)
    documents[3, 1] = bad
    with pytest.raises(RunError, match="documents: embedding 3 of 5 is not finite"):
        search(np.ones((1, 3), dtype=np.float32), documents, 2)


MEASURE = """
import resource, sys
import numpy as np
from anchor_cli.evaluate.search import search
num, size, mode = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
random = np.random.default_rng(0)
documents = np.empty((num, size), dtype=np.float32)
for start in range(0, num, 10000):
    documents[start:start + 10000] = random.standard_normal((min(10000, num - start), size), dtype=np.float32)
queries = random.standard_normal((100, size), dtype=np.float32)
search(queries, documents[:1000], 10)  # the libraries' own memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
indices, scores = search(queries, documents, 100)
print("beyond_kb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
unit = lambda v: v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1, keepdims=True)
for row in range(0, 100, 50):
    cosines = np.concatenate([
        np.round(unit(documents[start:start + 50000]) @ unit(queries[row:row + 1])[0] * 2**30) / 2**30
        for start in range(0, num, 50000)
    ])
    want = np.lexsort((np.arange(num), -cosines))[:100]
    assert (want == indices[row]).all() and (cosines[want] == scores[row]).all(), row
"""


def measured_kb(num: int, size: int) -> int:
    command = [sys.executable, "-c", MEASURE, str(num), str(size), "search"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split("beyond_kb")[1])


def test_memory_does_not_grow_with_the_corpus() -> None:
    # a full (100, 100,000) float64 score matrix alone would be 80 MB, with its keys three times that
    assert measured_kb(100_000, 32) < 120_000


@pytest.mark.slow
def test_a_million_documents() -> None:
    assert measured_kb(1_000_000, 256) < 2_500_000


def test_health_is_that_of_naive_loops() -> None:
    random = np.random.default_rng(0)
    documents = random.standard_normal((9, 5)).astype(np.float32)
    documents[4] = documents[2] * 3  # one pair of near-identical documents
    queries = random.standard_normal((6, 5)).astype(np.float32)

    def unit(v: np.ndarray) -> np.ndarray:
        return v.astype(np.float64) / np.linalg.norm(v.astype(np.float64))

    pairs = list(itertools.combinations([unit(d) for d in documents], 2))
    want = {
        "alignment": np.mean([((unit(q) - unit(d)) ** 2).sum() for q, d in zip(queries, documents)]),
        "uniformity": math.log(np.mean([math.exp(-2 * ((a - b) ** 2).sum()) for a, b in pairs])),
        "mean_cosine": np.mean([a @ b for a, b in pairs]),
        "near_identical": 2 / 9,
    }
    assert embedding_health(documents, (queries, documents[:6])) == pytest.approx(want)


def test_health_sees_a_collapse() -> None:
    random = np.random.default_rng(0)
    collapsed = (np.ones((3000, 8)) + 1e-3 * random.standard_normal((3000, 8))).astype(np.float32)
    spread = random.standard_normal((3000, 64)).astype(np.float32)
    bad, good = (embedding_health(vectors, (vectors[:2], vectors[2:4])) for vectors in (collapsed, spread))
    assert bad["near_identical"] == 1.0 and bad["mean_cosine"] > 0.99 and bad["uniformity"] > -0.01
    assert good["near_identical"] == 0.0 and abs(good["mean_cosine"]) < 0.01 and good["uniformity"] < -3
    one = embedding_health(spread[:1], (spread[:0], spread[:0]))
    assert one == {"alignment": 0.0, "uniformity": 0.0, "mean_cosine": 0.0, "near_identical": 0.0}
