"""Which way the layers are fused, decided before a model is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anchor_cli.model import fusing
from anchor_cli.model.fusing import decide_fusing

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("torch_compile", "liger", "triton_works", "liger_works", "want"),
    [
        ("auto", "auto", True, True, (True, False)),  # by the counted bytes
        ("auto", "auto", False, True, (False, True)),
        ("auto", True, True, True, (False, True)),
        (True, True, True, True, (True, True)),
        (False, "auto", True, True, (False, True)),
        (True, "auto", False, True, (True, False)),
        (False, False, True, True, (False, False)),
        ("auto", "auto", False, False, (False, False)),
    ],
)
def test_one_of_the_two_fuses_on_cuda(
    torch_compile: Any, liger: Any, triton_works: bool, liger_works: bool, want: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(fusing, "kernel_works", lambda device, dtype: triton_works)
    monkeypatch.setattr(fusing, "decide_liger", lambda choice, model, device: choice is not False and liger_works)
    assert decide_fusing(torch_compile, liger, "model", CUDA, torch.bfloat16) == want
    said = " ".join(capsys.readouterr().err.split())
    assert ("a step takes about twice as long" in said) == (want == (False, False))


def test_split_weights_are_compiled_only_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "kernel_works", lambda device, dtype: True)
    monkeypatch.setattr(fusing, "decide_liger", lambda choice, model, device: choice is not False)
    for asked, want in (("auto", (False, True)), (True, (True, False))):
        got = decide_fusing(asked, "auto", "model", CUDA, torch.bfloat16, split_weights=True)  # type: ignore[arg-type]
        assert got == want


def test_nothing_is_fused_on_a_cpu_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert decide_fusing("auto", "auto", "model", CPU, torch.float32) == (False, False)
    assert decide_fusing(True, "auto", "model", CPU, torch.float32) == (True, False)
    assert not capsys.readouterr().err


def test_the_last_layer_is_pruned_on_cuda_where_a_trial_has_shown_that_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned: list[Any] = []
    monkeypatch.setattr(fusing, "prune_last_layer", pruned.append)
    can, cannot = SimpleNamespace(anchor_can_prune=True), SimpleNamespace(anchor_can_prune=False)
    for model, device in ((can, CPU), (cannot, CUDA), (SimpleNamespace(), CUDA), (can, CUDA)):
        fusing.prune(model, device)  # type: ignore[arg-type]
    assert pruned == [can]
