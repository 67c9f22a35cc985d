"""How Stage II cuts a step: every text once, within the budget, the same rows whatever the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_contrast_engine import triples

from anchor_cli.base.errors import InputError
from anchor_cli.data.batches import epoch_order, fill_bins
from anchor_cli.data.contrast_rows import ContrastData
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import Options, prepare
from anchor_cli.data.text_batches import cut_step, make_text_plan
from anchor_cli.processes.ranks import Ranks
from anchor_cli.train.stages.contrast_feed import ContrastFeed


@pytest.fixture(scope="module")
def data(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> ContrastData:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in triples(60)))
    options = Options(negatives=True)
    prepare([str(folder / "rows.jsonl")], folder / "out", tokenizer=small_model, max_seq_length=64, options=options)
    return ContrastData(PreparedPairs.open(folder / "out"))


@pytest.mark.parametrize("seed", range(5))
def test_texts_go_to_the_bins_that_the_plan_of_many_steps_counts_with(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 60, rng.integers(12, 80))
    cut = cut_step(lengths, world_size=3, num_micro_batches=2)
    got = sorted(int(lengths[batch].sum()) for of_rank in cut for batch in of_rank)
    want = sorted(fill_bins(lengths[None].astype(np.int64), 6)[1][0].tolist())
    assert got == want
    assert sorted(np.concatenate([batch for of_rank in cut for batch in of_rank]).tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("times", [1, 2, 10])
def test_every_text_of_a_step_is_encoded_once_within_the_budget(
    data: ContrastData, world_size: int, times: int
) -> None:
    budget, steps = times * data.longest_text, 10
    plan = make_text_plan(
        data, seed=3, global_batch_size=12, world_size=world_size, token_budget=budget, total_steps=steps
    )
    for step in range(steps):
        epoch, place = divmod(step, 5)
        rows = epoch_order(60, 3, epoch)[12 * place : 12 * (place + 1)]  # the ranks do not enter
        members = []
        for rank in range(world_size):
            ranks = Ranks(rank, rank, world_size, torch.device("cpu"), None)
            ready = ContrastFeed(data, plan, ranks).step(step)
            assert ready.rows.tolist() == rows.tolist()
            assert len(ready.micro_batches) == plan.num_micro_batches
            assert all(sum(batch.texts.lengths) <= budget for batch in ready.micro_batches)
            assert ready.shares[rank].tolist() == np.concatenate(ready.members).tolist()
            members += [text for batch in ready.members for text in batch.tolist()]
        assert sorted(members) == list(range(len(ready.texts.ids)))
        assert len({ids.tobytes() for ids in ready.texts.ids}) == len(ready.texts.ids)


def test_a_budget_below_the_longest_text_and_too_few_rows_are_refused(data: ContrastData) -> None:
    keys = {"seed": 0, "world_size": 1, "total_steps": 5}
    with pytest.raises(InputError, match="is below the longest text"):
        make_text_plan(data, **keys, global_batch_size=12, token_budget=data.longest_text - 1)
    with pytest.raises(InputError, match="fewer than one global batch"):
        make_text_plan(data, **keys, global_batch_size=61, token_budget=10**6)
