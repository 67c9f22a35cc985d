"""How the flash-attn packages are called and chosen, with stand-ins that compute by SDPA (no card is needed)."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from anchor_cli.model import attention
from anchor_cli.model.attention import KERNELS, Packing, choose_kernel, sdpa_kernel

LENGTHS = (5, 1, 9)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that passes for an H100, as far as choosing goes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    attention._works.cache_clear()
    yield torch.device("cuda")
    attention._works.cache_clear()


@pytest.fixture
def flash_4(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`flash_attn.cute` with the signature of flash-attn-4 4.0.0b36, `qv` in fourth place."""
    calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
        max_seqlen_q: Any = None, max_seqlen_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    ) -> Any:  # fmt: skip
        calls.append(dict(inspect.currentframe().f_locals))  # type: ignore[union-attr]
        assert qv is None and causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = tuple(cu_seqlens_q.diff().tolist())
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        return sdpa_kernel(q, k, v, Packing(cu_seqlens_q, lengths, "sdpa"), softmax_scale or 0.0), None

    package, cute = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.cute")
    package.__path__, cute.flash_attn_varlen_func = [], flash_attn_varlen_func  # type: ignore[attr-defined]
    cute.__spec__ = importlib_spec("flash_attn.cute")
    package.__spec__ = importlib_spec("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    return calls


def importlib_spec(name: str) -> Any:
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, None)


def packed_row() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Packing]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(sum(LENGTHS), heads, 8) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    return query, key, value, Packing(bounds, LENGTHS, "sdpa")


def test_flash_attention_4_gets_its_arguments_by_name(flash_4: list[dict[str, Any]]) -> None:
    query, key, value, packing = packed_row()
    got = KERNELS["flash_attention_4"](query, key, value, packing, 0.3)
    assert torch.equal(got, sdpa_kernel(query, key, value, packing, 0.3)) and len(flash_4) == 1


def test_flash_attention_4_is_chosen_where_it_is_installed(hopper: torch.device, flash_4: list[Any]) -> None:
    """The parent package of flash-attn 4 is no flash-attn 2."""
    for asked in ("auto", "flash_attention_4"):
        assert choose_kernel(asked, hopper, torch.bfloat16) == "flash_attention_4"
    assert choose_kernel("flash_attention_2", hopper, torch.bfloat16) == "varlen"
    assert choose_kernel("flash_attention_4", torch.device("cpu"), torch.bfloat16) == "sdpa"


def test_flash_attention_4_needs_hopper_or_blackwell(flash_4: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    attention._works.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for asked in ("auto", "flash_attention_4", "varlen_fa4"):
        assert choose_kernel(asked, torch.device("cuda"), torch.bfloat16) == "varlen"
    attention._works.cache_clear()


def test_varlen_is_routed_once(hopper: torch.device, flash_4: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.attention.varlen as varlen

    active: list[str] = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append, raising=False)

    def varlen_attn(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        scale: float, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Any:  # fmt: skip
        assert window_size == (-1, 0) and enable_gqa and active == ["FA4"]
        return sdpa_kernel(query, key, value, Packing(cu_seq_q, LENGTHS, "sdpa"), scale)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    attention._route_varlen.cache_clear()
    assert choose_kernel("varlen_fa4", hopper, torch.bfloat16) == "varlen_fa4"
    assert choose_kernel("varlen_fa3", hopper, torch.bfloat16) == "varlen"  # not installed
    query, key, value, packing = packed_row()
    for _ in range(2):
        got = KERNELS["varlen_fa4"](query, key, value, packing, 0.3)
        assert torch.equal(got, sdpa_kernel(query, key, value, packing, 0.3))
    attention._route_varlen.cache_clear()
    assert active == ["FA4"]
