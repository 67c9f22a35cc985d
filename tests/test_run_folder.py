"""Runs are remembered, and a checkpoint is found by name: in the last run, then below output folders seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchor_cli.base import checkpoints
from anchor_cli.base import runs as run_folder
from anchor_cli.base.errors import InputError
from anchor_cli.cli import run as anchor


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
    assert checkpoints.default_checkpoint("exporting", "anchor export") == run / "checkpoint-20"


SCORES = {  # step: eval/avg/ndcg@10, of checkpoints 10, 20, 30
    "rising": {0: 0.02, 10: 0.1, 20: 0.2, 30: 0.3},
    "a peak": {0: 0.02, 10: 0.1, 20: 0.3, 30: 0.25},
    "falling": {0: 0.02, 10: 0.129, 20: 0.08, 30: 0.069},
    "below the untrained model": {0: 0.5, 10: 0.1, 20: 0.3, 30: 0.25},
    "as good as the untrained model": {0: 0.3, 10: 0.1, 20: 0.3, 30: 0.25},
    "newest not evaluated": {10: 0.1, 20: 0.3},
    "one evaluation, of the newest": {30: 0.3},
    "one evaluation, not of the newest": {10: 0.3},
}


@pytest.mark.parametrize(
    ("case", "chosen", "line", "warnings"),
    [
        ("rising", 30, "0.3000, and the newest", []),
        ("a peak", 20, "0.3000; the newest, checkpoint-30, has 0.2500: anchor eval {run}/checkpoint-30", []),
        ("falling", 10, "0.1290; the newest, checkpoint-30, has 0.0690: anchor eval", ["first evaluation"]),
        ("below the untrained model", 20, "0.3000; the newest", ["the untrained model scored 0.5000"]),
        ("as good as the untrained model", 20, "0.3000; the newest", ["the untrained model scored 0.3000"]),
        ("newest not evaluated", 20, "0.3000; the newest, checkpoint-30, was not evaluated: anchor eval", []),
        ("one evaluation, of the newest", 30, "0.3000, and the newest", []),
        ("one evaluation, not of the newest", 10, "0.3000; the newest, checkpoint-30, was not evaluated", []),
    ],
)
@pytest.mark.parametrize("near_identical", [0.4, 0.9])
def test_the_default_is_said_with_both_scores_and_doubted_where_it_is_doubtful(
    case: str,
    chosen: int,
    line: str,
    warnings: list[str],
    near_identical: float,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "out" / "a", 10, 20, 30)
    with open(run / "metrics.jsonl", "w") as file:
        for step, score in SCORES[case].items():
            alike = near_identical if step == chosen else 0.0
            row = {"step": step, "eval/avg/ndcg@10": score, "eval/avg/near_identical": alike}
            file.write(json.dumps(row) + "\n")
    assert checkpoints.default_checkpoint("evaluating", "anchor eval") == run / f"checkpoint-{chosen}"
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(f"evaluating {run}/checkpoint-{chosen}: the best of the last run by eval/avg/ndcg@10, ")
    assert line.format(run=run) in first
    want = warnings + (["90% of the documents have a near-identical other one"] if near_identical > 0.5 else [])
    assert len(others) == len(want)
    for part, other in zip(want, others):
        assert other.startswith(f"warning: checkpoint-{chosen}: ") and part in other
    assert not warnings or others[0].endswith("(docs/evaluation.md)")


def test_runs_of_this_project_come_first(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours_with = make_run(tmp_path / "ours" / "out" / "a", 1)
    ours_without = make_run(tmp_path / "ours" / "out" / "died-at-start")
    theirs = make_run(tmp_path / "theirs" / "out" / "b", 2)
    for here, run, chosen in [
        (tmp_path / "ours", ours_without, ours_with / "checkpoint-1"),
        (ours_with / "checkpoint-1", ours_with, ours_with / "checkpoint-1"),  # inside the run
        (tmp_path / "theirs", theirs, theirs / "checkpoint-2"),
        (home, theirs, theirs / "checkpoint-2"),  # nothing here: the last one anywhere
    ]:
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        assert run_folder.last_run() == run, here
        assert checkpoints.default_checkpoint("exporting", "anchor export") == chosen, here
    assert "died-at-start, the last run, has no checkpoint yet" in capsys.readouterr().err
    assert run_folder.remembered_runs() == [theirs, ours_without, ours_with]
    (theirs / "checkpoint-2").rmdir()
    (ours_with / "checkpoint-1").rmdir()
    with pytest.raises(InputError, match="has no checkpoint yet, nor has any of the 2 before it"):
        checkpoints.default_checkpoint("exporting", "anchor export")


@pytest.mark.parametrize("command", ["export", "report", "checkpoints prune"])
def test_what_lies_elsewhere_is_written_only_by_name(
    command: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = make_run(tmp_path / "theirs" / "b", 1, 2)
    (theirs / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    before = sorted(theirs.rglob("*"))
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    arguments = [*command.split(), *(["--keep", "1"] if command == "checkpoints prune" else [])]
    assert anchor(arguments) == 2
    place = theirs / "checkpoint-2" if command == "export" else theirs
    message = capsys.readouterr().err
    assert f"{place} is outside the current directory, {tmp_path / 'mine'}" in message
    assert f"name it: anchor {command} {place}" in message
    for answer, code in [("n\n", 2), ("\n", 2), ("", 2), ("y\n", 0)]:
        if command == "export" and code == 0:
            continue  # there is no model here to export
        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda answer=answer: answer))
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert anchor(arguments) == code, answer
        assert (sorted(theirs.rglob("*")) == before) is (code != 0)
        monkeypatch.undo()
        monkeypatch.setenv("ANCHOR_HOME", str(home))
        monkeypatch.chdir(tmp_path / "mine")


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
