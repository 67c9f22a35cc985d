"""Runs are remembered, and a checkpoint is found by name: in the last run, then below output folders seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anchor_cli.base import checkpoints
from anchor_cli.base import runs as run_folder
from anchor_cli.base.errors import InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANCHOR_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def make_run(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.remember_run(folder)
    return folder


def test_checkpoints_are_in_the_order_of_steps(home: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "out" / "a", 1000, 200, 30)
    (run / ".checkpoint-40.partial-7").mkdir()  # being written
    (run / "checkpoint-x").mkdir()
    (run / "checkpoint-50").write_text("a file")
    got = [checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(run)]
    assert got == [30, 200, 1000]
    assert checkpoints.newest_checkpoint(run) == run / "checkpoint-1000"
    assert checkpoints.newest_checkpoint(tmp_path) is None


def test_the_best_checkpoint_is_the_one_that_is_still_there(home: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "out" / "a", 10, 20, 30)
    assert checkpoints.best_checkpoint(run) is None
    scores = {5: 0.9, 10: 0.2, 20: 0.6, 30: 0.5}
    lines = [json.dumps({"step": step, "eval/avg/ndcg@10": score}) for step, score in scores.items()]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 40, "eval/avg/nd']))  # cut by a crash
    assert checkpoints.best_checkpoint(run) == run / "checkpoint-20"  # 5 has been deleted
    assert checkpoints.default_checkpoint("exporting") == run / "checkpoint-20"


def test_a_name_is_looked_for_in_the_last_run_first(home: Path, tmp_path: Path) -> None:
    old = make_run(tmp_path / "out" / "old", 10, 20)
    new = make_run(tmp_path / "out" / "new", 10)
    far = make_run(tmp_path / "far" / "run", 99)
    run_folder.remember_run(new)
    assert run_folder.last_run() == new
    assert run_folder.remembered_runs() == [new, far, old]
    assert checkpoints.find_checkpoint("checkpoint-10") == new / "checkpoint-10"
    assert checkpoints.find_checkpoint("checkpoint-20") == old / "checkpoint-20"
    assert checkpoints.find_checkpoint("checkpoint-99") == far / "checkpoint-99"
    assert checkpoints.find_checkpoint("old/checkpoint-10") == old / "checkpoint-10"
    assert checkpoints.find_checkpoint(old / "checkpoint-10") == old / "checkpoint-10"


def test_a_sibling_of_a_remembered_run_is_found(home: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "out" / "mine")
    (tmp_path / "out" / "theirs" / "checkpoint-7").mkdir(parents=True)
    assert checkpoints.find_checkpoint("checkpoint-7") == tmp_path / "out" / "theirs" / "checkpoint-7"


def test_ambiguous_names_are_listed_and_not_guessed(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / "out" / name, 10)
    make_run(tmp_path / "out" / "last")
    with pytest.raises(InputError) as error:
        checkpoints.find_checkpoint("checkpoint-10")
    out = tmp_path / "out"
    assert error.value.message == (
        f"checkpoint-10: several runs have one: {out}/a/checkpoint-10, {out}/b/checkpoint-10"
    )
    assert error.value.hint == "name one of them by its path"


def test_what_is_not_there_is_said_with_the_nearest_name(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        checkpoints.find_checkpoint("checkpoint-10")
    assert error.value.message == "checkpoint-10: no such folder, and no run is remembered"
    with pytest.raises(InputError, match="no run is remembered in"):
        run_folder.last_run()
    run = make_run(tmp_path / "out" / "a", 2000)
    with pytest.raises(InputError) as error:
        checkpoints.find_checkpoint("checkpiont-2000")
    assert error.value.message == (
        f"checkpiont-2000: no such folder, nor a checkpoint of that name below {tmp_path}/out"
    )
    assert error.value.hint == "did you mean checkpoint-2000? the last run has checkpoint-2000"
    (run / "a-file").write_text("")
    with pytest.raises(InputError, match="is a file, expected a model folder"):
        checkpoints.find_checkpoint(run / "a-file")


def test_ours_is_told_by_files_and_not_by_a_name_alone(tmp_path: Path) -> None:
    for name, files, want in [
        ("checkpoint-7", ["training_state.json"], True),
        ("checkpoint-8", ["anchor.json"], True),  # damaged, but of ours
        ("step", ["training_state.json"], True),
        ("export", ["anchor.json", "config.json"], False),  # an export has no training state to be whole by
        ("checkpoint-9", ["config.json", "model.safetensors"], False),  # another trainer's
    ]:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        assert checkpoints.is_ours(tmp_path / name) is want, name


def test_a_home_that_cannot_be_written_is_no_reason_to_fail(home: Path, tmp_path: Path) -> None:
    home.write_text("a file where the folder should be")
    run_folder.remember_run(tmp_path)
    assert home.read_text() == "a file where the folder should be"
