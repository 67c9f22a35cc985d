"""`anchor checkpoints`, the log that outlives a full disk, and what a failure is called."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from anchor_cli.base.errors import InputError, RunError
from anchor_cli.base.metric_names import EVAL_AVG_NDCG_10
from anchor_cli.base.runs import RunFolder
from anchor_cli.cli import run as anchor
from anchor_cli.processes import launch, watchdog
from anchor_cli.train.metrics_log import Appender, MetricsLog
from anchor_cli.train.saving import commit


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


def test_a_line_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    from anchor_cli.report.read import read_run

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "events.jsonl").write_text('{"time": 1.0, "step": 0, "event": "start"}\n{"time": 2.0, "st')
    log = Appender(tmp_path / "events.jsonl")
    log.append('{"time": 3.0, "step": 1, "event": "resume"}')
    log.close()
    assert [event.kind for event in read_run(tmp_path).events] == ["start", "resume"]
    again = Appender(tmp_path / "events.jsonl")
    again.close()
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 3  # a whole last line gets no blank one behind it


def test_tensorboard_hides_the_steps_that_are_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Event files of a run killed at step 3 and resumed at 2: TensorBoard itself reads each step once."""
    from anchor_cli.train.metrics_log import TensorboardTracker

    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = TensorboardTracker(tmp_path, first_step)
        for step in steps:
            tracker.log({"step": step, "train/loss": float(10 * first_step + step)})
        tracker.close()
        time.sleep(1.1)  # a file's name has the second it was begun
    read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from anchor_cli.train import saving

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "checkpoint-1")

    monkeypatch.setattr(saving, "save", lambda *_: None)
    monkeypatch.setattr(saving, "prune", fail)
    spec = SimpleNamespace(save_total_limit=1, save_steps=2.0)
    run = SimpleNamespace(folder=tmp_path, files=RunFolder(tmp_path), spec=spec, total_steps=4, checkpoint=None)
    checkpoints = saving.Checkpoints(run, MetricsLog(tmp_path, 0))  # type: ignore[arg-type]
    assert checkpoints.save(2)
    assert checkpoints.saved_step == 2
    assert "older checkpoints could not be removed" in capsys.readouterr().err


def test_a_run_is_not_stopped_before_where_it_is() -> None:
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.start import refuse_to_stop_before

    spec = RunSpec(model_name_or_path="m", dataset_file_path="d", stop_after_n_steps=4)
    refuse_to_stop_before(spec, Path("checkpoint-4"), 4)
    with pytest.raises(InputError, match="stop_after_n_steps: 4, but checkpoint-6 has 6 steps already"):
        refuse_to_stop_before(spec, Path("checkpoint-6"), 6)


