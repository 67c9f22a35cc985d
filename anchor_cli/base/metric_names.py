"""Keys of `metrics.jsonl`; W&B and TensorBoard get the same names."""

from __future__ import annotations

from collections.abc import Mapping

STEP = "step"
"""Optimizer updates done."""
EPOCH = "epoch"
"""Epochs done, a fraction."""
TIME = "time"
"""Unix time, s."""

LOSS = "train/loss"
D2Q_LOSS = "train/d2q_loss"
Q2D_LOSS = "train/q2d_loss"
TRAIN_PREFIX = "train/"
ACCURACY = "train/accuracy"
"""Stage II: share of rows whose positive is the most similar candidate of its block, texts of known positives aside."""
POSITIVE_SIMILARITY = "train/positive_similarity"
HARD_NEGATIVE_SIMILARITY = "train/hard_negative_similarity"
"""Mean cosine of a query and its own negatives."""
IN_BATCH_NEGATIVE_SIMILARITY = "train/in_batch_negative_similarity"
DROPPED_SHARE = "train/dropped_share"
"""Candidates dropped, as the text of a known positive or by the margin, 0 to 1."""
DROPPED_BY_MARGIN_SHARE = "train/dropped_by_margin_share"
NEAR_THRESHOLD = "train/near_threshold"
"""Candidates within 1e-3 of the margin's threshold."""
TEMPERATURE = "train/temperature"
LEARNING_RATE = "train/learning_rate"
GRAD_NORM = "train/grad_norm"

PAIRS_PER_S = "perf/pairs_per_s"
TOKENS_PER_S = "perf/tokens_per_s"
MFU = "perf/mfu"
"""Model FLOPs per second over the cards' peak, 0 to 1."""
PEAK_MEMORY_GB = "perf/peak_memory_gb"
"""Allocated by tensors at the peak: of the GPU, or resident memory on a CPU."""
RESERVED_MEMORY_GB = "perf/reserved_memory_gb"
"""Held by torch's allocator at the peak, GPUs only; what exceeds the allocated is fragmentation."""

EVAL_PREFIX = "eval/"
EVAL_AVG_NDCG_10 = "eval/avg/ndcg@10"
EVAL_AVG_MRR_10 = "eval/avg/mrr@10"

CONTRAST_KEYS = (
    ACCURACY,
    POSITIVE_SIMILARITY,
    HARD_NEGATIVE_SIMILARITY,
    IN_BATCH_NEGATIVE_SIMILARITY,
    DROPPED_SHARE,
    DROPPED_BY_MARGIN_SHARE,
    NEAR_THRESHOLD,
    TEMPERATURE,
)
TRAIN_KEYS = (LOSS, D2Q_LOSS, Q2D_LOSS, LEARNING_RATE, GRAD_NORM)
PERF_KEYS = (PAIRS_PER_S, TOKENS_PER_S, MFU, PEAK_MEMORY_GB)


def eval_key(benchmark: str, metric: str) -> str:
    """`eval_key("ko/NanoNQ", "ndcg@10")` is `eval/ko/NanoNQ/ndcg@10`; `"avg"` is the mean over benchmarks."""
    return f"{EVAL_PREFIX}{benchmark}/{metric}"


ALIGNMENT = "alignment"
"""Mean squared distance of a query and its relevant document, 0 to 4; logged as `eval/{lang}/{subset}/alignment`."""
UNIFORMITY = "uniformity"
"""Log of the mean of exp(-2 d^2) over document pairs; 0 is collapse."""
MEAN_COSINE = "mean_cosine"
"""Of document pairs (anisotropy); 1 is collapse."""
NEAR_IDENTICAL = "near_identical"
"""Share of documents with another one above cosine 0.999, 0 to 1; 1 is collapse."""
HEALTH_KEYS = (ALIGNMENT, UNIFORMITY, MEAN_COSINE, NEAR_IDENTICAL)
COLLAPSED_FROM = {NEAR_IDENTICAL: 0.5, MEAN_COSINE: 0.9}
"""Assumption: above either value the embeddings have collapsed. All that warns of it asks `collapse`."""


def collapse(health: Mapping[str, float]) -> str | None:
    """Why embeddings with this health count as collapsed; None: they do not."""
    if (alike := health.get(NEAR_IDENTICAL, 0.0)) > COLLAPSED_FROM[NEAR_IDENTICAL]:
        return f"{alike:.0%} of the documents have a near-identical other one: the embeddings have collapsed"
    if (cosine := health.get(MEAN_COSINE, 0.0)) > COLLAPSED_FROM[MEAN_COSINE]:
        limit = COLLAPSED_FROM[MEAN_COSINE]
        return f"mean cosine of two documents {cosine:.3f}, above {limit:g}: the embeddings have collapsed"
    return None
