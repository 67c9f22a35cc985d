"""How a step of Stage II is cut into micro-batches: texts, not rows, are divided, since the loss sees embeddings only.

As in Stage I (`data/batches.py`) the rows of a step are a function of (row count, seed, epoch, global batch) alone,
every rank computes the same cut, and every rank runs the same number of micro-batches in every step of the run.

Shapes: S steps, G rows a step, T texts a step (queries, positives, negatives; repeats included), M bins a step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from anchor_cli.data.batches import (
    BatchPlan,
    IntArray,
    heaviest_bin,
    require_budget,
    require_one_batch,
    rows_of_epochs,
)
from anchor_cli.data.contrast_rows import ContrastData

_TEXTS_AT_ONCE = 2**22  # texts whose cut is tried together when the plan is made: bounds memory


def make_text_plan(
    data: ContrastData,
    *,
    seed: int,
    global_batch_size: int,
    world_size: int,
    token_budget: int,
    total_steps: int,
) -> BatchPlan:
    """The plan with the fewest micro-batches a step for which every micro-batch stays within `token_budget` tokens.

    Raises:
        InputError: fewer rows than one global batch, or a budget below the longest text.
    """
    require_one_batch(data.pairs.num_rows, global_batch_size)
    require_budget(token_budget, data.longest_text, "text")
    epochs = rows_of_epochs(data.pairs.num_rows, seed, global_batch_size, total_steps)
    steps = [rows for epoch in epochs for rows in epoch]
    fullest = max(int(data.row_lengths[rows].sum()) for rows in steps)
    count = max(1, -(-fullest // (token_budget * world_size)))
    while heaviest_bin(_blocks(data, steps), world_size * count, token_budget) > token_budget:
        count += 1
    return BatchPlan(data.row_lengths.astype(np.int32), seed, global_batch_size, world_size, count, total_steps)


def _blocks(data: ContrastData, steps: list[IntArray]) -> Iterator[IntArray]:
    """(S, T) text lengths of every step, `_TEXTS_AT_ONCE` or a step at a time; texts of no tokens change no bin."""
    begin = 0
    while begin < len(steps):
        lengths: list[IntArray] = []
        end = begin
        while end < len(steps) and (end == begin or (end - begin + 1) * max(map(len, lengths)) <= _TEXTS_AT_ONCE):
            lengths.append(data.text_lengths(steps[end])[0])
            end += 1
        padded = np.zeros((len(lengths), max(map(len, lengths))), dtype=np.int64)
        for row, texts in zip(padded, lengths, strict=True):
            row[: len(texts)] = texts
        yield padded
        begin = end


def cut_step(lengths: IntArray, world_size: int, num_micro_batches: int) -> list[list[IntArray]]:
    """[rank][micro-batch] -> the texts (positions in `lengths`, (T,)) that it encodes, in their order."""
    num_bins = world_size * num_micro_batches
    bins = _fill(lengths, num_bins)
    loads = np.bincount(bins, weights=lengths, minlength=num_bins)
    by_load = np.argsort(-loads, kind="stable")  # bins that run at the same time on different ranks are alike
    return [
        [np.flatnonzero(bins == by_load[index * world_size + rank]) for index in range(num_micro_batches)]
        for rank in range(world_size)
    ]


def _fill(lengths: IntArray, num_bins: int) -> npt.NDArray[np.int64]:
    """(T,) the bin of each text: what `batches.fill_bins` gives for one step, by a heap."""
    bins = np.empty(len(lengths), dtype=np.int64)
    lightest = [(0, index) for index in range(num_bins)]
    for text in np.argsort(-lengths, kind="stable").tolist():
        load, index = lightest[0]
        bins[text] = index
        heapq.heapreplace(lightest, (load + int(lengths[text]), index))
    return bins
