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
from anchor_cli.model.packed import PairBatch
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
