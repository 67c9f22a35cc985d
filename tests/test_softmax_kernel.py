"""The output layer's Triton kernel against float64: interpreted on a CPU (conftest.py), compiled on a card."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anchor_cli.model import output_layer
from anchor_cli.model.output_layer import OutputLayer

pytest.importorskip("triton", reason="triton is not installed: the kernel's source cannot be interpreted")

from anchor_cli.model import softmax_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = 2**-8 if DEVICE.type == "cuda" else 2**-7
"""Relative error of one conversion to bf16: a card rounds, Triton's interpreter cuts the rest off."""


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DEVICE:
        yield


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64, so that a few hundred classes are several blocks and a rest."""
    monkeypatch.setattr(softmax_kernel, "BLOCK", 64)


def drawn(C: int, V: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(C * 1000 + V)
    return (torch.randn(C, V) * scale).to(dtype), torch.randint(V, (C,)), torch.rand(C)


def exact(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient by autograd in float64."""
    precise = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(precise, targets, reduction="none")
    (losses * weights.double()).sum().backward()
    assert precise.grad is not None
    return losses.detach(), precise.grad


@pytest.mark.parametrize(("C", "V"), [(1, 1), (1, 2), (3, 63), (3, 64), (2, 65), (5, 300), (4, 1187), (1, 128), (7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_losses_and_gradient_in_every_shape(C: int, V: int, dtype: torch.dtype) -> None:
    logits, targets, weights = drawn(C, V, dtype)
    want_losses, want = exact(logits, targets, weights)
    losses = softmax_kernel.softmax_gradient_(logits, targets, weights)
    assert losses.dtype == torch.float32 and logits.dtype == dtype
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-6, atol=1e-6)
    if dtype == torch.float32:
        torch.testing.assert_close(logits.double(), want, rtol=1e-6, atol=1e-6)
    else:  # one conversion of a number that is right to 1e-6
        assert ((logits.double() - want).abs() <= BF16 * want.abs() + 1e-6).all()


@pytest.mark.usefixtures("small_blocks")
def test_weights_of_zero_give_rows_of_zero() -> None:
    logits, targets, weights = drawn(4, 130, torch.bfloat16)
    weights[1] = weights[3] = 0.0
    want, _ = exact(logits, targets, weights)
    losses = softmax_kernel.softmax_gradient_(logits, targets, weights)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    assert not logits[[1, 3]].any() and logits[[0, 2]].any(dim=1).all()


@pytest.mark.usefixtures("small_blocks")
def test_large_logits_do_not_overflow() -> None:
    logits, targets, weights = drawn(3, 200, torch.float32, scale=1e4)
    want_losses, want = exact(logits, targets, weights)
    losses = softmax_kernel.softmax_gradient_(logits, targets, weights)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_rows_of_a_larger_buffer() -> None:
    """The last, shorter chunk lies in the same buffer; columns beyond V belong to nobody."""
    values, targets, weights = drawn(3, 100, torch.float32)
    buffer = torch.full((5, 128), 7.0)
    logits = buffer[:3, :100]
    logits.copy_(values)
    _, want = exact(values, targets, weights)
    softmax_kernel.softmax_gradient_(logits, targets, weights)
    torch.testing.assert_close(logits.double(), want, rtol=1e-6, atol=1e-6)
    assert (buffer[3:] == 7).all() and (buffer[:, 100:] == 7).all()


def test_the_real_vocabulary_and_block() -> None:
    logits, targets, weights = drawn(2, 151936, torch.bfloat16)
    want_losses, want = exact(logits, targets, weights)
    losses = softmax_kernel.softmax_gradient_(logits, targets, weights)
    torch.testing.assert_close(losses.double(), want_losses, rtol=1e-6, atol=1e-6)
    assert ((logits.double() - want).abs() <= BF16 * want.abs() + 1e-6).all()


def gradients(
    layer: OutputLayer, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> list[torch.Tensor]:
    states = hidden.clone().requires_grad_()
    layer.weight.grad = None
    loss, each = layer(states, targets, weights)
    (loss * 2).backward()
    assert states.grad is not None and layer.weight.grad is not None
    return [loss.detach().double(), each.double(), states.grad.double(), layer.weight.grad.double()]


@pytest.mark.parametrize("num_targets", [1, 4, 10, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small_blocks")
def test_the_fused_layer_against_float64(num_targets: int, dtype: torch.dtype) -> None:
    """Chunks of 4 and a rest: loss, single losses, gradients of hidden states and of the table."""
    torch.manual_seed(num_targets)
    table = torch.randn(300, 16).to(dtype)
    hidden, targets = torch.randn(num_targets, 16).to(dtype), torch.randint(300, (num_targets,))
    weights = torch.rand(num_targets)
    ours = gradients(OutputLayer(torch.nn.Parameter(table), 4, fused=True), hidden, targets, weights)
    exact_table = torch.nn.Parameter(table.double())
    want = gradients(OutputLayer(exact_table, 4), hidden.double(), targets, weights.double())
    loose = 1e-5 if dtype == torch.float32 else 2e-2
    for got, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=loose, atol=loose)


class LargestTogether(TorchDispatchMode):
    """The most bytes of storages with at least `from_bytes` that were alive at one time."""

    def __init__(self, from_bytes: int) -> None:
        super().__init__()
        self.from_bytes, self.now, self.peak = from_bytes, 0, 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                size, key = storage.nbytes(), storage._cdata
                if size >= self.from_bytes and key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize(("fused", "buffers"), [(True, 1), (False, 1.5)])
def test_a_chunk_is_gone_before_the_next_one_comes(fused: bool, buffers: float) -> None:
    """bf16: one buffer of logits in all (fused); fp32 logits beside their bf16 source or gradient (plain)."""
    C, V = 32, 4000
    torch.manual_seed(0)
    layer = OutputLayer(torch.nn.Parameter(torch.randn(V, 8).bfloat16()), C, fused=fused)
    hidden = torch.randn(4 * C, 8).bfloat16().requires_grad_()
    chunk_bytes = C * V * (2 if fused else 4)
    with LargestTogether(from_bytes=C * V * 2) as tracker:  # below: the table's gradient, 8 columns
        layer(hidden, torch.randint(V, (4 * C,)), torch.rand(4 * C))
    assert tracker.peak == buffers * chunk_bytes


def test_the_forms_are_chosen_by_device_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = OutputLayer(torch.nn.Parameter(torch.zeros(10, 4)))
    assert not layer.is_fused(torch.zeros(2, 4, device="cpu"))
    assert not OutputLayer(layer.weight, fused=True).is_fused(torch.zeros(2, 4, dtype=torch.float64))
    assert softmax_kernel.works(DEVICE, torch.bfloat16) and softmax_kernel.works(DEVICE, torch.float32)

    def broken(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(softmax_kernel, "softmax_gradient_", broken)
    softmax_kernel.works.cache_clear()
    assert not output_layer.kernel_works(DEVICE, torch.bfloat16)
    softmax_kernel.works.cache_clear()


@pytest.mark.parametrize(
    ("num_targets", "want"), [(0, 1), (1, 128), (4096, 4096), (4097, 2176), (16340, 4096), (16400, 3328)]
)
def test_fused_chunks_are_alike_and_fill_tiles(num_targets: int, want: int) -> None:
    layer = OutputLayer(torch.nn.Parameter(torch.zeros(10, 4)))
    assert layer.chunk_size(num_targets, torch.device("cuda"), fused=True) == want
