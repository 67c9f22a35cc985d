"""Before the first step: data prepared once, nothing left of a refused start, any standard streams, any home."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.harness import Started, environment, fork_server, write_spec, write_world

from anchor_cli.base import streams
from anchor_cli.base.contract import on_one_line, with_line_breaks
from anchor_cli.spec.load import load_spec

PATIENCE_S = 600.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_world(tmp_path)
    return tmp_path


def train(folder: Path, model: Path, name: str, *arguments: str, **changes: Any) -> Started:
    spec = {"experiment_id": name, "max_steps": 1, "warmup_steps": 1, "eval_steps": 0, "save_steps": 0, **changes}
    return fork_server().start(["train", str(write_spec(folder, model, **spec)), *arguments], folder)


# -- two starts over one raw source ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["pairs.jsonl", "*.jsonl", "raw"])
def test_starts_over_one_raw_source_share_what_the_first_prepares(folder: Path, small_model: Path, source: str) -> None:
    """Three experiments at once, over a file, a pattern and a folder."""
    (folder / "raw").mkdir()
    (folder / "raw" / "a.jsonl").write_bytes((folder / "pairs.jsonl").read_bytes())
    data = {"dataset_file_path": str(folder / source)}
    runs = [train(folder, small_model, f"seed-{seed}", seed=seed, **data) for seed in range(3)]
    assert [run.wait(PATIENCE_S) for run in runs] == [0, 0, 0], [run.said for run in runs]
    assert sum(run.said.count("raw data; preparing it once") for run in runs) == 1
    assert len(list((folder / "out/prepared").iterdir())) == 1  # no lock and nothing unfinished stays


def test_a_killed_start_gives_the_preparation_to_the_next(folder: Path, small_model: Path) -> None:
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    many = [line.replace('": "', f'": "{copy} ') for copy in range(1500) for line in lines]
    (folder / "pairs.jsonl").write_text("\n".join(many) + "\n")
    first, second = (train(folder, small_model, f"seed-{seed}", seed=seed) for seed in range(2))
    end = time.monotonic() + PATIENCE_S
    while "waiting for that" not in first.said + second.said:
        assert time.monotonic() < end, first.said + second.said
        time.sleep(0.01)
    works, waits = (first, second) if "waiting for that" in second.said else (second, first)
    works.send(signal.SIGKILL)
    assert works.wait(PATIENCE_S) == -signal.SIGKILL
    assert waits.wait(PATIENCE_S) == 0, waits.said
    assert "raw data; preparing it once" in waits.said


# -- a start that is refused -------------------------------------------------------------------------------------------


REFUSED: dict[str, dict[str, Any]] = {
    "no data": {"dataset_file_path": "nothing.jsonl"},
    "no model": {"model_name_or_path": "/nowhere/model"},
    "no benchmark": {"eval_data": ["ko:/nowhere/beir"], "eval_steps": 1},
    "no batch": {"global_batch_size": 1000, "max_steps": -1},
}


@pytest.mark.parametrize("arguments", [(), ("--nproc-per-node", "2")], ids=["1 process", "2 processes"])
@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_start_leaves_no_empty_folder(
    folder: Path, small_model: Path, what: str, arguments: tuple[str, ...]
) -> None:
    place = {"output_dir": str(folder / "new" / "out"), **REFUSED[what]}
    run = train(folder, small_model, "run", *arguments, **place)
    assert run.wait(PATIENCE_S) == 2, run.said
    assert run.said.count("anchor: ") == 1
    left = {path.name for path in (folder / "new").rglob("*") if "prepared" not in path.parts}
    assert left <= {"out"}, left  # and that only with prepared data in it
    assert (folder / "new").exists() == (folder / "new/out/prepared").exists()


def test_a_refused_start_leaves_the_files_of_others(folder: Path, small_model: Path) -> None:
    (folder / "out/run").mkdir(parents=True)
    (folder / "out/run/notes.txt").write_text("mine")
    assert train(folder, small_model, "run", **REFUSED["no data"]).wait(PATIENCE_S) == 2
    assert (folder / "out/run/notes.txt").read_text() == "mine"


# -- texts typed in a shell --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "typed", "want"),
    [
        ("output_dir", "007", "007"),
        ("model_name_or_path", "123", "123"),
        ("deepspeed", "false", "false"),
        ("dataset_name", "[1]", "[1]"),
        ("run_name", "null", None),
        ("run_name", '"1e5"', "1e5"),
        ("seed", "7", 7),
        ("torch_compile", "true", True),
        ("text_template", r"ask:\n{text}<|im_end|>", "ask:\n{text}<|im_end|>"),
        ("text_template", r'"ask:\n{text}<|im_end|>"', "ask:\n{text}<|im_end|>"),
    ],
)
def test_set_takes_text_for_a_text_key(tmp_path: Path, key: str, typed: str, want: object) -> None:
    (tmp_path / "run.json").write_text('{"model_name_or_path": "m", "dataset_file_path": "d"}')
    assert getattr(load_spec(tmp_path / "run.json", [f"{key}={typed}"]), key) == want


@pytest.mark.parametrize("text", ["a\nb", "tab\there", "back\\slash", "\n\n", "", "한글\n{text}"])
def test_a_text_typed_on_one_line_is_read_as_it_was(text: str) -> None:
    assert "\n" not in on_one_line(text)
    assert with_line_breaks(on_one_line(text)) == text


@pytest.mark.parametrize(
    ("option", "key", "want"),
    [
        (("--text-template", r"ask:\n{text}<|im_end|>"), "text_template", "ask:\n{text}<|im_end|>"),
        (("--text-template", r"a\tb {text}<|im_end|>"), "text_template", "a\tb {text}<|im_end|>"),
        (("--instruction", r"one\ntwo"), "training_instructions", {"*": "one\ntwo"}),
    ],
)
def test_prepare_reads_a_backslash_n_as_a_new_line(
    folder: Path, small_model: Path, option: tuple[str, str], key: str, want: object
) -> None:
    from anchor_cli.cli import run

    out = folder / "prepared"
    arguments = ["prepare", str(folder / "pairs.jsonl"), "--out", str(out), "--tokenizer", str(small_model)]
    assert run([*arguments, *option, "--max-seq-length", "64"]) == 0
    assert json.loads((out / "anchor.json").read_text())[key] == want


# -- standard streams --------------------------------------------------------------------------------------------------


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """A command line under bash, `anchor` in it being this one."""
    whole = {**environment(folder / "home"), **env}
    line = line.replace("anchor ", f"{sys.executable} -m anchor_cli ")
    return subprocess.run(["bash", "-c", line], cwd=folder, env=whole, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("specs")
    spec = {"model_name_or_path": "m", "dataset_file_path": "d", "run_name": "질문 → 문서"}
    (folder / "run.json").write_text(json.dumps(spec))
    (folder / "run/logs").mkdir(parents=True)
    return folder


COMMANDS = ["spec run.json", "spec --keys", "--help", "spec nothing.json", "spec run.json --json", "spec --keys --json",
            "checkpoints list run --json"]  # fmt: skip
ONE_BY_ONE = """
import os, sys
from anchor_cli import cli
for command in sys.argv[1:]:
    code = cli.run(command.split())
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {code}", file=stream, flush=True)
"""


def one_by_one(folder: Path, commands: list[str], **env: str) -> list[tuple[bytes, bytes]]:
    """(stdout, stderr) of commands in one process, the exit code at the end of each."""
    whole = {**environment(folder / "home"), **env}
    line = [sys.executable, "-c", ONE_BY_ONE, *commands]
    done = subprocess.run(line, cwd=folder, env={k: v for k, v in whole.items() if v != "unset"}, capture_output=True)
    outs, errs = (re.findall(rb"(.*?=== \d+)\n", stream, flags=re.DOTALL) for stream in (done.stdout, done.stderr))
    assert len(outs) == len(errs) == len(commands), done.stderr
    return list(zip(outs, errs, strict=True))


@pytest.fixture(scope="module")
def in_utf_8(specs: Path) -> list[tuple[bytes, bytes]]:
    return one_by_one(specs, COMMANDS)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "euc-kr"])
def test_no_encoding_ends_a_command(specs: Path, in_utf_8: list[tuple[bytes, bytes]], encoding: str) -> None:
    poor = one_by_one(specs, COMMANDS, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    for command, (out, err), (plain, _) in zip(COMMANDS, poor, in_utf_8, strict=True):
        assert b"Error:" not in err, (command, err)
        assert len(out.splitlines()) == len(plain.splitlines()) and out[-5:] == plain[-5:]
        if command.endswith("--json"):
            got, want = (json.loads(text[:-5]) for text in (out.decode(encoding), plain.decode()))
            assert got == want


@pytest.mark.parametrize(
    ("line", "reason"),
    [("spec run.json --json >&-", "is closed"), ("spec run.json --json > /dev/full", "No space left on device"),
     ("spec --keys --json > /dev/full", "No space left on device"),
     ("checkpoints list run --json > /dev/full", "No space left on device"),
     ("checkpoints list run --json 1< /dev/null", "Bad file descriptor")],
)  # fmt: skip
def test_a_result_that_cannot_be_written_is_an_error_in_words(specs: Path, line: str, reason: str) -> None:
    done = shell(f"anchor {line}", specs)
    first, *rest = done.stderr.decode().splitlines()
    assert done.returncode == 1 and not rest, done.stderr
    assert first.startswith("anchor: standard output") and reason in first


@pytest.mark.parametrize(
    ("line", "code"),
    [("anchor --help > /dev/full", 1), ("anchor --version >&-", 0), ("anchor spec --keys > /dev/full", 1),
     ("anchor spec nothing.json 2>&-", 2), ("anchor spec nothing.json 2> /dev/full", 2),
     ("anchor spec nothing.json <&- >&- 2>&-", 2)],
)  # fmt: skip
def test_closed_and_full_streams_leave_the_exit_code(specs: Path, line: str, code: int) -> None:
    done = shell(line, specs)
    assert done.returncode == code and b"Traceback" not in done.stderr + done.stdout, done.stderr


def test_a_reader_that_has_gone_is_no_error_to_read_about(specs: Path) -> None:
    done = shell("anchor spec --keys | true; exit ${PIPESTATUS[0]}", specs)
    assert done.returncode in (0, 1, 141) and done.stderr == b""


# -- the home folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", ["/nonexistent/home", "/dev/null", "/proc/1", ""])
def test_a_home_of_no_use_is_one_without_runs(specs: Path, home: str) -> None:
    commands = ["checkpoints list", "report", "eval checkpoint-2", "export"]
    for _, err in one_by_one(specs, commands, HOME=home, ANCHOR_HOME="unset"):
        assert b"no run is remembered" in err and err.endswith(b"=== 2"), err


def no_account(uid: int) -> Any:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def taken(folder: Path) -> None:
    folder.symlink_to("/nonexistent")


@pytest.mark.parametrize("before", [lambda folder: None, lambda folder: folder.write_text("a file"), taken])
def test_a_user_without_home_and_account_gets_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key not in ("HOME", "USER")})
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    monkeypatch.setattr(streams.tempfile, "tempdir", str(tmp_path))
    before(tmp_path / f"anchor-{os.getuid()}")
    streams.prepare_home()
    home = Path(os.environ["HOME"])
    assert home.is_dir() and home.parent == tmp_path and home.stat().st_mode & 0o077 == 0
    assert os.environ["USER"] == f"uid-{os.getuid()}"


def test_a_home_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"HOME": "/data/kim", "USER": "kim"})
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    streams.prepare_home()
    assert os.environ == {"HOME": "/data/kim", "USER": "kim"}
