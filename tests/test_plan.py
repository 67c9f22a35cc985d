"""The batch plan against its definition: order, coverage, equal shares, budget; the arithmetic of docs/method.md."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchor_cli.base.errors import InputError
from anchor_cli.data.batches import epoch_order, fill_bins, make_plan
from anchor_cli.spec.schedule import steps_per_epoch, total_steps


def test_kures_run_has_14554_steps_an_epoch_and_43662_in_three() -> None:
    assert steps_per_epoch(1_862_922, 128) == 14_554  # 14,554 x 128 = 1,862,912: ten rows are left out
    assert total_steps(1_862_922, 128, 3) == 43_662 == 3 * 14_554
    assert total_steps(1_862_922, 128, 3, max_steps=2000) == 2000
    assert total_steps(1000, 10, 0.555) == 56  # 55.5 steps: a fraction is rounded up to a whole step


@given(
    lengths=st.lists(st.integers(1, 600), min_size=8, max_size=200),
    global_batch=st.integers(1, 8),
    world=st.integers(1, 4),
    budget=st.integers(600, 3000),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_every_step_holds_its_rows_once_within_the_budget(
    lengths: list[int], global_batch: int, world: int, budget: int, seed: int
) -> None:
    row_lengths = np.array(lengths, dtype=np.int32)
    total = 2 * (len(lengths) // global_batch)  # two epochs
    try:
        plan = make_plan(
            row_lengths,
            seed=seed,
            global_batch_size=global_batch,
            world_size=world,
            token_budget=budget,
            total_steps=total,
        )
    except InputError:
        # refused only where no dealing can hold: fewer rows than ranks, or ranks with several rows over the budget
        assert global_batch < world or global_batch % world
        return
    for epoch in range(2):
        seen: list[int] = []
        for s in range(plan.steps_per_epoch):
            step = plan.step(epoch * plan.steps_per_epoch + s)
            placed = [row for rank in step.micro_batches for micro in rank for row in micro]
            want = epoch_order(len(lengths), seed, epoch)[s * global_batch : (s + 1) * global_batch]
            assert step.epoch == epoch and sorted(placed) == sorted(want.tolist())
            assert [len(rank) for rank in step.micro_batches] == [plan.num_micro_batches] * world
            for rank in step.micro_batches:
                for micro in rank:
                    assert 0 < row_lengths[micro].sum() <= budget
            seen += placed
        assert len(set(seen)) == len(seen) == plan.steps_per_epoch * global_batch


def test_the_number_of_micro_batches_is_the_smallest_that_fits() -> None:
    rng = np.random.default_rng(0)
    row_lengths = rng.integers(20, 600, 4000).astype(np.int32)
    options = {"seed": 1, "global_batch_size": 64, "world_size": 2, "total_steps": 2 * 62}
    plan = make_plan(row_lengths, token_budget=6000, **options)
    steps = [row_lengths[plan.rows_of(s)] for s in range(plan.total_steps)]
    fits = [max(loads.max() for _, loads in (fill_bins(s[None], 2 * n) for s in steps)) <= 6000 for n in range(1, 33)]
    assert plan.num_micro_batches == 1 + fits.index(True)


def test_the_order_does_not_depend_on_world_size_or_budget() -> None:
    row_lengths = np.random.default_rng(0).integers(20, 600, 1000).astype(np.int32)
    options = {"seed": 3, "global_batch_size": 32, "total_steps": 62}
    cuts = ((1, 1000), (2, 8000), (4, 2000))
    plans = [make_plan(row_lengths, world_size=world, token_budget=budget, **options) for world, budget in cuts]
    for step in (0, 1, 30, 31, 61):
        first, *others = (plan.rows_of(step).tolist() for plan in plans)
        assert all(other == first for other in others)
    assert plans[0].rows_of(0).tolist() != plans[0].rows_of(31).tolist()  # epochs differ


def test_loads_are_within_the_bound_of_longest_first_dealing() -> None:
    """Graham 1969: longest first is at most 4/3 - 1/(3M) of the best possible, here bounded from below by the mean."""
    rng = np.random.default_rng(5)
    lengths = rng.lognormal(5.5, 0.6, (200, 128)).astype(np.int64) + 20
    for bins in (2, 4, 8):
        _, loads = fill_bins(lengths, bins)
        best = np.maximum(lengths.sum(1) / bins, lengths.max(1))
        assert (loads.max(1) <= (4 / 3 - 1 / (3 * bins)) * best + 1).all()
        assert (loads.max(1) / loads.mean(1)).mean() < 1.01  # and nearly equal in practice


def test_the_plan_is_the_same_for_the_same_inputs_and_another_seed_is_another_order() -> None:
    row_lengths = np.random.default_rng(0).integers(20, 600, 500).astype(np.int32)
    first, again, other = (
        make_plan(row_lengths, seed=s, global_batch_size=16, world_size=2, token_budget=4000, total_steps=31)
        for s in (7, 7, 8)
    )
    a, b, c = (plan.step(17) for plan in (first, again, other))
    flat = [[micro.tolist() for rank in step.micro_batches for micro in rank] for step in (a, b, c)]
    assert flat[0] == flat[1] != flat[2]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([10] * 5, {"global_batch_size": 8}, "the data set has 5 rows, fewer than one global batch of 8"),
        ([10] * 9, {"global_batch_size": 2, "world_size": 4}, "global_batch_size 2 is smaller than the number of"),
        ([10, 900], {"global_batch_size": 2}, "max_tokens_per_micro_batch 100 is below the longest row, 900 tokens"),
    ],
)
def test_what_cannot_be_planned_is_said(lengths: list[int], options: dict[str, int], message: str) -> None:
    given_options = {"world_size": 1, "seed": 0, "token_budget": 100, "total_steps": 1} | options
    with pytest.raises(InputError) as error:
        make_plan(np.array(lengths, dtype=np.int32), **given_options)
    assert message in error.value.message and error.value.hint
