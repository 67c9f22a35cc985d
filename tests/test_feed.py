"""The thread that packs ahead, on a GPU host: seen from the calls that it makes."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from anchor_cli.data.batches import make_plan
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare.prepare import prepare
from anchor_cli.model.packed import PairBatch, Targets
from anchor_cli.plan.inputs import rows_of
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.stages.feed import Feed


def test_the_thread_works_for_its_own_gpu(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's current device is the first GPU, whatever the rank's is: it is set before memory is pinned."""
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"query": f"q {i}", "document": "d " * 9}) for i in range(8)))
    prepare([str(raw)], tmp_path / "data", tokenizer=str(small_model), max_seq_length=160)
    pairs = PreparedPairs.open(tmp_path / "data")
    plan = make_plan(
        pairs.query_lengths + pairs.document_lengths, seed=0, global_batch_size=4, world_size=1, token_budget=10**6,
        total_steps=2,
    )  # fmt: skip
    calls: list[tuple[str, str, torch.device | None]] = []

    def record(name: str, device: torch.device | None) -> None:
        calls.append((name, threading.current_thread().name.partition("_")[0], device))

    def pin(batch: PairBatch) -> PairBatch:
        record("pin", None)
        return batch

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: record("set", device))
    monkeypatch.setattr(PairBatch, "pin", pin)
    second = torch.device("cuda", 1)
    assert len(list(Feed(pairs, plan, 0, "text", second).steps(0, 2))) == 2
    assert calls == [("set", "feed", second), ("pin", "feed", None)] * 2
    calls.clear()
    list(Feed(pairs, plan, 0, "text", torch.device("cpu")).steps(0, 2))
    assert calls == []


@pytest.mark.parametrize("targets", ["text", "content"])
def test_the_normaliser_counts_what_is_packed_whatever_stands_before_a_text(
    small_model: Path, tmp_path: Path, targets: Targets
) -> None:
    """[EOS] in the template's head (a chat's system turn), in an instruction and in the text itself."""
    eos, system = "<|im_end|>", "<|im_start|>system\nYou help<|im_end|>\n<|im_start|>user\n"
    rows = [{"query": f"otter {index}", "document": f"river {eos * (index % 3)} reed"} for index in range(6)]
    rows.append({"query": f"find {eos}; !@#$%^&*()heron", "document": "!@#$%^&*()moss"})
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(map(json.dumps, rows)))
    template, instruction = system + "{text}" + eos, {"*": f"{eos}{eos} ask"}
    prepare([str(raw)], tmp_path / "data", tokenizer=str(small_model), max_seq_length=160, text_template=template,
            training_instructions=instruction)  # fmt: skip
    pairs = PreparedPairs.open(tmp_path / "data")
    plan = make_plan(
        pairs.query_lengths + pairs.document_lengths, seed=0, global_batch_size=7, world_size=1, token_budget=10**6,
        total_steps=1,
    )  # fmt: skip
    step = Feed(pairs, plan, 0, targets, torch.device("cpu")).step(0)
    (batch,) = step.micro_batches
    assert step.query_targets == batch.num_query_targets
    assert step.query_targets + step.document_targets == len(batch.target_ids)
    spec = RunSpec(
        model_name_or_path=str(small_model), dataset_file_path=str(tmp_path / "data"), text_template=template,
        instructions=instruction, reconstruction_targets=targets, max_seq_length=160,
    )  # fmt: skip
    exact, sampled = rows_of(spec, None), rows_of(spec.model_copy(update={"dataset_file_path": str(raw)}), None)
    assert exact.num_targets == sampled.num_targets == len(batch.target_ids)
