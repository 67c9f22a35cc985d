"""Stage II under DeepSpeed: losses and gradients of every cut, rank count and ZeRO stage against one plain backward."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anchor_cli.data.prepare.prepare import Options, prepare

REPOSITORY = Path(__file__).parents[1]


def triples(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with 0 to 7 negatives; texts repeat within a step, queries have several positives."""
    rng = random.Random(seed)
    words = "otter river bird tree book moon 수달 강 나무 where live 어디에 사나요".split()
    texts = [" ".join(rng.choices(words, k=rng.randint(2, 30))) for _ in range(3 * num)]
    rows = []
    for row in range(num):
        query = f"question {row if row % 5 else 0} {texts[row if row % 5 else 0]}"
        negatives = rng.sample(texts, k=row % 8)
        positive = f"answer {row} {texts[num + row]}"
        scores = [round(rng.uniform(0.2, 1.0), 3) for _ in range(1 + len(negatives))]
        texts_of_row = {"anchor": query, "positive": positive, "negatives": negatives}
        rows.append({**texts_of_row, "scores": scores, "language": "ko" if row % 2 else "en"})
    return rows


@pytest.fixture(scope="session")
def prepared_triples(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 rows, a step of tests/contrast_worker.py."""
    folder = tmp_path_factory.mktemp("triples")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in triples(12)))
    options = Options(negatives=True, language_column="language")
    prepare([str(folder / "rows.jsonl")], folder / "out", tokenizer=small_model, max_seq_length=64, options=options)
    return folder / "out"


@pytest.fixture(scope="session")
def guide(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with other weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("guide") / "model"
    shutil.copytree(small_model, folder)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small_model)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("extent", ["quick", pytest.param("whole", marks=pytest.mark.slow)])
def test_every_cut_gives_the_gradient_of_one_plain_backward(
    extent: str, world_size: int, small_model: Path, guide: Path, prepared_triples: Path, tmp_path: Path
) -> None:
    """The reference is float64, transformers' own models, a text at a time, the loss a loop over pairs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    worker = [str(REPOSITORY / "tests/contrast_worker.py"), str(small_model), str(guide), str(prepared_triples)]
    done = subprocess.run(
        [*command, *worker, str(tmp_path / "cuts.json"), extent],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cuts = json.loads((tmp_path / "cuts.json").read_text())
    assert len(cuts) == (54 if extent == "whole" else 15)
    assert {one["micro_batches"] for one in cuts} >= {1} and len({one["micro_batches"] for one in cuts}) == 3
    for one in cuts:
        assert one["loss"] == pytest.approx(one["want"], rel=1e-5), one
        assert one["gradient"] < 1e-5, one
        if one["keys"] != "plain":
            assert 0.1 < one["dropped_by_margin_share"] < 0.9, one
