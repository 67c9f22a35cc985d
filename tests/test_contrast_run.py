"""Runs of Stage II by the commands: any end continues bit for bit, any number of ranks, replay, export, report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.harness import (
    assert_bitwise,
    environment,
    fork_server,
    largest_difference,
    metrics,
    write_spec,
    write_world,
)
from faults.test_kills import kill_and_continue
from test_contrast_engine import triples

from anchor_cli.base import metric_names as names
from anchor_cli.cli import run as anchor
from anchor_cli.train.verify_resume import difference

RECIPE = {
    "stage": "II",
    "temperature": 0.05,
    "negatives_group_size": 4,
    "margin_strategy": "absolute",
    "margin": -0.1,
    "hardness_mode": "explicit_negatives",
    "hardness_strength": 5.0,
    "matryoshka_dims": [32, 16],
    "max_tokens_per_micro_batch": 300,
}


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contrast")
    write_world(folder)
    (folder / "triples.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in triples(64)))
    return folder


def spec_of(folder: Path, model: Path, name: str, **changes: Any) -> Path:
    data = {"dataset_file_path": str(folder / "triples.jsonl"), "experiment_id": name}
    return write_spec(folder, model, **{**RECIPE, **data, **changes})


def train(folder: Path, model: Path, name: str, *, code: int = 0, ranks: int = 1, **more: Any) -> Path:
    die_at = more.pop("die_at", None)
    spec = spec_of(folder, model, name, **more)
    started = fork_server().start(["train", str(spec)], folder, ranks=ranks, die_at=die_at)
    assert started.wait(300) == code, started.said
    return folder / "out" / name


@pytest.fixture(scope="module")
def whole(folder: Path, small_model: Path) -> Path:
    """The uninterrupted float32 run of one process."""
    return train(folder, small_model, "whole")


def test_every_step_logs_what_the_positive_was_up_against(whole: Path) -> None:
    lines = [line for line in metrics(whole) if names.LOSS in line]
    assert len(lines) == 8
    for line in lines:
        assert {*names.CONTRAST_KEYS, names.LEARNING_RATE, names.GRAD_NORM} < set(line)
        assert names.D2Q_LOSS not in line
        assert 0 < line[names.DROPPED_SHARE] < 1 and line[names.TEMPERATURE] == 0.05
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "Accuracy of the positive" in page and "Dropped candidates" in page
    assert "Stage II report" in page and "nats per query" in page and "target token" not in page


def test_killed_in_a_step_and_in_a_save_it_ends_as_if_nothing_had_happened(
    folder: Path, small_model: Path, whole: Path
) -> None:
    for place in (("anchor_cli.train.stages.contrast:contrast_step", 4), ("anchor_cli.train.saving:os.rename", 1)):
        train(folder, small_model, "killed", die_at=place, code=-signal.SIGKILL)
    run = train(folder, small_model, "killed")
    assert metrics(run) == metrics(whole)
    assert difference(whole, run, 8).none  # what `anchor verify-resume` would say
    assert_bitwise(run / "checkpoint-8", whole / "checkpoint-8")


def test_two_ranks_then_one_then_two_change_rounding_only(folder: Path, small_model: Path, whole: Path) -> None:
    for ranks, end in ((2, 3), (1, 5), (2, 8)):
        run = train(folder, small_model, "elastic", ranks=ranks, stop_after_n_steps=end)
    ours, theirs = ([line[names.LOSS] for line in metrics(path) if names.LOSS in line] for path in (run, whole))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert largest_difference(run / "checkpoint-8", whole / "checkpoint-8") < 1e-4


def test_a_step_can_be_replayed(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "anchor_cli", "replay", str(whole), "--step", "3", "--json"]
    done = subprocess.run(command, env=environment(whole / "home"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    replayed = json.loads(done.stdout)
    want = next(line[names.LOSS] for line in metrics(whole) if line["step"] == 4)
    assert replayed["finite"] and len(replayed["micro_batches"]) > 1
    assert replayed["loss"] == pytest.approx(want, rel=1e-6)
    assert all(one["loss"] is None and one["grad_norm"] > 0 for one in replayed["micro_batches"])


def test_the_export_says_stage_2_and_which_dimensions_work_alone(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert anchor(["export", str(whole / "checkpoint-8"), "--stage2", "--out", str(tmp_path / "export")]) == 0
    printed = capsys.readouterr().err
    assert f"next: anchor eval {tmp_path / 'export'}" in printed and "next: Stage II" not in printed
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "after contrastive training (Stage II)" in card and "start of contrastive training" not in card
    assert "first 32, 16 numbers work alone" in card and "| temperature | 0.05 |" in card


def test_scores_of_a_teacher_are_needed_for_distillation(
    folder: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bare.jsonl").write_text((folder / "pairs.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    spec = spec_of(folder, small_model, "kd", kd_weight=1.0, dataset_file_path=str(folder / "bare.jsonl"))
    code, printed = fork_server().run(["train", str(spec)], folder)
    assert code == 2 and "has no teacher scores to learn from" in printed


@pytest.mark.slow
def test_twenty_kills(small_model: Path, tmp_path: Path) -> None:
    write_world(tmp_path)
    (tmp_path / "triples.jsonl").write_text("\n".join(json.dumps(row) for row in triples(64)))
    recipe = {**RECIPE, "dataset_file_path": str(tmp_path / "triples.jsonl")}
    assert sum(kill_and_continue(tmp_path, small_model, 20, seed=0, **recipe).values()) == 20
