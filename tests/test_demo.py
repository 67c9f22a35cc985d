"""`anchor demo`: the whole path in small; chance; what it refuses. The full demo's score is the slow test."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anchor_cli.base.errors import InputError
from anchor_cli.commands.demo import next_commands, show
from anchor_cli.demo.demo import Outcome, Recipe, StageTwo, run_demo


def anchor(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ANCHOR_HOME": str(home), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "anchor_cli", *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("stages", [[], pytest.param(["--stage2"], marks=pytest.mark.slow)], ids=["I", "I and II"])
def test_the_whole_path_in_small(tmp_path: Path, stages: list[str]) -> None:
    out = tmp_path / "demo"
    size = ["--steps", "3", "--documents", "24"]
    done = anchor("demo", *stages, "--out", str(out), *size, "--json", home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got == json.loads((out / "demo.json").read_text("utf-8"))
    assert set(got["after"]["results"]) == {"ko/heldout-ko", "en/heldout-en"} == set(got["before"]["results"])
    assert (out / "run" / "checkpoint-3" / "model.safetensors").is_file()
    assert (out / "export" / "modules.json").is_file() and (out / "export" / "parity.json").is_file()
    steps = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps[-1]["step"] == 3 and any("eval/avg/ndcg@10" in line for line in steps)
    assert "What to type next" in done.stderr and "held-out questions, 24 documents" in done.stderr
    assert ("stage2" in got) == bool(stages)
    if not stages:
        return
    two = got["stage2"]
    assert two["rows"] == 120 and 0 < two["negatives"] <= 4 * 120
    assert set(two["after"]["results"]) == set(got["after"]["results"])
    spec = json.loads((out / "stage2.json").read_text("utf-8"))
    assert spec["stage"] == "II" and spec["model_name_or_path"] == str(out / "run" / "checkpoint-3")
    assert "after contrastive training (Stage II)" in (out / "export" / "README.md").read_text("utf-8")
    assert "mining.html" in done.stderr


def test_the_table_has_a_column_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    before, after, last = ({"results": {}, "avg": {"ndcg@10": score}} for score in (0.1, 0.2, 0.3))
    outcome = Outcome(Recipe(), Path("demo"), Path("demo/run/checkpoint-7"), ["demo/world/beir-ko"], before, after)
    show(outcome, on_stderr=False)
    plain = capsys.readouterr().out
    outcome.stage_two = StageTwo(Path("demo/stage2/checkpoint-1"), last, 2, 8)
    show(outcome, on_stderr=False)
    both = capsys.readouterr().out
    assert re.search(r"before . +after ", plain) and re.search(r"0\.100 . +0\.200 .\n", plain)
    assert re.search(r"before . Stage I . Stage II ", both) and re.search(r"0\.100 . +0\.200 . +0\.300 .\n", both)
    assert "8 hard negatives for 2 rows" in both and "anchor eval checkpoint-1" in both


def test_what_to_type_next_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` leaves `anchor` in .venv/bin, which is on nobody's PATH yet."""
    venv = tmp_path / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").touch()
    (venv / "anchor").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(venv / "python"))
    scores = {"results": {}, "avg": {}}
    outcome = Outcome(Recipe(), Path("demo"), Path("demo/run/checkpoint-7"), ["demo/world/beir-ko"], scores, scores)
    monkeypatch.setenv("PATH", "/nowhere")
    first, *rest = next_commands(outcome)
    assert first == "source .venv/bin/activate"
    monkeypatch.setenv("PATH", str(venv))
    assert next_commands(outcome) == rest
    assert all(command.startswith("anchor ") for command in rest)


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and was not made by anchor demo"):
        run_demo(tmp_path, Recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_chance_is_what_random_orders_get() -> None:
    outcome = Outcome(Recipe(num_documents=40), Path(), Path(), [], {}, {})
    ranks = np.random.default_rng(0).integers(1, 41, size=200_000)  # of the right document in a random order
    want = np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean()
    assert outcome.chance == pytest.approx(want, rel=0.02)


@pytest.mark.slow
def test_held_out_questions_are_answered(tmp_path: Path) -> None:
    """From chance to at least 0.8 among 400 documents; Stage II improves on it. Some minutes on two cores."""
    outcome = run_demo(tmp_path / "demo", Recipe(seed=3), stage_two=True, export=False)
    assert outcome.before["avg"]["ndcg@10"] < 0.15
    assert outcome.after["avg"]["ndcg@10"] >= 0.8
    assert outcome.stage_two is not None
    assert outcome.stage_two.after["avg"]["ndcg@10"] > outcome.after["avg"]["ndcg@10"]
