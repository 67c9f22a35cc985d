"""Packed causal attention for stock transformers models: one code path, one kernel of several.

A packed row holds the tokens of N texts one after another; `cu_seqlens` (N+1,) are the text boundaries. No token sees
another text and no padding exists. The kernel is a variable-length flash attention on CUDA (flash-attn 3, 4 or 2 if
installed, else PyTorch's own `torch.nn.attention.varlen`), and one causal SDPA per text elsewhere.

The function is registered with transformers' `AttentionInterface`, so the model classes stay stock.

Shapes: T tokens, H query heads, K key/value heads, d head dimension.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from anchor_cli.base.console import warn
from anchor_cli.base.errors import InputError
from anchor_cli.model.kernel_packages import FLASH_MODULES, is_installed

PACKED_ATTENTION = "anchor_packed"


@dataclass(frozen=True)
class Packing:
    """Where texts begin and end in a packed row, and the kernel that attends: travels through the model's kwargs."""

    cu_seqlens: torch.Tensor  # (N+1,) int32
    lengths: tuple[int, ...]
    kernel: str
    rows: torch.Tensor | None = None  # the only ones that the last layer's result is needed of (model/pooling.py)


class Kernel(Protocol):
    """(T, H, d), (T, K, d), (T, K, d) -> (T, H, d), causal within each text."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
    ) -> torch.Tensor: ...


def sdpa_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """One causal `scaled_dot_product_attention` per text: exact on every device and dtype, float64 included.

    Neighbours of equal length share a call, as a batch: three times faster for short texts sorted by length (measured).
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # the CPU flash kernel does not take grouped heads; repeating keeps it off the slow math kernel
        key, value = (t[:, :, None].expand(-1, -1, groups, -1).flatten(1, 2) for t in (key, value))

    def attend(length: int, count: int, *parts: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in parts)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).flatten(0, 1)

    runs = [(length, sum(1 for _ in equal)) for length, equal in groupby(packing.lengths)]
    if len(runs) == 1:
        return attend(*runs[0], query, key, value)
    sizes = [length * count for length, count in runs]
    pieces = zip(runs, *(t.split(sizes) for t in (query, key, value)), strict=True)
    return torch.cat([attend(length, count, q, k, v) for (length, count), q, k, v in pieces])


def varlen_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """PyTorch's own variable-length flash attention (CUDA, half precision; torch >= 2.10).

    Keyword differences between 2.10 and 2.13 (`is_causal` became `window_size`, `enable_gqa` is new) are told from
    the signature. Nine times as fast as `sdpa` on an H200 (docs/benchmarks.md).
    """
    from torch.nn.attention import varlen

    bounds, longest = packing.cu_seqlens, max(packing.lengths)
    options: dict[str, Any] = {}
    names = _parameter_names(varlen.varlen_attn)
    options.update({"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True})
    if "scale" in names:
        options["scale"] = scale
    elif abs(scale * query.shape[-1] ** 0.5 - 1) > 1e-6:
        query = query * (scale * query.shape[-1] ** 0.5)
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    out = varlen.varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), bounds, bounds, longest, longest, **options
    )
    return out[0] if isinstance(out, tuple) else out


def varlen_fa3_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """`varlen_kernel` with torch's operators routed to flash-attn 3 (torch >= 2.13, a prototype there)."""
    _route_varlen("FA3")
    return varlen_kernel(query, key, value, packing, scale)


def varlen_fa4_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """`varlen_kernel` with torch's operators routed to flash-attn 4 (torch >= 2.13, a prototype there)."""
    _route_varlen("FA4")
    return varlen_kernel(query, key, value, packing, scale)


@cache
def _route_varlen(implementation: str) -> None:
    """For the whole process: torch knows one active implementation of its flash attention operators."""
    import torch.nn.attention

    torch.nn.attention.activate_flash_attention_impl(implementation)


def flash_2_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """`flash_attn.flash_attn_varlen_func` (flash-attn 2.x); grouped heads are native."""
    from flash_attn import flash_attn_varlen_func

    bounds, longest = packing.cu_seqlens, max(packing.lengths)
    out: torch.Tensor = flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
    )
    return out


def flash_3_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """`flash_attn_interface.flash_attn_varlen_func` (flash-attn 3, Hopper); may return (out, lse)."""
    from flash_attn_interface import flash_attn_varlen_func

    bounds, longest = packing.cu_seqlens, max(packing.lengths)
    out = flash_attn_varlen_func(query, key, value, bounds, bounds, longest, longest, softmax_scale=scale, causal=True)
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


