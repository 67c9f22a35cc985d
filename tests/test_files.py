"""Files are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from anchor_cli.base import files
from anchor_cli.base.contract import TextContract, differences, read_contract, write_contract
from anchor_cli.base.errors import InputError, RunError


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "result"
    with files.staged_folder(final) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a.txt").write_text("a")
        assert not final.exists()
        assert folder.parent == final.parent  # the same disk: a rename, not a copy
    assert (final / "below" / "a.txt").read_text() == "a"
    assert [path.name for path in final.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        with files.staged_folder(tmp_path / "result") as folder:
            (folder / "half").write_text("x")
            raise error
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_folder_under_the_name(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom anchor_cli.base.files import staged_folder\n"
        "with staged_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    print('written', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "result")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "result").exists()
    with files.staged_folder(tmp_path / "result") as folder:  # what the dead process left is not in the way
        (folder / "whole").write_text("x")
    assert [path.name for path in (tmp_path / "result").iterdir()] == ["whole"]


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(InputError, match="exists already"):
        with files.staged_folder(tmp_path / "result"):
            pytest.fail("must not be entered")
    with pytest.raises(InputError, match="appeared while"):
        with files.staged_folder(tmp_path / "other"):
            (tmp_path / "other").mkdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "result"]


def test_everything_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    flush, rename = os.fsync, os.rename

    def record_flush(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        flush(descriptor)

    def record_rename(one: Path, other: Path) -> None:
        done.append("rename")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", record_flush)
    monkeypatch.setattr(os, "rename", record_rename)
    with files.staged_folder(tmp_path / "result") as folder:
        (folder / "a").write_text("a")
    assert done == ["a", f".result.partial-{socket.gethostname()}-{os.getpid()}", "rename", tmp_path.name]


def test_a_process_that_nobody_has_reaped_is_dead(tmp_path: Path) -> None:
    """Killed, its exit code not asked for: in a container without an init process it stays so."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = tmp_path / f".data.partial-{files.this_host()}-{process.pid}"
    assert not files.is_abandoned(left)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and keeps its number
    os.kill(process.pid, 0)
    assert files.is_abandoned(left)
    process.communicate()
    assert files.is_abandoned(left)


def test_only_what_a_dead_process_of_this_host_left_is_abandoned(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above the highest process number of Linux
    here = socket.gethostname()
    for name, want in [
        (f".out.partial-{here}-{dead}", True),
        (f".out.partial-{here}-{os.getppid()}", False),
        (f".out.partial-node-7-{dead}", False),  # another node of a shared disk: nobody here can know
        (f".out.partial-{dead}", True),  # as an older version named it
        (f".out.partial-{os.getppid()}", False),
        ("out", False),
        (f".out.old-{dead}", False),
    ]:
        assert files.is_abandoned(tmp_path / name) is want, name
    assert files.writer_of(f".out.partial-node-7-{dead}") == ("node-7", dead)
    assert files.writer_of(files.partial_of(tmp_path / "out")) == (here, os.getpid())


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ENOSPC, RunError, "out: the disk is full; nothing was written"),
        (errno.EDQUOT, RunError, "out: the disk is full; nothing was written"),
        (errno.EROFS, InputError, "there: Read-only file system"),
        (errno.EACCES, InputError, "there: Permission denied"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_disk_errors_are_said_in_one_line(number: int, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        with files.words_for_disk_errors("out"):
            raise OSError(number, os.strerror(number), "there")
    assert said in str(caught.value)


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"나": 1, "가": [0.5]})
    assert path.read_text(encoding="utf-8") == '{\n  "나": 1,\n  "가": [\n    0.5\n  ]\n}\n'

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_json(path, {})
    assert json.loads(path.read_text(encoding="utf-8")) == {"나": 1, "가": [0.5]}
    assert [other.name for other in tmp_path.iterdir()] == ["a.json"]


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_sha256_and_free_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192  # 2 MiB, more than one block
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    status = os.statvfs(tmp_path)
    got = files.free_bytes(tmp_path / "not" / "there")
    assert abs(got - status.f_bavail * status.f_frsize) < 1 << 30


def test_the_text_contract_survives_its_file(tmp_path: Path) -> None:
    contract = TextContract(tokenizer_fingerprint="abc", training_instructions={"ko": "찾기"})
    write_contract(tmp_path, contract)
    assert read_contract(tmp_path) == contract
    other = contract.model_copy(update={"max_seq_length": 64})
    assert differences(contract, contract) == []
    assert differences(contract, other) == ["max_seq_length: 512 != 64"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "anchor.json: not found"),
        ("{", "anchor.json: Invalid JSON"),
        ('{"tokenizer_fingerprint": 1}', "anchor.json: tokenizer_fingerprint: Input should be a valid string"),
        ('{"tokenizer_fingerprint": "a", "x": 1}', "anchor.json: x: Extra inputs are not permitted"),
    ],
)
def test_a_broken_contract_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "anchor.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_contract(tmp_path)
    assert error.value.message.startswith(f"{tmp_path}/{message}")
