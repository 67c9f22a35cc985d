"""Norm and rotation of queries and keys in one kernel, interpreted on a CPU (conftest.py), against float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

pytest.importorskip("triton", reason="triton is not installed: the kernel's source cannot be interpreted")

from anchor_cli.model import rotary_kernel
from anchor_cli.model.attention import PACKED_ATTENTION, register
from anchor_cli.model.packed import pack_pairs
from anchor_cli.model.reconstruction import ReconstructionModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def exact(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dy: torch.Tensor
) -> list[torch.Tensor]:
    """Result and gradients by autograd in float64, written out as transformers has it."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    normed = weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    half = x.shape[-1] // 2
    turned = torch.cat([-normed[..., half:], normed[..., :half]], dim=-1)
    y = normed * cos.double().unsqueeze(2) + turned * sin.double().unsqueeze(2)
    y.backward(dy.double())
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize(("T", "H", "d"), [(1, 1, 2), (5, 3, 16), (70, 2, 8), (9, 16, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients(T: int, H: int, d: int, dtype: torch.dtype) -> None:
    """T = 70 is several programs and a rest; cos and sin are of both halves, unlike on purpose."""
    torch.manual_seed(T)
    with DEVICE:
        x, dy = torch.randn(1, T, H, d).to(dtype), torch.randn(1, T, H, d).to(dtype)
        weight, cos, sin = torch.rand(d).to(dtype), torch.rand(1, T, d).to(dtype), torch.rand(1, T, d).to(dtype)
    want = exact(x, weight, cos, sin, dy)
    x.requires_grad_()
    weight.requires_grad_()
    got = rotary_kernel.norm_rotate(x, weight, cos, sin, 1e-6)
    got.backward(dy)
    assert x.grad is not None and weight.grad is not None and got.dtype == dtype
    loose = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, expected in zip((got.detach(), x.grad, weight.grad), want, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=loose, atol=loose * float(expected.abs().max()))


def test_a_model_gives_the_same_loss_and_gradients() -> None:
    register()
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=300, tie_word_embeddings=True, use_cache=False, initializer_range=0.2,
        attn_implementation=PACKED_ATTENTION,
    )  # fmt: skip
    stock = Qwen3ForCausalLM(config).train()
    fused = copy.deepcopy(stock)
    assert rotary_kernel.fuse_queries_and_keys(fused)
    chance = np.random.default_rng(0)
    sides = [[chance.integers(3, 300, n).astype(np.int32) for n in (9, 4, 12)] for _ in range(2)]
    batch = pack_pairs(*sides, np.zeros(3, np.int32), np.zeros(3, np.int32), eos_token_id=2, targets="text")
    models = [ReconstructionModel(m.to(DEVICE), kernel="sdpa") for m in (stock, fused)]  # type: ignore[arg-type]
    losses = [m(batch.to(DEVICE), 0.1, 0.2).loss for m in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for (name, want), got in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert want.grad is not None and got[1].grad is not None
        torch.testing.assert_close(got[1].grad, want.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_operator_keeps_pytorchs_rules() -> None:
    x, weight = torch.randn(1, 3, 2, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    torch.library.opcheck(rotary_kernel.norm_rotate, (x, weight, torch.rand(1, 3, 8), torch.rand(1, 3, 8), 1e-6))


def test_the_trial() -> None:
    assert rotary_kernel.works(DEVICE, torch.float32) and rotary_kernel.works(DEVICE, torch.bfloat16)
