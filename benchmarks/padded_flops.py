"""Floating-point operations of padded training, which the benchmarks compare with: see anchor_cli/plan/flops.py."""

from __future__ import annotations

import numpy as np

from anchor_cli.plan import flops
from anchor_cli.plan.flops import Lengths, ModelShape


def padded_flops(
    shape: ModelShape,
    query_lengths: Lengths,
    document_lengths: Lengths,
    rows_per_batch: int,
    *,
    checkpointing: bool = True,
    square_attention: bool = True,
) -> int:
    """FLOPs that padded training does for these pairs, cut in order into batches of `rows_per_batch`.

    Each side is padded to its longest text L; encoding runs over L columns, reconstruction over L - 1, and the output
    layer over all of those. `checkpointing` recomputes every layer once. `square_attention`: attention with a padding
    mask computes the whole L x L square (SDPA, eager); False counts only real causal pairs (flash attention unpads).
    """
    total = 0
    passes = 1 + flops.BACKWARD + (1 if checkpointing else 0)
    for side in (query_lengths, document_lengths):
        lengths = np.asarray(side, np.int64)
        for start in range(0, len(lengths), rows_per_batch):
            batch = lengths[start : start + rows_per_batch]
            for shorter in (0, 1):  # 0: encode, 1: reconstruct
                columns = int(batch.max()) - shorter
                pairs = len(batch) * columns**2 if square_attention else flops.causal_pairs(batch - shorter)
                total += passes * (flops.trunk_flops(shape, len(batch) * columns) + flops.attention_flops(shape, pairs))
            total += (1 + flops.BACKWARD) * flops.output_flops(shape, len(batch) * (int(batch.max()) - 1))
    return total
