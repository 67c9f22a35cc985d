"""Norm of queries and keys and their rotation in one Triton kernel, forward and backward, for CUDA and Qwen3.

    n = w · x · r,   r = 1 / sqrt(mean(x²) + ε)          y = n · cos + rotate_half(n) · sin

Stock layers write the normed values and both products of the rotation; inductor fuses the forward pass and writes one
intermediate in the backward pass. Here each direction reads what it needs and writes its result: 2 values moved per
value forward, 3 backward (counted: benchmarks/step_traffic.py). Only x is kept for the backward pass, r is computed
again. fp32 inside, one rounding at the end. Importing this module imports triton. On an H200 the backward kernel takes
60 µs for 15,897 tokens, and its launch costs the host more than that (docs/benchmarks.md).

Shapes: T tokens, H heads, d head dimension (even); R = T H rows.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from anchor_cli.base.console import warn

ROWS = 64  # rows of d values a program; assumption; other sizes were not tried


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(x, w, cos, sin, y, R, eps, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    inside = (row < R)[:, None]
    low = row.to(tl.int64)[:, None] * (2 * HALF) + half[None, :]
    angle = (row // H).to(tl.int64)[:, None] * (2 * HALF) + half[None, :]
    x1 = tl.load(x + low, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + low + HALF, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)[:, None]
    n1 = x1 * r * tl.load(w + half).to(tl.float32)[None, :]
    n2 = x2 * r * tl.load(w + half + HALF).to(tl.float32)[None, :]
    c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + low, (n1 * c1 - n2 * s1).to(y.dtype.element_ty), mask=inside)
    tl.store(y + low + HALF, (n2 * c2 + n1 * s2).to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(dy, x, w, cos, sin, dx, dw, R, eps, H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    inside = (row < R)[:, None]
    low = row.to(tl.int64)[:, None] * (2 * HALF) + half[None, :]
    angle = (row // H).to(tl.int64)[:, None] * (2 * HALF) + half[None, :]
    c1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    c2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    s1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    s2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    dy1 = tl.load(dy + low, mask=inside, other=0.0).to(tl.float32)
    dy2 = tl.load(dy + low + HALF, mask=inside, other=0.0).to(tl.float32)
    dn1 = dy1 * c1 + dy2 * s2
    dn2 = dy2 * c2 - dy1 * s1
    x1 = tl.load(x + low, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + low + HALF, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)[:, None]
    x1 *= r
    x2 *= r
    tl.store(dw + program * (2 * HALF) + half, tl.sum(dn1 * x1, axis=0))
    tl.store(dw + program * (2 * HALF) + HALF + half, tl.sum(dn2 * x2, axis=0))
    g1 = dn1 * tl.load(w + half).to(tl.float32)[None, :]
    g2 = dn2 * tl.load(w + half + HALF).to(tl.float32)[None, :]
    mean = ((tl.sum(g1 * x1, axis=1) + tl.sum(g2 * x2, axis=1)) / (2 * HALF))[:, None]
    tl.store(dx + low, (r * (g1 - x1 * mean)).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + low + HALF, (r * (g2 - x2 * mean)).to(dx.dtype.element_ty), mask=inside)


@torch.library.custom_op("anchor::norm_rotate", mutates_args=())
def norm_rotate(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    """(1, T, H, d), (d,), (1, T, d) x2 -> (1, T, H, d): x normed over d, then rotated."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y, rows = torch.empty_like(x), x.numel() // x.shape[-1]
    grid = (triton.cdiv(rows, ROWS),)
    _forward_kernel[grid](x, weight, cos, sin, y, rows, eps, H=x.shape[-2], HALF=x.shape[-1] // 2, ROWS=ROWS)
    return y


@norm_rotate.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("anchor::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight."""
    dy, x, cos, sin = (t.contiguous() for t in (dy, x, cos, sin))
    dx, rows, d = torch.empty_like(x), x.numel() // x.shape[-1], x.shape[-1]
    programs = triton.cdiv(rows, ROWS)
    dw = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](dy, x, weight, cos, sin, dx, dw, rows, eps, H=x.shape[-2], HALF=d // 2, ROWS=ROWS)
    return dx, dw.sum(0).to(weight.dtype)


@norm_rotate_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx, dw = norm_rotate_backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, dw, None, None, None


norm_rotate.register_autograd(_backward, setup_context=_keep)


def _attention_forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`Qwen3Attention.forward` (transformers 5.23) with norm and rotation in one operator; there is no cache here."""
    from transformers import AttentionInterface

    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    cos, sin = position_embeddings
    query, key = (
        norm_rotate(project(hidden_states).view(shape), norm.weight, cos, sin, norm.variance_epsilon).transpose(1, 2)
        for project, norm in ((self.q_proj, self.q_norm), (self.k_proj, self.k_norm))
    )
    value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    attend = AttentionInterface._global_mapping[self.config._attn_implementation]
    out, _ = attend(
        self, query, key, value, attention_mask, scaling=self.scaling, sliding_window=self.sliding_window, **kwargs
    )
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def fuse_queries_and_keys(model: Any) -> bool:
    """Let every `Qwen3Attention` of the model use the operator above. False: it has none."""
    attentions = [m for m in model.modules() if type(m).__name__ == "Qwen3Attention"]
    for attention in attentions:
        attention.forward = types.MethodType(_attention_forward, attention)
    return bool(attentions)


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the operator runs here and gives the right numbers: tried once, on a few, against fp32."""
    try:
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(1, 5, 3, 16, generator=generator).to(device, dtype) for _ in range(2))
        cos, sin = (torch.rand(1, 5, 16, generator=generator).to(device, dtype) for _ in range(2))
        weight = torch.ones(16, device=device, dtype=dtype)
        ours, precise = x.clone().requires_grad_(), x.float().requires_grad_()
        norm = precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + 1e-6)
        turned = torch.cat([-norm[..., 8:], norm[..., :8]], -1)
        want = norm * cos.float().unsqueeze(2) + turned * sin.float().unsqueeze(2)
        got = norm_rotate(ours, weight, cos, sin, 1e-6)
        got.backward(dy)
        want.backward(dy.float())
        assert ours.grad is not None and precise.grad is not None
        wrong = max(float((got - want).detach().abs().max()), float((ours.grad - precise.grad).abs().max()))
        reason = f"its result is off by {wrong:.1e}" if not wrong < 0.1 else ""
    except Exception as error:  # no compiler, no Python.h, a driver too old for this triton
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    if reason:
        warn(f"the kernel that norms and rotates queries and keys cannot be used ({reason}); going on without it")
    return not reason
