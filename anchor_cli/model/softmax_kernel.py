"""Softmax, cross-entropy and its gradient in place on the logits: one Triton kernel, for CUDA.

    loss_i = log Σ_v exp x_iv − x_{i,t_i}          g_iv = w_i (exp x_iv / Σ_v exp x_iv − [v = t_i])

One program handles one row: it reads the row once for the largest value and the sum of exponentials (the online softmax
of Milakov and Gimelshein 2018, arXiv 1805.02867), and once more to write the gradient where the logit was. So a chunk
moves two reads and one write of C V values in the logits' own type; all arithmetic is fp32.

`TRITON_INTERPRET=1` runs the same source on a CPU (tests/test_softmax_kernel.py). Importing this module imports triton.

Shapes: C targets in a chunk, V vocabulary.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from anchor_cli.base.console import warn

BLOCK = 8192  # values of a row at a time; assumption, others were not tried: 16 a thread. A row of 151,936 is 19 blocks
WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_gradient_kernel(logits, targets, weights, losses, row_stride, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    weight = tl.load(weights + row).to(tl.float32)
    at_target = tl.load(logits + target).to(tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger))
        largest = larger
    tl.store(losses + row, tl.log(total) + largest - at_target)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=float("-inf")).to(tl.float32)
        share = tl.exp(x - largest) / total - tl.where(column == target, 1.0, 0.0)
        tl.store(logits + column, (share * weight).to(logits.dtype.element_ty), mask=column < V)


@torch.library.custom_op("anchor::softmax_gradient_", mutates_args={"logits"})
def softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(C, V) logits become d(Σ weights · loss) / d(logits); returns each target's cross-entropy, (C,) fp32."""
    if logits.stride(1) != 1:
        raise ValueError("a row of logits must be contiguous")
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _softmax_gradient_kernel[(len(logits),)](
            logits, targets, weights, losses, logits.stride(0), logits.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
    return losses


@softmax_gradient_.register_fake
def _(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.custom_op("anchor::add_product_", mutates_args={"table"})
def add_product_(table: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """table (V, D) fp32 += left (V, C) @ right (C, D), accumulated in fp32 by the matrix product itself.

    Half-precision factors need `addmm` with an output type (CUDA, torch >= 2.9); where that is missing the product is
    rounded and added, which reads and writes the table once more.
    """
    if left.dtype == table.dtype:
        table.addmm_(left, right)
    elif table.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(table, left, right, out_dtype=table.dtype, out=table)
    else:
        table.add_(left @ right)


@add_product_.register_fake
def _(table: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    return None


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether both operators run on this device and give the right numbers: tried once, on a few numbers.

    Triton compiles a small launcher with the host's C compiler: a host without one, or without Python.h, fails here
    and trains on with the plain form.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 300, generator=generator).to(device, dtype)
        targets, weights = torch.tensor([7, 299], device=device), torch.tensor([0.5, 2.0], device=device)
        precise = logits.float().clone()  # the operator writes into the logits
        want = (precise.softmax(1) - torch.nn.functional.one_hot(targets, 300)) * weights[:, None]
        losses = softmax_gradient_(logits, targets, weights)
        table = torch.ones(300, 16, device=device)
        right = torch.randn(2, 16, generator=generator).to(device, dtype)
        add_product_(table, logits.T, right)
        wrong = max(
            float((losses - torch.nn.functional.cross_entropy(precise, targets, reduction="none")).abs().max()),
            float((logits.float() - want).abs().max()),
            float((table - 1 - logits.float().T @ right.float()).abs().max()),
        )
        reason = f"its result is off by {wrong:.1e}" if wrong > 0.02 or wrong != wrong else ""
    except (
        Exception
    ) as error:  # no compiler, no Python.h, a driver too old for this triton, an operator that is missing
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason:
        warn(
            f"the output layer's Triton kernel cannot be used ({reason}); going on without it: softmax moves about four"
            " times the memory"
        )
    return not reason
