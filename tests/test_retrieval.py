"""Retrieval metrics against sentence-transformers and trec_eval; the bootstrap against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_cli.base.errors import InputError
from anchor_cli.evaluate.metrics import (
    SENTENCE_TRANSFORMERS,
    TREC_EVAL,
    Rules,
    bootstrap,
    counts,
    parse_metric,
    query_metrics,
    rules_of,
)

CUTS = (1, 3, 10)
METRICS = [f"{kind}@{k}" for kind in ("ndcg", "mrr", "recall", "map") for k in CUTS]
IDS = [f"d{number}" for number in range(14)] + ["문서", "Ω", "z" * 3]  # code points from one to three bytes
SCORES = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75])  # few, so that ties are the rule
RUNS = st.dictionaries(st.sampled_from(IDS), SCORES, max_size=len(IDS))
JUDGED_IDS = st.sampled_from([*IDS, "missing-1", "missing-2"])


def ranked_first(scores: dict[str, float], rules: Rules) -> list[str]:
    """Document ids, best score first, ties by id: the order of `search`, for scores that are already there."""
    by_id = sorted(scores, reverse=not rules.ties_ascending)
    return sorted(by_id, key=lambda document: -scores[document])  # sorted is stable: ties stay in id order


def ours(runs: dict, qrels: dict, rules) -> dict[str, dict[str, float]]:
    return {q: query_metrics(ranked_first(runs[q], rules), qrels[q], METRICS, rules) for q in runs}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(RUNS, st.dictionaries(JUDGED_IDS, st.sampled_from([0, 1]), max_size=6)), min_size=1, max_size=4)
)
def test_binary_metrics_are_those_of_sentence_transformers(cases: list) -> None:
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    runs = {f"q{i}": run for i, (run, _) in enumerate(cases)}
    qrels = {f"q{i}": judged for i, (_, judged) in enumerate(cases)}
    relevant = {q: {d for d, grade in judged.items() if grade > 0} for q, judged in qrels.items()}
    theirs = evaluation.InformationRetrievalEvaluator(
        dict.fromkeys(runs, "text"),
        dict.fromkeys(IDS, "text"),
        relevant,
        mrr_at_k=list(CUTS),
        ndcg_at_k=list(CUTS),
        precision_recall_at_k=list(CUTS),
        map_at_k=list(CUTS),
    )
    counted = [q for q in runs if counts(qrels[q], SENTENCE_TRANSFORMERS)]
    assert counted == theirs.queries_ids  # queries without a relevant document are left out
    if not counted:
        return
    hits = [[{"corpus_id": d, "score": score} for d, score in runs[q].items()] for q in counted]
    want = theirs.compute_metrics(hits)
    got = ours({q: runs[q] for q in counted}, qrels, SENTENCE_TRANSFORMERS)
    for metric in METRICS:
        kind, k = parse_metric(metric)
        mean = np.mean([got[q][metric] for q in counted])
        assert mean == pytest.approx(want[f"{kind}@k"][k], abs=1e-9), metric


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(RUNS, st.dictionaries(JUDGED_IDS, st.integers(-1, 4), min_size=1, max_size=8)), min_size=1, max_size=4
    )
)
def test_graded_metrics_are_those_of_trec_eval(cases: list) -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    cases = [(run, judged) for run, judged in cases if run and max(judged.values()) >= 0]  # trec_eval needs both
    runs = {f"q{i}": run for i, (run, _) in enumerate(cases)}
    qrels = {f"q{i}": judged for i, (_, judged) in enumerate(cases)}
    cuts = ",".join(map(str, CUTS))
    measures = {f"ndcg_cut.{cuts}", f"recall.{cuts}", f"map_cut.{cuts}", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(runs)
    got = ours(runs, qrels, TREC_EVAL)
    for query, values in theirs.items():
        assert counts(qrels[query], TREC_EVAL)
        for k in CUTS:
            reciprocal = values["recip_rank"] if values["recip_rank"] >= 1 / k else 0.0
            want = {
                f"ndcg@{k}": values[f"ndcg_cut_{k}"],
                f"recall@{k}": values[f"recall_{k}"],
                f"map@{k}": values[f"map_cut_{k}"],
                f"mrr@{k}": reciprocal,
            }
            assert {metric: got[query][metric] for metric in want} == pytest.approx(want, abs=1e-9), query


def test_ndcg_by_hand() -> None:
    # found: grade 1, unjudged, grade 3; ideal: 3, 2 (missing from the corpus), 1
    got = query_metrics(
        ["a", "x", "c"], {"a": 1, "c": 3, "gone": 2, "b": 0}, ["ndcg@10", "mrr@10", "recall@2"], TREC_EVAL
    )
    want = (1 + 3 / math.log2(4)) / (3 + 2 / math.log2(3) + 1 / math.log2(4))
    assert got == {"ndcg@10": pytest.approx(want), "mrr@10": 1.0, "recall@2": pytest.approx(1 / 3)}


def test_the_two_evaluators_order_ties_against_each_other() -> None:
    scores = {"b": 0.5, "a": 0.5, "c": 0.75}
    assert ranked_first(scores, SENTENCE_TRANSFORMERS) == ["c", "a", "b"]
    assert ranked_first(scores, TREC_EVAL) == ["c", "b", "a"]


def test_rules_follow_the_grades() -> None:
    assert rules_of({"q": {"a": 1, "b": 0}}) is SENTENCE_TRANSFORMERS
    assert rules_of({"q": {"a": 1}, "p": {"a": 2}}) is TREC_EVAL


@pytest.mark.parametrize("name", ["ndcg", "ndcg@0", "ndgc@10", "precision@10", "mrr@-1", "@10"])
def test_an_unknown_metric_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="expected ndcg, mrr, recall, map") as caught:
        parse_metric(name)
    if name == "ndgc@10":
        assert caught.value.hint == "did you mean ndcg@10?"


def test_bootstrap_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).random(80)
    want = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20000, random_state=2
    ).confidence_interval
    got = bootstrap([values], num_resamples=20000)
    assert got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=0.003)


def test_bootstrap_of_several_benchmarks_is_of_the_mean_of_their_means() -> None:
    random = np.random.default_rng(3)
    groups = [random.normal(0.2, 1, 50), random.normal(0.8, 1, 400)]
    got = bootstrap(groups)
    assert got.mean == pytest.approx((groups[0].mean() + groups[1].mean()) / 2)
    spread = math.sqrt(groups[0].var() / 50 + groups[1].var() / 400) / 2  # of a mean of two independent means
    assert (got.high - got.low) / 2 == pytest.approx(1.96 * spread, rel=0.06)
    assert bootstrap(groups) == got  # same seed, same interval
    with pytest.raises(ValueError, match="at least one query"):
        bootstrap([np.array([])])
