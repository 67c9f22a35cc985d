"""`anchor checkpoints`, the log that outlives a full disk, and what a failure is called."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest

from anchor_cli.commands.cli import run as anchor
from anchor_cli.engine import launch, watchdog
from anchor_cli.engine.checkpoint import commit
from anchor_cli.engine.metrics_log import Appender, MetricsLog
from anchor_cli.words.errors import InputError, RunError
from anchor_cli.words.metric_names import EVAL_AVG_NDCG_10


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    """Checkpoints 2, 4, 6, 8 of a run; 4 is the best; one bit of 8 has changed; 6 lacks a file."""
    for step in (2, 4, 6, 8):
        partial = tmp_path / f".checkpoint-{step}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"weights" * 1000)
        (partial / "config.json").write_text("{}")
        commit(partial, tmp_path / f"checkpoint-{step}")
    scores = {2: 0.3, 4: 0.5, 6: 0.4}
    lines = [json.dumps({"step": step, EVAL_AVG_NDCG_10: score}) for step, score in scores.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    changed = bytearray((tmp_path / "checkpoint-8/model.safetensors").read_bytes())
    changed[77] ^= 4
    (tmp_path / "checkpoint-8/model.safetensors").write_bytes(changed)
    (tmp_path / "checkpoint-6/config.json").unlink()
    return tmp_path


def test_list_compares_sizes_and_verify_reads_every_byte(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert anchor(["checkpoints", "list", str(run), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(one["step"], one["whole"], one["best"]) for one in listed] == [
        (2, True, False), (4, True, True), (6, False, False), (8, True, False),
    ]  # fmt: skip
    assert listed[1]["ndcg"] == 0.5 and listed[3]["ndcg"] is None
    assert anchor(["checkpoints", "verify", str(run)]) == 1
    said = capsys.readouterr().err
    assert "damaged: checkpoint-6, checkpoint-8" in said
    assert "config.json is missing" in said and "model.safetensors was changed after it was written" in said


def test_prune_says_and_does_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anchor(["checkpoints", "prune", str(run)]) == 2  # no --keep, no save_total_limit
    assert "--keep N" in capsys.readouterr().err
    assert anchor(["checkpoints", "prune", str(run), "--keep", "1", "--dry-run"]) == 0
    lines = capsys.readouterr().err.splitlines()
    would = [line.rpartition("/")[2] for line in lines if line.startswith("would remove")]
    assert len(list(run.glob("checkpoint-*"))) == 4
    assert anchor(["checkpoints", "prune", str(run), "--keep", "1"]) == 0
    gone = [line.rpartition("/")[2] for line in capsys.readouterr().err.splitlines() if line.startswith("removed")]
    assert gone == would == ["checkpoint-6", "checkpoint-8", "checkpoint-2"]  # damaged first; 4 is best and last whole
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_folder_that_is_not_there_is_exit_2(tmp_path: Path) -> None:
    assert anchor(["checkpoints", "list", str(tmp_path / "nowhere")]) == 2


def test_lines_that_a_full_disk_does_not_take_are_written_later_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class FullDisk:
        """Takes 5 bytes of every write, and nothing while it is full."""

        def __init__(self, file: object) -> None:
            self.file, self.full = file, False

        def write(self, data: bytes) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data[:5])  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    log = Appender(tmp_path / "lines")
    disk = log._file = FullDisk(log._file)  # type: ignore[assignment]
    log.append("first line")
    disk.full = True
    log.append("second line")
    log.append("third line")
    with pytest.raises(OSError, match="No space left"):
        log.flushed_bytes()  # so no checkpoint claims a log that is not there
    assert capsys.readouterr().err.count("kept in memory") == 1
    disk.full = False
    log.append("fourth line")
    assert log.flushed_bytes() == (tmp_path / "lines").stat().st_size
    log.close()
    assert (tmp_path / "lines").read_text() == "first line\nsecond line\nthird line\nfourth line\n"


def test_a_resumed_log_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, keep_bytes=0)
    log.write({"step": 1})
    kept = log.flushed_bytes()
    log.write({"step": 2})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "tra')  # killed while writing
    log = MetricsLog(tmp_path, keep_bytes=kept)
    log.write({"step": 2})
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_a_tracker_that_never_ends_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    from anchor_cli.engine.metrics_log import _close_within

    class Hanging:
        name = "wandb"

        def close(self) -> None:
            time.sleep(60)

    began = time.monotonic()
    _close_within(Hanging(), 0.1)
    assert time.monotonic() - began < 5
    assert "wandb did not end cleanly (it did not answer)" in capsys.readouterr().err


def ended(rank: int, code: int, *, at: float = 0.0, message: str = "boom", followed: bool = False) -> launch.Ended:
    failure = watchdog.Failure(at, message, None, followed, rank == 0) if code > 0 and message else None
    return launch.Ended(rank, 1000 + rank, code, failure)


@pytest.mark.parametrize(
    ("ends", "signals", "error", "says"),
    [
        ([ended(0, 0), ended(1, 0)], [], None, ""),
        ([ended(0, 1, at=1.0, message="lost touch", followed=True), ended(1, -9)], [], RunError, "rank 1 (pid 1001)"),
        ([ended(0, 1, at=1.0, message="lost touch", followed=True), ended(2, 1, at=2.0)], [], RunError, "rank 2: boom"),
        ([ended(1, 2, at=1.0, message="no data", followed=True)], [], InputError, "rank 1: no data"),
        ([ended(0, 75, message=""), ended(1, 75, message="")], [15], SystemExit, "75"),
        ([ended(0, 75, message=""), ended(1, -15)], [15], SystemExit, "75"),  # before it had a handler
        ([ended(0, 2, message="wrong"), ended(1, 2, message="wrong", followed=True)], [], SystemExit, "2"),
        ([ended(1, -7)], [], RunError, "SIGBUS"),
    ],
)
def test_the_first_cause_is_told(
    ends: list[launch.Ended], signals: list[int], error: type[BaseException] | None, says: str
) -> None:
    if error is None:
        launch.judge(ends, signals)
        return
    with pytest.raises(error) as caught:
        launch.judge(ends, signals)
    assert says in str(caught.value)


def test_what_follows_from_another_rank_is_told_from_what_does_not() -> None:
    for text in (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5123",
        "NCCL communicator was aborted on rank 1.",
        "Timed out waiting 1800000ms for recv operation to complete",
    ):
        assert watchdog.lost_peer(RuntimeError(text)), text
    for error in (RuntimeError("shape '[2, 3]' is invalid"), ValueError("gloo"), MemoryError()):
        assert not watchdog.lost_peer(error), error


def test_a_rank_that_stopped_beating_is_named(tmp_path: Path) -> None:
    now = time.time()
    for rank, alive in ((0, now), (1, now - 100)):
        state = {"rank": rank, "host": "node7", "pid": 5, "phase": "saving", "step": 12, "since": now - 40}
        state |= {"alive": alive}
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(state))
    said = watchdog.where_ranks_are(tmp_path)
    assert said == (
        "rank 0 on node7 (pid 5) in saving at step 12 for 40 s; "
        "rank 1 on node7 (pid 5) in saving at step 12 for 40 s, NOT RESPONDING for 100 s"
    )
