"""Which rows make a step, and how a step is cut into micro-batches: pure functions of the row lengths.

The order of rows is a function of (row count, seed, epoch, global batch G) alone: step s of an epoch takes rows
[sG, (s+1)G) of that epoch's shuffle. So a resumed run needs one integer, and the number of GPUs changes nothing.

Each step's G rows go into `world_size × num_micro_batches` bins, longest row first, each into the lightest bin (Graham
1969, "LPT": the heaviest bin is at most 4/3 of the best possible). Every rank therefore runs the same number
of micro-batches in every step of the run (ZeRO-2 reduces at each backward), of nearly equal token counts, and the
number is the smallest for which every bin of every step stays within the token budget.

Shapes: R rows, S steps, G rows a step, M = world size × micro-batches bins a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from anchor_cli.base.errors import InputError
from anchor_cli.spec.schedule import steps_per_epoch

IntArray = npt.NDArray[np.int64]

_STEPS_AT_ONCE = 4096  # steps of one call when the plan is checked: bounds memory (measured: benchmarks/scaling)


def epoch_order(num_rows: int, seed: int, epoch: int) -> IntArray:
    """(R,) the rows in the order of one epoch: a permutation drawn by NumPy's PCG64 seeded with (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def fill_bins(lengths: npt.NDArray[np.integer], num_bins: int) -> tuple[IntArray, IntArray]:
    """The bin of every row of many steps: longest first, each into the lightest bin (ties: the lowest bin).

    Args:
        lengths: (S, G) tokens of each row.
        num_bins: M <= G.
    Returns:
        bins (S, G): the bin of each row; loads (S, M): tokens in each bin.
    """
    num_steps, rows_per_step = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    bins = np.empty((num_steps, rows_per_step), dtype=np.int64)
    loads = np.zeros((num_steps, num_bins), dtype=np.int64)
    step = np.arange(num_steps)
    for rank_of_length in range(rows_per_step):
        row = order[:, rank_of_length]
        lightest = loads.argmin(axis=1)
        bins[step, row] = lightest
        loads[step, lightest] += lengths[step, row]
    return bins, loads


@dataclass(frozen=True)
class StepRows:
    """The rows of one step, the same on every rank: `micro_batches[rank][i]` are the rows of one micro-batch."""

    step: int
    epoch: int
    rows: IntArray  # (G,) in shuffle order
    micro_batches: tuple[tuple[IntArray, ...], ...]


@dataclass(frozen=True)
class BatchPlan:
    """The plan of a whole run. `row_lengths` (R,) are tokens a row: query + document, [EOS] included."""

    row_lengths: npt.NDArray[np.int32]
    seed: int
    global_batch_size: int
    world_size: int
    num_micro_batches: int
    total_steps: int

    @property
    def num_rows(self) -> int:
        return len(self.row_lengths)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.num_rows, self.global_batch_size)

    def rows_of(self, step: int) -> IntArray:
        """(G,) the rows of a step (0-based), in shuffle order."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch_size
        return _cached_order(self.num_rows, self.seed, epoch)[start : start + self.global_batch_size]

    def step(self, step: int) -> StepRows:
        """The micro-batches of a step, for all ranks. Within a micro-batch rows keep the shuffle's order."""
        rows = self.rows_of(step)
        num_bins = self.world_size * self.num_micro_batches
        bins, loads = fill_bins(self.row_lengths[rows][None].astype(np.int64), num_bins)
        # Bins that run at the same time on different ranks are neighbours in weight, so that no rank waits long.
        by_load = np.argsort(-loads[0], kind="stable")
        micro_batches = tuple(
            tuple(rows[bins[0] == by_load[index * self.world_size + rank]] for index in range(self.num_micro_batches))
            for rank in range(self.world_size)
        )
        return StepRows(step, step // self.steps_per_epoch, rows, micro_batches)


@lru_cache(maxsize=2)
def _cached_order(num_rows: int, seed: int, epoch: int) -> IntArray:
    order = epoch_order(num_rows, seed, epoch)
    order.setflags(write=False)
    return order


def make_plan(
    row_lengths: npt.NDArray[np.int32],
    *,
    seed: int,
    global_batch_size: int,
    world_size: int,
    token_budget: int,
    total_steps: int,
) -> BatchPlan:
    """The plan with the fewest micro-batches a step for which every micro-batch stays within `token_budget` tokens.

    Raises:
        InputError: fewer rows than one global batch, fewer rows in a batch than ranks, or a budget that cannot hold.
    """
    require_one_batch(len(row_lengths), global_batch_size)
    if global_batch_size < world_size:
        raise InputError(
            f"global_batch_size {global_batch_size} is smaller than the number of processes {world_size}",
            hint="raise global_batch_size or start fewer processes (--nproc-per-node)",
        )
    require_budget(token_budget, int(row_lengths.max()), "row")

    def blocks() -> Iterator[IntArray]:
        for rows in rows_of_epochs(len(row_lengths), seed, global_batch_size, total_steps):
            for start in range(0, len(rows), _STEPS_AT_ONCE):
                yield row_lengths[rows[start : start + _STEPS_AT_ONCE]].astype(np.int64)

    count = max(1, global_batch_size * int(row_lengths.min()) // (token_budget * world_size))
    while (worst := heaviest_bin(blocks(), world_size * count, token_budget)) > token_budget:
        count += 1
        if count > global_batch_size // world_size:
            raise InputError(
                f"max_tokens_per_micro_batch {token_budget} is too small to divide {global_batch_size} rows among"
                f" {world_size} processes",
                hint=f"set max_tokens_per_micro_batch to {worst} or more",
            )
    return BatchPlan(row_lengths, seed, global_batch_size, world_size, count, total_steps)


def require_one_batch(num_rows: int, global_batch_size: int) -> None:
    """Raises InputError: the rows do not fill one global batch."""
    if num_rows < global_batch_size:
        raise InputError(
            f"the data set has {num_rows} rows, fewer than one global batch of {global_batch_size}",
            hint="lower per_device_train_batch_size or global_batch_size, or give more rows",
        )


def require_budget(token_budget: int, longest: int, piece: str) -> None:
    """Raises InputError: the longest `piece` (a row, a text) does not fit into a micro-batch."""
    if longest > token_budget:
        raise InputError(
            f"max_tokens_per_micro_batch {token_budget} is below the longest {piece}, {longest} tokens",
            hint=f"set max_tokens_per_micro_batch to {longest} or more, or lower max_seq_length and prepare again",
        )


def rows_of_epochs(num_rows: int, seed: int, global_batch_size: int, total_steps: int) -> Iterator[IntArray]:
    """(steps of an epoch, G) the rows of every step, epoch by epoch; the last incomplete batch is dropped."""
    steps = steps_per_epoch(num_rows, global_batch_size)
    for epoch in range(math.ceil(total_steps / steps)):
        yield epoch_order(num_rows, seed, epoch)[: steps * global_batch_size].reshape(steps, global_batch_size)


def heaviest_bin(blocks: Iterable[IntArray], num_bins: int, token_budget: int) -> int:
    """Tokens of the heaviest bin of steps whose lengths come in (S, G) blocks; the first above the budget ends it."""
    worst = 0
    for lengths in blocks:
        worst = max(worst, int(fill_bins(lengths, num_bins)[1].max()))
        if worst > token_budget:
            break
    return worst
