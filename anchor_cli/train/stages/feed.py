"""Micro-batches, packed one step ahead by a thread while the device works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from anchor_cli.data.batches import BatchPlan
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.model.packed import PairBatch, Targets, num_targets, pack_pairs

Step = TypeVar("Step")


def packed_ahead(pack: Callable[[int], Step], first: int, last: int) -> Iterator[Step]:
    """Steps first … last - 1, each packed by a thread while the one before is worked on."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
        ahead: Future[Step] | None = pool.submit(pack, first) if first < last else None
        for step in range(first, last):
            assert ahead is not None
            ready = ahead.result()
            ahead = pool.submit(pack, step + 1) if step + 1 < last else None
            yield ready


@dataclass(frozen=True)
class StepBatches:
    """One rank's part of a step, and the step's normalisers, which are the same on every rank."""

    step: int
    rows: npt.NDArray[np.int64]  # (G,) rows of the whole step
    micro_batches: list[PairBatch]
    query_targets: int  # D2Q targets of the whole step, all ranks
    document_targets: int  # Q2D targets of the whole step
    tokens: int  # of the whole step, query + document, [EOS] included


class Feed:
    """`steps(first, last)` yields StepBatches in order, packed one step ahead."""

    def __init__(
        self, pairs: PreparedPairs, plan: BatchPlan, rank: int, targets: Targets, device: torch.device
    ) -> None:
        self._pairs = pairs
        self._plan = plan
        self._rank = rank
        self._targets: Targets = targets
        self._device = device

    def steps(self, first: int, last: int) -> Iterator[StepBatches]:
        """Steps first … last - 1."""
        return packed_ahead(self.step, first, last)

    def step(self, step: int) -> StepBatches:
        """This rank's micro-batches of one step, in pinned host memory for CUDA."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread; pinning would else start CUDA on the first GPU, too
        pairs, plan = self._pairs, self._plan.step(step)
        rows = plan.rows
        inner_eos = pairs.query_inner_eos[rows], pairs.document_inner_eos[rows]
        eos = pairs.eos_in_content(rows) if self._targets == "content" else inner_eos
        queries = pairs.query_lengths[rows], pairs.query_content_starts[rows], eos[0]
        documents = pairs.document_lengths[rows], pairs.document_content_starts[rows], eos[1]
        return StepBatches(
            step,
            rows,
            [self.pack(micro) for micro in plan.micro_batches[self._rank]],
            int(num_targets(*queries, self._targets).sum()),
            int(num_targets(*documents, self._targets).sum()),
            int(queries[0].sum() + documents[0].sum()),
        )

    def pack(self, rows: npt.NDArray[np.int64]) -> PairBatch:
        """One micro-batch of the given rows."""
        queries, documents = self._pairs.tokens(rows)
        batch = pack_pairs(
            queries,
            documents,
            self._pairs.query_content_starts[rows],
            self._pairs.document_content_starts[rows],
            eos_token_id=self._pairs.contract.eos_token_id,
            targets=self._targets,
        )
        return batch.pin() if self._device.type == "cuda" else batch
