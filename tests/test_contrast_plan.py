"""`anchor plan` of Stage II: counted on rows that are there, and KURE's recipe by arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchor_cli.cli import run as anchor
from anchor_cli.data.prepare.prepare import Options, prepare


def test_stage_2_is_planned_by_texts(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw and prepared rows with two negatives each; and KURE's recipe: blocks of 2,048 rows x 8 documents, 2 cards."""
    rows = [{"anchor": f"q {n}", "positive": f"p {n}", "negatives": [f"a {n}", f"b {n}"]} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "out", tokenizer=small_model, options=Options(negatives=True))
    for data in ("rows.jsonl", "out"):
        spec = {"stage": "II", "model_name_or_path": str(small_model), "dataset_file_path": str(tmp_path / data)}
        (tmp_path / "spec.json").write_text(json.dumps({**spec, "global_batch_size": 10, "in_batch_negatives": "none"}))
        assert anchor(["plan", str(tmp_path / "spec.json"), "--gpu", "h100-nvl", "--json"]) in (0, 2)
        got = json.loads(capsys.readouterr().out)["contrast"]
        assert (got["mean_negatives"], got["texts_per_step"], got["candidates"]) == (2.0, 40, 3)
    kure = "train_configs/stage_II/Qwen3_0.6b_kure.json"
    anchor(["plan", kure, "--set", "model_name_or_path=Qwen/Qwen3-0.6B", "--gpu", "h100-nvl", "--num-gpus", "2",
          "--rows", "1517624", "--json"])  # fmt: skip
    made = json.loads(capsys.readouterr().out)
    got = made["contrast"]
    assert got["block_rows"] == 2048 and got["candidates"] == 2048 * 8 and got["texts_per_step"] == 4096 * 9
    assert got["gathered_bytes"] == 4 * 4096 * 9 * 1024 / 2  # half of the texts are the other card's
    assert got["loss_tflop"] == pytest.approx(6 * 4096 * 16384 * 1024 / 1e12)
    assert got["encoded_again"] == 1 - 1 / made["cut"]["micro_batches_per_step"] > 0.5
    assert made["memory"]["total"] < 0.9 * 94 * 2**30