def test_replay_takes_the_runs_own_deepspeed_config(tmp_path: Path) -> None:
    from anchor_cli.spec.spec import RunSpec
    from anchor_cli.train.replay import with_ds_config_for_one

    beside_the_spec = RunSpec(model_name_or_path="m", dataset_file_path="d", deepspeed="ours.json")
    for stage, want in ((2, str(tmp_path / "ds_config.json")), (3, "zero2_bf16")):
        (tmp_path / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        assert with_ds_config_for_one(beside_the_spec, tmp_path).deepspeed == want
    (tmp_path / "ds_config.json").unlink()
    old = beside_the_spec.model_copy(update={"deepspeed": "zero3_bf16"})
    assert with_ds_config_for_one(old, tmp_path).deepspeed == "zero2_bf16"


def test_more_processes_than_gpus_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from anchor_cli.train.deepspeed import start_processes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(InputError, match="local rank 1 has no GPU: this process sees 1"):
        start_processes()


def test_a_view_whose_terminal_is_gone_does_not_fail_the_run() -> None:
    from anchor_cli.train.live import Live

    def gone() -> None:
        raise OSError(errno.EIO, "Input/output error")

    view = Live.__new__(Live)
    view._progress = SimpleNamespace(stop=gone)  # type: ignore[assignment]
    view.close()
    assert view._progress is None


def test_a_tracker_that_never_ends_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    from anchor_cli.train.metrics_log import _close_within

    class Hanging:
        name = "wandb"

        def close(self) -> None:
            time.sleep(60)

    began = time.monotonic()
    _close_within(Hanging(), 0.1)
    assert time.monotonic() - began < 5
    assert "wandb did not end cleanly (it did not answer)" in capsys.readouterr().err


def ended(rank: int, code: int, *, at: float = 0.0, message: str = "boom", consequence: bool = False) -> launch.Ended:
    failure = watchdog.Failure(message, None, consequence, rank == 0, time=at) if code > 0 and message else None
    return launch.Ended(rank, 1000 + rank, code, failure)


@pytest.mark.parametrize(
    ("ends", "signals", "error", "says"),
    [
        ([ended(0, 0), ended(1, 0)], [], None, ""),
        (
            [ended(0, 1, at=1.0, message="lost", consequence=True), ended(1, -9)],
            [],
            RunError,
            "rank 1 (pid 1001)",
        ),
        (
            [ended(0, 1, at=1.0, message="lost", consequence=True), ended(2, 1, at=2.0)],
            [],
            RunError,
            "rank 2: boom",
        ),
        ([ended(1, 2, at=1.0, message="no data", consequence=True)], [], InputError, "rank 1: no data"),
        ([ended(0, 75, message=""), ended(1, 75, message="")], [15], SystemExit, "75"),
        ([ended(0, 75, message=""), ended(1, -15)], [15], SystemExit, "75"),  # before it had a handler
        ([ended(0, 2, message="wrong"), ended(1, 2, message="wrong", consequence=True)], [], SystemExit, "2"),
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


def test_starting_again_is_advised_only_where_it_helps() -> None:
    lost = ended(1, 1, message="rank 1 lost touch", consequence=True)
    full = launch.Ended(1, 11, 1, watchdog.Failure("rank 1 on a: out of GPU memory", "lower it"))
    see = "see logs/rank-1.log of the run"
    for end, want in (
        (ended(1, 1, message="ImportError: libcudart.so.13"), see),
        (ended(1, 3, message=""), see),
        (full, "lower it"),
        (lost, "run the same command again to continue"),
        (ended(1, -11), "run the same command again to continue"),
    ):
        with pytest.raises(RunError) as caught:
            launch.judge([end], [])
        assert caught.value.hint == want


def test_a_full_gpu_is_the_ranks_own_failure_with_its_own_remedy(tmp_path: Path) -> None:
    import torch

    from anchor_cli.train import worker

    files, dog = RunFolder(tmp_path), SimpleNamespace(stop=lambda: None)
    with (
        pytest.raises(RunError, match=r"rank 1 on .*: out of GPU memory with 9,216 tokens \(CUDA out of memory. Tried"),
        worker.failure_recorded(files, 1, dog),  # type: ignore[arg-type]
        worker.enough_memory(1, "with 9,216 tokens", "lower max_tokens_per_micro_batch"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    noted = watchdog.Failure.read(files.heartbeats, 1)
    assert noted is not None and not noted.consequence and not noted.by_all
    assert noted.hint == "lower max_tokens_per_micro_batch"
    assert launch.is_root_cause(launch.Ended(1, 11, 1, noted))


def test_what_follows_from_another_rank_is_told_from_what_does_not() -> None:
    for text in (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5123",
        "NCCL communicator was aborted on rank 1.",
        "Timed out waiting 1800000ms for recv operation to complete",
    ):
        assert watchdog.is_lost_peer(RuntimeError(text)), text
    for error in (RuntimeError("shape '[2, 3]' is invalid"), ValueError("gloo"), MemoryError()):
        assert not watchdog.is_lost_peer(error), error


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
