"""The key `liger` and the trial of one kernel, with a stand-in for Liger that does what its norm does, or fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from anchor_cli.base.errors import InputError
from anchor_cli.model import liger

CPU = torch.device("cpu")


class Norm(torch.nn.Module):
    """RMSNorm, as `liger_kernel.transformers.rms_norm.LigerRMSNorm` computes it."""

    factor = 1.0
    failure: Exception | None = None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.failure:
            raise self.failure
        exact = hidden.float() * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + self.eps)
        return (exact * self.factor).to(hidden.dtype) * self.weight


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> type[Norm]:
    """Liger, installed: its module's norm is the stand-in, and it knows every model."""
    module = ModuleType("liger_kernel.transformers.rms_norm")
    kind = type("LigerRMSNorm", (Norm,), {})
    module.LigerRMSNorm = kind  # type: ignore[attr-defined]
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "liger_fits", lambda _: True)
    monkeypatch.setattr(liger, "decide_liger", liger.decide_liger.__wrapped__)  # the decision is kept for a process
    return kind


def test_a_right_norm_passes_and_a_wrong_one_does_not(norm: type[Norm]) -> None:
    assert liger.liger_problem(CPU) is None
    norm.factor = 1.1
    assert str(liger.liger_problem(CPU)).startswith("its RMSNorm is off by")


@pytest.mark.parametrize(
    ("failure", "want"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC"),
            "Failed to find C comp",
        ),
        (FileNotFoundError("Python.h"), "FileNotFoundError: Python.h"),
    ],
)
def test_a_kernel_that_does_not_run(
    norm: type[Norm], failure: Exception, want: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm.failure = failure
    real = liger.liger_problem
    monkeypatch.setattr(liger, "liger_problem", lambda _: real(CPU))  # the decision is CUDA's, the trial runs here
    cuda = torch.device("cuda")
    assert liger.decide_liger("auto", "m", cuda) is False
    warned = capsys.readouterr().err
    assert want in warned and "warning: Liger's kernels do not run on this host" in warned and "liger: false" in warned
    with pytest.raises(InputError, match="liger: true") as caught:
        liger.decide_liger(True, "m", cuda)
    assert want in caught.value.message
    assert liger.decide_liger(False, "m", cuda) is False
    norm.failure = None
    assert liger.decide_liger("auto", "m", cuda) is True and liger.decide_liger(True, "m", cuda) is True
    assert liger.decide_liger("auto", "m", CPU) is False  # never on a CPU


def test_without_liger(small_model: Path) -> None:
    cuda = torch.device("cuda")
    liger.decide_liger.cache_clear()
    if liger.liger_fits(small_model):
        pytest.skip("liger-kernel is installed")
    assert liger.decide_liger("auto", str(small_model), cuda) is False
    with pytest.raises(InputError, match="not installed"):
        liger.decide_liger(True, str(small_model), cuda)
    assert str(liger.liger_problem(CPU)).startswith("ModuleNotFoundError")
