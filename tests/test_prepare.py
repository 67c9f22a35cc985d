"""The prepared folder: the same bytes for any number of processes, whole or absent, and true to the text."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_fixtures import AWKWARD, needs_shared, nfc, small_tokenizer, tokenizer_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO
from anchor_cli.base.errors import InputError
from anchor_cli.cli import run
from anchor_cli.data.pairs import PreparedPairs
from anchor_cli.data.prepare import keeper, workers
from anchor_cli.data.prepare import prepare as prepare_module
from anchor_cli.data.prepare.prepare import Options, prepare

__all__ = ["tokenizer_folder"]
REPOSITORY = Path(__file__).parents[1]
PREFIX, EOS = "<|im_start|>user\n", "<|im_end|>"


def write_rows(path: Path, num: int, seed: int = 0) -> Path:
    """Awkward texts, with duplicates and defects among them."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for index in range(num):
            query = f"{rng.choice(AWKWARD)} {rng.randrange(num)}"
            document = " ".join(rng.choices(AWKWARD, k=rng.randint(0, 12))) + ("" if index % 7 else str(index))
            line = json.dumps({"query": query, "document": document if index % 11 else index}) + "\n"
            file.write(line if index % 13 else 2 * line)
    return path


def same_folders(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


def test_the_same_bytes_whatever_num_proc(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "_SMALL_ROWS", 0)  # else so few rows stay in this process
    monkeypatch.setattr("anchor_cli.data.sources.files._BLOCK_BYTES", 20_000)  # many parts
    source = str(write_rows(tmp_path / "rows.jsonl", 900))
    for num in (1, 3):
        prepare([source], tmp_path / f"out-{num}", tokenizer=tokenizer_folder, num_proc=num, max_seq_length=40)
    manifest = json.loads((tmp_path / "out-1" / "prepare.json").read_text())
    assert {"duplicate_pair", "not_a_string"} <= set(manifest["counts"]["rejected"])
    assert same_folders(tmp_path / "out-1", tmp_path / "out-3")


def test_what_is_written_is_what_datasets_and_training_read(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 300)
    summary = prepare([str(source)], tmp_path / "out", tokenizer=tokenizer_folder, max_seq_length=40)
    theirs = datasets.load_from_disk(str(tmp_path / "out"))
    ours = PreparedPairs.open(tmp_path / "out")
    assert len(theirs) == len(ours) == summary.tally.num_kept
    queries, documents = ours.tokens(range(len(ours)))
    assert [ids.tolist() for ids in queries] == theirs["query_ids"][:]
    assert [ids.tolist() for ids in documents] == theirs["document_ids"][:]
    assert ours.query_lengths.tolist() == theirs["query_length"][:] == [len(ids) for ids in queries]
    eos = ours.contract.eos_token_id
    assert ours.document_inner_eos.tolist() == [int((ids[:-1] == eos).sum()) for ids in documents]
    assert ours.document_inner_eos.max() > 0
    assert (ours.fingerprint, ours.contract.max_seq_length) == (summary.fingerprint, 40)
    told = summary.as_dict()
    assert told["tokens"] == {"query": int(ours.query_lengths.sum()), "document": int(ours.document_lengths.sum())}
    source_rows = {json.loads(line)["query"] for line in source.read_text(encoding="utf-8").splitlines()}
    assert set(theirs["anchor"][:]) <= source_rows  # texts stay as they came
    again = prepare([str(tmp_path / "out")], tmp_path / "again", tokenizer=tokenizer_folder, max_seq_length=40)
    assert again.fingerprint == summary.fingerprint  # prepared data are a source too


PIECE = st.sampled_from([*AWKWARD, "otters ", "강 ", "\n", "x"]) | st.text(max_size=8)
PIECES = st.lists(PIECE, max_size=8).map("".join)
TEXTS = PIECES.filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12),
    names=st.sampled_from([("anchor", "positive"), ("질문", "문서"), ("a b", 'c,"d')]),
    max_seq_length=st.sampled_from([30, 48, 512]),
    training=st.sampled_from([None, {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN}, {"*": ""}]),
)
def test_fuzz_ids_decode_to_the_text_that_went_in(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    rows: list[tuple[str, str]],
    names: tuple[str, str],
    max_seq_length: int,
    training: dict[str, str] | None,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [json.dumps({names[0]: query, names[1]: document}) for query, document in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    try:
        prepare(
            [str(folder / "rows.jsonl")],
            folder / "out",
            tokenizer=tokenizer_folder,
            max_seq_length=max_seq_length,
            training_instructions=training,
            options=Options(query_column=names[0], document_column=names[1]),
        )
    except InputError as error:
        assert "no row is left" in error.message
        return
    pairs = PreparedPairs.open(folder / "out")
    tokenizer = small_tokenizer()
    rejected = (folder / "out" / "rejected.jsonl").read_text().splitlines()
    assert pairs.num_rows + len(rejected) == len(rows)
    for row in range(pairs.num_rows):
        query, document, language = pairs.texts(row)
        assert (query, document) in rows
        instruction = {**(training or {"*": INSTRUCTION_KO})}
        wanted = instruction.get(language, instruction.get("*", ""))
        head = f"{wanted}; " if wanted else ""
        (query_ids,), (document_ids,) = pairs.tokens([row])
        starts = pairs.query_content_starts[row], pairs.document_content_starts[row]
        for text, begin, ids, start in (
            (f"{head}{query}".strip(), head, query_ids, int(starts[0])),
            (document.strip(), "", document_ids, int(starts[1])),
        ):
            whole = tokenizer.encode(PREFIX + text + EOS, add_special_tokens=False)
            assert ids[-1] == pairs.contract.eos_token_id
            assert len(ids) == min(len(whole.ids), max_seq_length)
            assert ids[:-1].tolist() == whole.ids[: len(ids) - 1]
            if len(whole.ids) <= max_seq_length:
                decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
                assert decoded == nfc(PREFIX + text + EOS)
            boundary = len(PREFIX) + len(begin)  # characters before the content
            assert all(right <= boundary for _, right in whole.offsets[:start])
            assert all(right > boundary for _, right in whole.offsets[start : len(ids) - 1])
            assert start < len(ids) - 1


KILLED = """
import sys
from anchor_cli.data.prepare import prepare as module
module._SMALL_ROWS = 0
if __name__ == "__main__":
    print("begun", flush=True)
    module.prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], num_proc=int(sys.argv[4]))
"""


def kill_at_random_moments(tmp_path: Path, tokenizer_folder: Path, num_kills: int, num_rows: int) -> tuple[int, int]:
    """(runs killed, runs that were done before): after each, the folder is absent or whole."""
    source, out, script = write_rows(tmp_path / "rows.jsonl", num_rows), tmp_path / "out", tmp_path / "killed.py"
    script.write_text(KILLED)
    summary = prepare([str(source)], tmp_path / "want", tokenizer=tokenizer_folder)
    rng = random.Random(0)
    killed = done = attempt = 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    usual = None  # seconds; the first is not killed, and tells how long one takes
    while killed < num_kills and attempt <= 4 * num_kills:  # some end before their moment comes
        command = [sys.executable, str(script), str(source), str(out), str(tokenizer_folder), str(1 + attempt % 2)]
        attempt += 1
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # imported
        started = time.monotonic()
        try:
            process.wait(timeout=None if usual is None else rng.uniform(0.0, 1.1 * usual))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:
            assert process.returncode == 0
            usual = time.monotonic() - started  # of the last whole run: the longest may have been a busy moment
        if out.exists():
            done += 1
            assert PreparedPairs.open(out).fingerprint == summary.fingerprint
            assert same_folders(out, tmp_path / "want")
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        else:
            with pytest.raises(InputError):
                PreparedPairs.open(out)
        for left in tmp_path.glob(".out.partial-*"):  # what a killed run leaves does not look like prepared data
            with pytest.raises(InputError):
                PreparedPairs.open(left)
            if (left / "prepare.json").exists():  # killed between the last file and the rename
                assert same_folders(left, tmp_path / "want")
    prepare([str(source)], out, tokenizer=tokenizer_folder)
    assert same_folders(out, tmp_path / "want")
    assert not list(tmp_path.glob(".out.partial-*"))
    return killed, done


def test_the_folder_loads_only_when_nothing_is_missing(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def write_html(path: Path, *arguments: Any) -> None:
        with pytest.raises(InputError, match="not whole"):
            PreparedPairs.open(path.parent)
        with pytest.raises(FileNotFoundError):
            datasets.load_from_disk(path.parent)
        write_page(path, *arguments)

    def write_json(path: Path, content: Any) -> None:
        written.extend(file.name for file in path.parent.iterdir())
        write_manifest(path, content)

    write_page, write_manifest = keeper.write_html, keeper.write_json
    monkeypatch.setattr(keeper, "write_html", write_html)
    monkeypatch.setattr(keeper, "write_json", write_json)
    prepare([str(write_rows(tmp_path / "rows.jsonl", 50))], tmp_path / "out", tokenizer=tokenizer_folder)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*written, "prepare.json"} != set(written)


def test_killed_at_any_moment_it_leaves_nothing_or_all(tmp_path: Path, tokenizer_folder: Path) -> None:
    killed, _ = kill_at_random_moments(tmp_path, tokenizer_folder, num_kills=3, num_rows=1500)
    assert killed == 3


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path: Path, tokenizer_folder: Path) -> None:
    killed, done = kill_at_random_moments(tmp_path, tokenizer_folder, num_kills=20, num_rows=6000)
    print(f"killed {killed}, done before {done}")
    assert killed == 20 and done >= 1


def test_workers_end_with_a_killed_parent(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 30_000)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), str(tokenizer_folder), "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children: list[int] = []
    for _ in range(200):
        told = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = [int(child) for child in told.split()]
        if len(children) >= 3:  # two workers and multiprocessing's resource tracker
            break
        time.sleep(0.1)
    assert len(children) >= 3
    process.kill()
    process.wait()
    for _ in range(150):
        alive = [child for child in children if Path(f"/proc/{child}").exists() and not is_zombie(child)]
        if not alive:
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {alive}")


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_live_run_is_not_disturbed_and_an_old_one_is_cleared(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 30)
    live = tmp_path / f".out.partial-{os.getppid()}"
    live.mkdir()
    with pytest.raises(InputError, match=f"process {os.getppid()} is preparing it"):
        prepare([str(source)], tmp_path / "out", tokenizer=tokenizer_folder)
    live.rename(tmp_path / ".out.partial-4194305")  # above the highest process number of Linux
    other = tmp_path / ".out.partial-node7-4194305"
    other.mkdir()
    prepare([str(source)], tmp_path / "out", tokenizer=tokenizer_folder)
    said = capsys.readouterr().err
    assert ".out.partial-4194305: left by a run that was stopped; removed, starting over" in said
    assert f"{other}: begun by process 4194305 of node7; left untouched" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out", "rows.jsonl"]
    with pytest.raises(InputError, match="exists already"):
        prepare([str(source)], tmp_path / "out", tokenizer=tokenizer_folder)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", 30)
    command = ["prepare", str(source), "--tokenizer", str(tokenizer_folder), "--out"]
    assert run([*command, str(source / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-2].endswith("rows.jsonl: File exists")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("anchor_cli.data.prepare.shards._HashingFile.write", full)
    assert run([*command, str(tmp_path / "out")]) == 1
    message, remedy = capsys.readouterr().err.splitlines()[-2:]
    assert f"{tmp_path / 'out'}: the disk is full; nothing was written" in message
    assert "--out" in remedy
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    source = write_rows(tmp_path / "rows.jsonl", 200)
    common = ["prepare", str(source), "--tokenizer", str(tokenizer_folder), "--max-seq-length", "128"]
    assert run([*common, "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    for part in ("pairs in ", "216", "rejected", "not_a_string", "language ko", "> 128*", "document length, tokens"):
        assert part in said.err
    instructions = ["--instruction", "ko=질문", "--instruction", "Find"]
    assert run([*common, "--out", str(tmp_path / "b"), "--json", *instructions]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"]["in"] == 216  # 200, and every 13th twice
    assert told["rows"]["kept"] == sum(told["languages"].values()) == PreparedPairs.open(tmp_path / "b").num_rows
    assert PreparedPairs.open(tmp_path / "b").contract.training_instructions == {"ko": "질문", "*": "Find"}
    for side in ("query", "document"):
        assert sum(num for _, _, num in told["histogram"][side]) == told["rows"]["kept"]
    # one language's own instruction, as the hint says: rows of other languages stay, under theirs
    assert run([*common, "--out", str(tmp_path / "c"), "--json", "--instruction", "en=Find"]) == 0
    assert json.loads(capsys.readouterr().out)["languages"] == told["languages"]
    assert PreparedPairs.open(tmp_path / "c").contract.training_instructions == {"*": INSTRUCTION_KO, "en": "Find"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.jsonl", "--out", "out", "--query-column", "querry"], "no column 'querry'"),
        (["row.jsonl", "--out", "out"], "did you mean rows.jsonl?"),
        (["rows.jsonl", "--out", "rows.jsonl"], "exists already"),
        (["rows.jsonl", "--out", "out", "--weights", "a,b"], "--weights a,b: expected numbers"),
        (["rows.jsonl", "--out", "out", "--exclude", "nowhere"], "nowhere"),
        (["rows.jsonl", "--out", "out", "--tokenizer", "/nowhere"], "/nowhere: not found"),
        (["row.jsonl", "--out", "out", "--tokenizer", "/nowhere"], "row.jsonl: no such file"),
        (["rows.jsonl", "--out", "out", "--text-template", "{text}!"], "is not one special token"),
        (["nanobeir", "rows.jsonl", "--out", "out"], "stands alone"),
        (["rows.jsonl"], "Missing option '--out'"),
    ],
)
def test_wrong_usage_is_two_lines_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    tokenizer_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 5)
    if "--tokenizer" not in arguments:
        arguments = [*arguments, "--tokenizer", str(tokenizer_folder)]
    assert run(["prepare", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in "\n".join(said)
    assert len(said) <= 3
    assert "Traceback" not in "".join(said)


def test_nanobeir_is_a_snapshot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anchor_cli.data.benchmarks import benchmarks

    def snapshot(out: Path) -> dict[str, object]:
        out.mkdir()
        return {"sets": {"ko/NanoNQ": {"queries": 50, "documents": 5035}}}

    monkeypatch.setattr(benchmarks, "snapshot_nanobeir", snapshot)
    assert run(["prepare", "nanobeir", "--out", str(tmp_path / "nano"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["sets"]["ko/NanoNQ"]["documents"] == 5035
    assert f"anchor eval --data {tmp_path / 'nano'}" in said.err


@pytest.mark.parametrize("line_break", ["\n", r"\n"])
def test_line_breaks_of_template_and_instruction_survive_the_shell(
    line_break: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    source, out = write_rows(tmp_path / "rows.jsonl", 20), tmp_path / "out"
    template = f"<|im_start|>user{line_break}{{text}}<|im_end|>"
    options = ["--tokenizer", str(tokenizer_folder), "--text-template", template]
    options += ["--instruction", f"Instruct: find{line_break}Query: ", "--instruction", f"en=a{line_break}b"]
    assert run(["prepare", str(source), "--out", str(out), *options]) == 0
    contract = PreparedPairs.open(out).contract
    assert contract.text_template == "<|im_start|>user\n{text}<|im_end|>"
    assert contract.training_instructions == {"*": "Instruct: find\nQuery: ", "en": "a\nb"}


@pytest.mark.parametrize("place", ["RowMaker", "open_source", "load_tokenizer", "write_html"])
def test_the_rate_counts_work_on_rows_only(
    place: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"RowMaker": workers, "write_html": keeper}.get(place, prepare_module)
    ours = getattr(module, place)

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(1.0)
        return ours(*arguments, **options)

    monkeypatch.setattr(module, place, slowly)
    source = str(write_rows(tmp_path / "rows.jsonl", 200))
    summary = prepare([source], tmp_path / "out", tokenizer=tokenizer_folder)
    assert 0 < summary.rows_seconds < summary.seconds - 1.0
    assert summary.as_dict()["rows_per_s"] == round(summary.tally.num_in / summary.rows_seconds, 1)


def test_the_report_shows_template_content_and_eos(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = [{"query": f"<b> 수달 {index}?", "document": f"otters {index} & " + "강 " * 200} for index in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "out", tokenizer=tokenizer_folder, max_seq_length=100)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('<span class="t eos">&lt;|im_end|&gt;</span>') == 20  # ten rows, both sides
    assert "&lt;" in page and "&amp;" in page and "<b> " not in page
    assert "more tokens …" in page
    assert "<script" not in page and "http" not in page
    assert page.count("<rect") >= 2 and "max_seq_length 100" in page


@needs_shared
def test_the_real_rows_with_the_real_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    rows = datasets.load_from_disk(str(shared_data / "pairs" / "train_ko_en")).select(range(0, 9827, 60))
    rows.to_json(tmp_path / "rows.jsonl", force_ascii=False)
    summary = prepare([str(tmp_path / "rows.jsonl")], tmp_path / "out", tokenizer=shared_data / "tokenizer")
    told = summary.as_dict()
    assert told["rows"]["kept"] == 164
    # README of the shared data: documents of 510 tokens on average; template and [EOS] add 4
    assert 450 < told["lengths"]["document"]["mean"] < 580
    assert 30 < told["lengths"]["query"]["mean"] < 55  # 25, and 13 of the instruction, and 4
    assert PreparedPairs.open(tmp_path / "out").contract.eos_token_id == 151645