def flash_4_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """`flash_attn.cute.flash_attn_varlen_func` (flash-attn 4, Hopper and Blackwell); may return (out, lse).

    By keyword only: its fourth positional argument is `qv`, not `cu_seqlens_q`.
    """
    from flash_attn.cute import flash_attn_varlen_func

    bounds, longest = packing.cu_seqlens, max(packing.lengths)
    out = flash_attn_varlen_func(
        q=query, k=key, v=value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    first: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return first


KERNELS: dict[str, Kernel] = {
    "flash_attention_3": flash_3_kernel,
    "flash_attention_4": flash_4_kernel,
    "flash_attention_2": flash_2_kernel,
    "varlen": varlen_kernel,
    "sdpa": sdpa_kernel,
    "varlen_fa3": varlen_fa3_kernel,
    "varlen_fa4": varlen_fa4_kernel,
}
"""Expected fastest first (measured on a card: `varlen` and `sdpa`); `auto` does not go beyond `sdpa`."""
HOPPER_OR_NEWER = {"flash_attention_3": (9,), "varlen_fa3": (9,), "flash_attention_4": (9, 10), "varlen_fa4": (9, 10)}
"""Major compute capabilities that a kernel is built for; the others run from 8 (Ampere) on."""


def choose_kernel(wish: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that will run, for `attn_implementation` = `wish`.

    `auto` takes the first of flash-attn 3, 4, 2, torch varlen that can be imported, on CUDA with half
    precision, and SDPA everywhere else. A flash kernel asked for by name falls back to torch's varlen on CUDA when its
    package cannot be imported, and to SDPA off CUDA or in fp32/fp64 (no flash kernel exists there): the result is the
    same text by text, so a spec that says `flash_attention_2` runs whole on a laptop. `anchor doctor` and the run's
    environment.json name the kernel really used.

    Raises:
        InputError: an unknown name.
    """
    if wish not in (*KERNELS, "auto", "eager"):
        raise InputError(f"attn_implementation: {wish!r} is not one of auto, {', '.join(KERNELS)}")
    half = dtype in (torch.float16, torch.bfloat16)
    if wish in ("sdpa", "eager") or device.type != "cuda" or not half:
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    for name in KERNELS if wish == "auto" else (wish, "varlen"):
        if name == "sdpa":
            break
        if capability[0] not in HOPPER_OR_NEWER.get(name, range(8, 100)):
            continue
        if name == "varlen":
            if is_installed("torch.nn.attention.varlen"):
                return name
        elif _works(FLASH_MODULES[name]) and (not name.startswith("varlen_") or _can_route()):
            return name
    return "sdpa"


def memory_kind(kernel: str) -> str:
    """How plan/memory.py counts a kernel: `sdpa`, `flash`, or `repeated` (keys and values of every query head)."""
    if kernel.startswith("varlen"):
        from torch.nn.attention import varlen

        return "flash" if "enable_gqa" in _parameter_names(varlen.varlen_attn) else "repeated"
    return "sdpa" if kernel == "sdpa" else "flash"


def _can_route() -> bool:
    return hasattr(torch.nn.attention, "activate_flash_attention_impl")


@cache
def _works(module: str) -> bool:
    """Whether a flash package can be used. One built for another torch is found and dies when it is imported."""
    if not is_installed(module):
        return False
    try:
        if hasattr(importlib.import_module(module), "flash_attn_varlen_func"):
            return True
        reason = "it has no flash_attn_varlen_func"
    except Exception as error:  # an undefined symbol, a missing shared library, an API of torch that has gone
        reason = " ".join(str(error).split())[:200]
    warn(f"{module} is installed and cannot be used ({reason}); going on with the next attention kernel")
    return False


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    packing: Packing,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature: (1, H, T, d), (1, K, T, d) x2 -> (1, T, H, d).

    What no kernel here computes is refused: most of it by `load_backbone`, a text longer than the window only here.

    Never traced by `torch.compile`: each batch has new text boundaries, and a graph that knew them would be compiled
    anew every step. `packing` is one opaque object for the same reason.
    """
    if softcap is not None or s_aux is not None:
        raise InputError("this model's attention has soft-capped scores or sinks, which anchor does not compute")
    if sliding_window is not None and max(packing.lengths) > sliding_window:
        raise InputError(
            f"a text of {max(packing.lengths)} tokens is longer than the model's sliding window of {sliding_window}",
            hint=f"max_seq_length of at most {sliding_window}",
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # squeeze, not [0]: the gradient of an index is a copy into zeros, that of squeeze is a view
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    return KERNELS[packing.kernel](query, key, value, packing, scale).unsqueeze(0), None


def register() -> None:
    """Make `attn_implementation="anchor_packed"` known to transformers. Calling it again changes nothing.

    No mask function is registered: transformers then makes none (masking_utils.py, `_preprocess_mask_arguments`), and
    does not look for text boundaries in the position ids either.
    """
    AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


def _parameter_names(function: Any) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(function).parameters)
