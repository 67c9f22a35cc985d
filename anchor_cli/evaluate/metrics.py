"""Retrieval metrics of one query, and how sure a difference between two models is. Pure functions on plain numbers.

Two evaluators are the measure of this file; they disagree in three small things, so a benchmark follows one of them:

    judgements all 0 or 1      as sentence-transformers' InformationRetrievalEvaluator and NanoBEIREvaluator (6.2):
                               ties by ascending document id; queries without a relevant document are left out;
                               MAP@k is divided by min(k, relevant documents)
    any higher grade           as trec_eval (pytrec-eval-terrier 0.5): ties by descending document id; a query whose
                               judgements are all irrelevant scores 0; MAP@k is divided by the relevant documents

In both: the gain is the grade as judged (negative grades gain nothing), the discount is log2(rank + 1), and judged
documents that the corpus lacks count in the ideal ranking, in recall and in MAP. Both tie orders compare ids by code
point: strcmp of trec_eval's `comp_sim_docno` on UTF-8 is the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import InputError, nearest

KINDS = ("ndcg", "mrr", "recall", "map")
DEFAULT_METRICS = ("ndcg@10", "mrr@10")
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rules:
    """Where the two evaluators differ; see the module's docstring."""

    name: str
    ties_ascending: bool
    """Equal scores are ordered by ascending document id, else descending."""
    counts_unanswerable: bool
    """A query whose judged documents are all irrelevant counts as 0, else it is left out."""
    caps_map_divisor: bool
    """MAP@k divides by min(k, relevant), else by relevant."""


SENTENCE_TRANSFORMERS = Rules(
    "sentence-transformers", ties_ascending=True, counts_unanswerable=False, caps_map_divisor=True
)
TREC_EVAL = Rules("trec_eval", ties_ascending=False, counts_unanswerable=True, caps_map_divisor=False)


def rules_of(qrels: Mapping[str, Mapping[str, int]]) -> Rules:
    """sentence-transformers' rules for binary judgements, trec_eval's for graded ones."""
    graded = any(grade > 1 for judged in qrels.values() for grade in judged.values())
    return TREC_EVAL if graded else SENTENCE_TRANSFORMERS


def counts(judged: Mapping[str, int], rules: Rules) -> bool:
    """Whether a query with these judgements is in the average."""
    return bool(judged) if rules.counts_unanswerable else any(grade > 0 for grade in judged.values())


def parse_metric(name: str) -> tuple[str, int]:
    """`"ndcg@10"` is `("ndcg", 10)`.

    Raises:
        InputError: not one of ndcg, mrr, recall, map, followed by `@` and a positive number.
    """
    match = re.fullmatch(r"([a-z]+)@([1-9][0-9]{0,5})", name.strip().lower())
    if match is None or match.group(1) not in KINDS:
        known = [f"{kind}@{k}" for kind in KINDS for k in (10, 100)]
        near = nearest(name, known)
        expected = f"expected {', '.join(KINDS)} with a cut-off, such as ndcg@10 or recall@100"
        raise InputError(f"metric {name!r}: {expected}", f"did you mean {near}?" if near else None)
    return match.group(1), int(match.group(2))


def ndcg(grades: Sequence[int], ideal: Sequence[int], k: int) -> float:
    """nDCG@k (Jarvelin and Kekalainen 2002, with the grade itself as gain).

    `grades`: grade of each retrieved document, best first, 0 where not judged. `ideal`: all judged grades of the query.
    """
    best = _dcg(sorted(ideal, reverse=True)[:k])
    return _dcg(grades[:k]) / best if best else 0.0


def _dcg(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, start=1) if grade > 0)


def query_metrics(
    ranking: Sequence[str], judged: Mapping[str, int], metrics: Iterable[str], rules: Rules
) -> dict[str, float]:
    """The metrics of one query.

    `ranking`: distinct document ids, best first. `judged`: grade by document id.
    """
    grades = [judged.get(document, 0) for document in ranking]
    relevant_ranks = [rank for rank, grade in enumerate(grades, start=1) if grade > 0]
    num_relevant = sum(grade > 0 for grade in judged.values())
    scores: dict[str, float] = {}
    for metric in metrics:
        kind, k = parse_metric(metric)
        ranks = [rank for rank in relevant_ranks if rank <= k]
        if kind == "ndcg":
            scores[metric] = ndcg(grades, list(judged.values()), k)
        elif kind == "mrr":
            scores[metric] = 1.0 / ranks[0] if ranks else 0.0
        elif kind == "recall":
            scores[metric] = len(ranks) / num_relevant if num_relevant else 0.0
        else:
            divisor = min(k, num_relevant) if rules.caps_map_divisor else num_relevant
            precisions = [hits / rank for hits, rank in enumerate(ranks, start=1)]
            scores[metric] = sum(precisions) / divisor if divisor else 0.0
    return scores


class Interval(NamedTuple):
    """A mean and the bounds between which it lies with the asked-for confidence."""

    mean: float
    low: float
    high: float


_DRAWS_AT_ONCE = 4_000_000  # indices held in memory: 32 MB


def bootstrap(
    groups: Sequence[FloatArray],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of the groups' means: queries are drawn again, with replacement, within each benchmark.

    With per-query differences between two models this is the paired bootstrap (Sakai 2006, "Evaluating evaluation
    metrics based on the bootstrap"; percentile interval).
    `groups`: one (num_queries,) array a benchmark. `weights`: of the benchmarks; equal by default.

    Raises:
        ValueError: no group, or an empty one.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("bootstrap needs at least one query in every group")
    draw = np.random.default_rng(seed)
    means = np.zeros(num_resamples)
    weights = weights or [1.0] * len(groups)
    for group, weight in zip(groups, weights, strict=True):
        rows = max(1, _DRAWS_AT_ONCE // len(group))
        for start in range(0, num_resamples, rows):
            stop = min(start + rows, num_resamples)
            means[start:stop] += weight * group[draw.integers(0, len(group), (stop - start, len(group)))].mean(axis=1)
    means /= sum(weights)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    mean = np.average([group.mean() for group in groups], weights=weights)
    return Interval(float(mean), float(low), float(high))
