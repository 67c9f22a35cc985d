"""Whether Liger's Triton kernels run on this host, tried on one norm before anything is loaded.

Triton compiles a launcher at first use: without a C compiler or Python's headers the first norm would raise, after data
and model have been loaded.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from anchor_cli.base.console import warn
from anchor_cli.base.errors import InputError, first_line
from anchor_cli.model.backbone import liger_fits

ALLOWED_ERROR = 0.05  # bfloat16 keeps 8 bits: normed values up to 4 are off by up to 2^-7 x 4
REMEDY = "apt-get install gcc python3-dev, or liger: false in the spec"


def liger_problem(device: torch.device) -> str | None:
    """Forward and backward of Liger's RMSNorm against PyTorch's arithmetic; None when right, else what is wrong."""
    try:
        from liger_kernel.transformers.rms_norm import LigerRMSNorm

        norm = LigerRMSNorm(256, eps=1e-6).to(device, torch.bfloat16)
        generator = torch.Generator().manual_seed(0)  # torch's own random state is left as it is
        values, direction = (torch.randn(64, 256, generator=generator).to(device, torch.bfloat16) for _ in range(2))
        ours, exact = values.clone().requires_grad_(), values.float().requires_grad_()
        output, want = norm(ours), exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)
        output.backward(direction)
        want.backward(direction.float())
        assert ours.grad is not None and exact.grad is not None
        error = max(float((output - want).detach().abs().max()), float((ours.grad - exact.grad).abs().max()))
    except Exception as raised:  # a missing compiler, header, library or driver each raises another kind
        return f"{type(raised).__name__}: {first_line(raised)}"
    return None if error <= ALLOWED_ERROR else f"its RMSNorm is off by {error:.1e}"


@cache
def decide_liger(choice: bool | Literal["auto"], model: str, device: torch.device) -> bool:
    """Whether this run uses Liger: on CUDA, where it knows the model and its kernels run. Tried, and warned of, once.

    Raises:
        InputError: `liger: true`, and it cannot.
    """
    if choice is False or device.type != "cuda":
        return False
    if liger_fits(model):
        problem = liger_problem(device)
    elif choice == "auto":
        return False
    else:
        problem = "liger-kernel is not installed, or does not know this kind of model"
    if problem is None:
        return True
    if choice is True:
        raise InputError(f"liger: true, but its kernels cannot be used: {problem}", REMEDY)
    warn(f"Liger's kernels do not run on this host ({problem}): norms and activations are not fused. {REMEDY}")
    return False
