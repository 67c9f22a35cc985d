"""What a step of Stage II takes besides encoding its texts: embeddings gathered, scores, the loss. Pure arithmetic.

Legend: G rows of a step, N documents, D dimensions, W ranks, C candidates of a row (the documents of its block).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anchor_cli.spec.spec import RunSpec

IntArray = npt.NDArray[np.int32]
CHUNK_SCORES = 2**24  # scores of a chunk: model/contrast.py
TENSORS_OF_A_CHUNK = 5  # float32 tensors of that size alive at once: s, z, its gradient, a product, sums (counted)
COPIES_OF_EMBEDDINGS = 5  # gathered, by row and document, normalised, two gradients (counted)
ASSUMED_NEGATIVES = 7
"""Hard negatives a row where no data are at hand: KURE's."""


@dataclass(frozen=True)
class Negatives:
    """Hard negatives of every row."""

    counts: IntArray  # (R,)
    tokens: IntArray  # (R,) of all negatives of the row
    longest: int


@dataclass(frozen=True)
class ContrastWork:
    """Stage II's part of a plan; bytes are of one rank."""

    mean_negatives: float
    texts_per_step: int
    block_rows: int
    candidates: int
    """Documents of a block."""
    gathered_bytes: float
    """Embeddings that a rank receives in a step, float32."""
    loss_bytes: float
    """Memory of embeddings, gradients and one chunk of scores."""
    loss_tflop: float
    """Scores and their two gradients, on every rank."""
    encoded_again: float
    """Share of the texts that are encoded a second time: all but those of a rank's first micro-batch."""


def work_of(
    spec: RunSpec, global_batch_size: int, mean_negatives: float, dimension: int, world_size: int, micro_batches: int
) -> ContrastWork:
    """Stage II's work of a step of average rows."""
    documents_a_row = 1 + mean_negatives
    texts = round(global_batch_size * (1 + documents_a_row))
    rows = min(spec.negatives_group_size or global_batch_size, global_batch_size)
    alone = spec.in_batch_negatives == "none"
    candidates = round((1 if alone else rows) * documents_a_row)
    sizes = spec.matryoshka_dims or [dimension]
    flops = sum(6.0 * global_batch_size * candidates * size for size in sizes)  # a score and two gradients, 2 each
    return ContrastWork(
        mean_negatives=mean_negatives,
        texts_per_step=texts,
        block_rows=rows,
        candidates=candidates,
        gathered_bytes=4.0 * texts * dimension * (world_size - 1) / world_size,
        loss_bytes=loss_bytes(texts, dimension),
        loss_tflop=flops / 1e12,
        encoded_again=1 - 1 / micro_batches,
    )


def loss_bytes(texts_per_step: int, dimension: int) -> float:
    """Memory of one rank while the loss of a step is computed."""
    return 4.0 * (COPIES_OF_EMBEDDINGS * texts_per_step * dimension + TENSORS_OF_A_CHUNK * CHUNK_SCORES)


def assumed_negatives(num_rows: int, document_tokens: int, spec: RunSpec) -> Negatives:
    """Where the data are not at hand: as many as the spec uses, else KURE's seven, each as long as a document."""
    each = ASSUMED_NEGATIVES if spec.num_hard_negatives is None else spec.num_hard_negatives
    counts = np.full(num_rows, each, dtype=np.int32)
    return Negatives(counts, counts * document_tokens, spec.max_seq_length if each else 0)
