"""The learning rate against transformers' own schedulers, update by update."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from anchor_cli.spec.schedule import interval_steps, learning_rate, warmup_steps_of


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (300, 700)])
def test_equal_to_transformers(kind: str, warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-5)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        ours = learning_rate(step, peak=4e-5, warmup=warmup, total=total, kind=kind)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        theirs.step()


def test_by_hand() -> None:
    rate = [learning_rate(step, peak=1.0, warmup=4, total=12) for step in range(12)]
    assert rate == [0, 1 / 4, 2 / 4, 3 / 4, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]


def test_shares_of_all_steps() -> None:
    assert interval_steps(500, 43_662) == 500
    assert interval_steps(0.1, 43_662) == 4_367  # a tenth is 4,366.2: rounded up
    assert interval_steps(0, 100) == 0
    assert interval_steps(0.07, 100) == 7  # 0.07 * 100 is 7.000000000000001 in floating point
    assert interval_steps(0.001, 10) == 1
    assert warmup_steps_of(1000, 300, None) == 300
    assert warmup_steps_of(1000, 0, 0.03) == 30
