"""Output layer and cross-entropy on target positions only, without ever holding all logits.

With V = 151,936 classes, the logits of one 16k-token micro-batch in fp32 would be 10 GB. They are computed in chunks;
each chunk's gradients are formed while its logits are at hand (as in Liger Kernel's fused linear cross-entropy, Hsu et
al. 2024, arXiv 2410.10989), so nothing is recomputed in the backward pass: 6·V·D operations a target, the least there
can be.

Two forms of one arithmetic: the plain one (a CPU, float64, a host where Triton does not run), in place on fp32 logits;
and the fused one (CUDA), in place on the logits as the matrix product wrote them (softmax_kernel.py).

Shapes: K targets, D hidden size, V vocabulary, C targets in a chunk.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

CHUNK_BYTES = 128 * 2**20  # plain form, fp32 logits; measured on 2 CPU cores: below 32 MB and above 512 MB slower
CHUNK_BYTES_CUDA = 1024 * 2**20  # plain form on CUDA; assumption: fills the matrix units, small beside activations
FUSED_CHUNK = 4096  # targets: 1.2 GB of bf16 logits at V = 151,936; on an H200 8 % faster than 2,048


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_k weights_k · CE(hidden_k W^T, target_k) and the single CE values, with gradients formed chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        token_weights: torch.Tensor,
        chunk: int,
        fused: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        precise = torch.float32 if hidden.dtype in (torch.bfloat16, torch.float16) else hidden.dtype
        token_weights = token_weights.to(precise)
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_grad else None
        compute = _fused_chunks if fused else _plain_chunks
        losses = compute(hidden, weight, targets, token_weights, chunk, grad_hidden, grad_weight)
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * token_weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None, None  # a 0-d factor keeps their dtype


def _plain_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    chunk: int,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> torch.Tensor:
    """Each target's cross-entropy, (K,); fills grad_hidden and adds to grad_weight where they are asked for."""
    precise = token_weights.dtype
    losses = torch.empty(len(hidden), dtype=precise, device=hidden.device)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        h, t = hidden[part], targets[part, None]
        logits = (h @ weight.T).to(precise)  # (C, V); softmax statistics and gradients reuse this one buffer
        largest = logits.amax(dim=1, keepdim=True)
        at_target = logits.gather(1, t)
        normaliser = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
        losses[part] = (normaliser.log() + largest - at_target)[:, 0]
        if grad_hidden is not None and grad_weight is not None:
            w = token_weights[part, None]
            logits.mul_(w / normaliser).scatter_add_(1, t, -w)  # d(weighted loss) / d(logits)
            d_logits = logits.to(hidden.dtype)
            torch.mm(d_logits, weight, out=grad_hidden[part])
            if precise == hidden.dtype:
                grad_weight.addmm_(d_logits.T, h)
            else:
                grad_weight.add_(d_logits.T @ h)
            del d_logits
        del logits  # or this chunk's would live on beside the next one's
    return losses


def _fused_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    chunk: int,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> torch.Tensor:
    """The same with one buffer of logits for all chunks, in the hidden states' type."""
    from anchor_cli.model.softmax_kernel import add_product_, softmax_gradient_

    losses = torch.empty(len(hidden), dtype=token_weights.dtype, device=hidden.device)
    buffer = hidden.new_empty(min(chunk, len(hidden)), weight.shape[0])
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        h = hidden[part]
        logits = torch.mm(h, weight.T, out=buffer[: len(h)])
        losses[part] = softmax_gradient_(logits, targets[part], token_weights[part])  # logits are d_logits from here on
        if grad_hidden is not None and grad_weight is not None:
            torch.mm(logits, weight, out=grad_hidden[part])
            add_product_(grad_weight, logits.T, h)
    return losses


class OutputLayer(nn.Module):
    """The language model's output matrix (V, D), shared with it, with the loss computed where the logits are."""

    def __init__(self, weight: nn.Parameter, chunk_targets: int | None = None, fused: bool | None = None) -> None:
        """`fused`: None takes the fused form on CUDA where it works."""
        super().__init__()
        self.weight = weight
        self.chunk_targets = chunk_targets
        self.fused = fused

    def is_fused(self, hidden: torch.Tensor) -> bool:
        """Which form these hidden states take."""
        if hidden.dtype == torch.float64 or self.fused is False:
            return False
        return self.fused or (hidden.is_cuda and kernel_works(hidden.device, hidden.dtype))

    def chunk_size(self, num_targets: int, device: torch.device, fused: bool) -> int:
        """C: targets a chunk. The fused form's chunks are alike, in multiples of 128 rows; the plain form's are as
        many as a byte budget of fp32 logits holds."""
        if self.chunk_targets:
            return self.chunk_targets
        if fused:
            share = -(-num_targets // max(1, -(-num_targets // FUSED_CHUNK)))
            return max(1, min(FUSED_CHUNK, -(-share // 128) * 128))
        budget = CHUNK_BYTES_CUDA if device.type == "cuda" else CHUNK_BYTES
        return max(1, budget // (4 * self.weight.shape[0]))

    def forward(
        self, hidden: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of cross-entropies, and each target's own (detached), in nats.

        Args:
            hidden: (K, D). targets: (K,) int64. token_weights: (K,) the weight of each target in the sum.
        Returns:
            scalar and (K,), fp32 for half-precision models, else the model's own precision.
        """
        fused = self.is_fused(hidden)
        chunk = self.chunk_size(len(hidden), hidden.device, fused)
        out: tuple[torch.Tensor, torch.Tensor] = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, targets, token_weights, chunk, fused
        )
        return out


def kernel_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused form can run here; says once why not."""
    if importlib.util.find_spec("triton") is None:
        return False
    from anchor_cli.model.softmax_kernel import works

    return works(device, dtype)
