"""Micro-batches of texts for Stage II, packed one step ahead by a thread while the device works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from anchor_cli.data.batches import BatchPlan
from anchor_cli.data.contrast_rows import ContrastData, StepTexts
from anchor_cli.data.text_batches import cut_step
from anchor_cli.model.packed import TextBatch, pack_texts
from anchor_cli.processes.ranks import Ranks
from anchor_cli.train.stages.feed import packed_ahead

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ContrastBatches:
    """One rank's part of a step; `texts` and `shares` are the same on every rank."""

    step: int
    rows: IntArray  # (G,) rows of the whole step
    tokens: int  # of the step's different texts, [EOS] included
    texts: StepTexts
    micro_batches: list[TextBatch]
    members: list[IntArray]  # which texts each micro-batch encodes; an empty one encodes a text for nothing
    shares: list[IntArray]  # by rank: its texts, in the order in which its micro-batches encode them


class ContrastFeed:
    """`steps(first, last)` yields ContrastBatches in order, packed one step ahead."""

    def __init__(self, data: ContrastData, plan: BatchPlan, ranks: Ranks) -> None:
        self._data, self._plan, self._ranks = data, plan, ranks

    def steps(self, first: int, last: int) -> Iterator[ContrastBatches]:
        """Steps first … last - 1."""
        return packed_ahead(self.step, first, last)

    def step(self, step: int) -> ContrastBatches:
        """This rank's micro-batches of one step, in pinned host memory for CUDA."""
        if self._ranks.device.type == "cuda":
            torch.cuda.set_device(self._ranks.device)  # of this thread; pinning would else start CUDA on the first GPU
        return self.cut(step, self._plan.rows_of(step), self._plan.world_size, self._plan.num_micro_batches)

    def cut(self, step: int, rows: IntArray, world_size: int, num_micro_batches: int) -> ContrastBatches:
        """Any rows as a step of so many micro-batches."""
        texts, members = self.divide(rows, world_size, num_micro_batches)
        mine = members[self._ranks.rank]
        micro_batches = [self.pack(texts, batch) for batch in mine]
        shares = [np.concatenate(of_rank) for of_rank in members]
        return ContrastBatches(step, rows, int(texts.lengths.sum()), texts, micro_batches, mine, shares)

    def divide(self, rows: IntArray, world_size: int, num_micro_batches: int) -> tuple[StepTexts, list[list[IntArray]]]:
        """The texts of some rows, and [rank][micro-batch] -> which of them it encodes.

        All texts are cut, then repeats are left out: so no micro-batch can be fuller than the plan found it.
        """
        texts = self._data.step(rows)
        lengths, offsets = self._data.text_lengths(rows)
        is_query = np.zeros(len(lengths), dtype=bool)
        is_query[offsets[:-1]] = True
        text_of = np.empty(len(lengths), dtype=np.int64)
        text_of[is_query], text_of[~is_query] = texts.queries, texts.documents
        is_new = np.zeros(len(lengths), dtype=bool)
        is_new[np.unique(text_of, return_index=True)[1]] = True
        cut = cut_step(lengths, world_size, num_micro_batches)
        return texts, [[text_of[batch[is_new[batch]]] for batch in of_rank] for of_rank in cut]

    def pack(self, texts: StepTexts, members: IntArray) -> TextBatch:
        """One micro-batch; without members the step's first text stands in, so that every rank runs alike."""
        chosen = members if len(members) else np.zeros(1, dtype=np.int64)
        starts = torch.from_numpy(texts.content_starts[chosen])
        batch = TextBatch(pack_texts([texts.ids[text] for text in chosen]), starts)
        return batch.pin() if self._ranks.device.type == "cuda" else batch
