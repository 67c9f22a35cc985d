"""Raw data given to `anchor train`: prepared once, found again, prepared anew when they have changed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from faults.harness import write_world

from anchor_cli.base import hub
from anchor_cli.base.contract import NO_OTHERS, TextContract, with_line_breaks
from anchor_cli.base.errors import InputError
from anchor_cli.cli import run as anchor
from anchor_cli.commands.prepare import _instructions
from anchor_cli.data.pairs import MANIFEST
from anchor_cli.data.training_set import contract_for, prepare_command, prepare_raw, training_pairs
from anchor_cli.spec.spec import RunSpec

SPELT: list[dict[str, Any]] = [
    {},
    {"max_seq_length": 48, "instructions": {"ko": "문서를 찾아라; '바로'", "*": "find = it"}},
    {"text_template": "text:\n{text}<|im_end|>", "instructions": {"en": "Find"}},
]
CONTRACT = TextContract(tokenizer_fingerprint="f" * 64)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were prepared; nothing is tokenised."""
    folders: list[Path] = []

    def prepare(sources: list[str], out: Path, **_: Any) -> None:
        out.mkdir(parents=True)
        (out / MANIFEST).write_text("{}")
        folders.append(out)

    monkeypatch.setattr("anchor_cli.data.prepare.prepare.prepare", prepare)
    monkeypatch.setattr("anchor_cli.data.training_set.contract_for", lambda _: CONTRACT)
    return folders


def data_of(source: str, out: Path) -> Path:
    spec = RunSpec(model_name_or_path="m", dataset_file_path=source, output_dir=str(out))
    return prepare_raw(spec)


@pytest.mark.parametrize("source", ["a.jsonl", "*.jsonl", "", "**/?.jsonl"])
def test_changed_files_are_prepared_anew(source: str, made: list[Path], tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    (raw / "a.jsonl").write_text("1\n")
    first = data_of(str(raw / source), out)
    assert data_of(str(raw / source), out) == first
    assert made == [first] and first.parent == out / "prepared"
    (raw / "a.jsonl").write_text("1\n2\n")
    second = data_of(str(raw / source), out)
    assert made == [first, second] and first != second
    assert not set("*?[]") & set(first.name)
    if source != "a.jsonl":
        (raw / "b.jsonl").write_text("3\n")
        assert data_of(str(raw / source), out) not in (first, second)


def test_a_pattern_that_matches_nothing_is_an_error(made: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file matches"):
        data_of(str(tmp_path / "*.jsonl"), tmp_path / "out")
    with pytest.raises(InputError, match="org/pairs: no such file or folder") as caught:
        data_of("org/pairs", tmp_path / "out")
    assert "hf://org/pairs" in str(caught.value.hint)
    assert made == []


def test_a_hub_set_is_prepared_anew_for_each_revision(
    made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_revisions", {"org/pairs": "1" * 40})
    first = data_of("hf://org/pairs", tmp_path)
    assert data_of("hf://org/pairs", tmp_path) == first
    monkeypatch.setattr(hub, "_revisions", {"org/pairs": "2" * 40})
    second = data_of("hf://org/pairs", tmp_path)
    assert made == [first, second] and first != second
    monkeypatch.setattr(hub, "_revisions", {"org/pairs": None, "org/other": None})  # the Hub cannot be asked
    assert data_of("hf://org/pairs", tmp_path) == second
    assert "the Hub cannot be asked; taking what was prepared last" in capsys.readouterr().err
    other = data_of("hf://org/other", tmp_path)
    assert made == [first, second, other]


@pytest.mark.parametrize("keys", SPELT)
def test_a_rank_refuses_raw_data_with_the_line_that_prepares_them(
    small_model: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    """The line is typed as it stands; then the same spec is trained on what it made."""
    folder = tmp_path / "with a space"
    folder.mkdir()
    write_world(folder)
    spec = RunSpec.model_validate(
        {"model_name_or_path": str(small_model), "dataset_file_path": str(folder / "pairs.jsonl"),
         "output_dir": str(folder / "out"), **keys}
    )  # fmt: skip
    contract = contract_for(spec)
    with pytest.raises(InputError, match=r"pairs\.jsonl: raw data") as caught:
        training_pairs(spec, contract)
    assert caught.value.hint is not None
    command, *arguments = shlex.split(caught.value.hint.removeprefix("prepare them once: "))
    assert command == "anchor" and anchor(arguments) == 0
    elsewhere = spec.model_copy(update={"output_dir": str(tmp_path / "launcher")})
    prepare_raw(elsewhere)  # what anchor train makes by itself
    assert training_pairs(spec, contract).fingerprint == training_pairs(elsewhere, contract).fingerprint


@pytest.mark.parametrize(
    "instructions",
    [{"eng_Latn": "Find", "zh-TW": "找", "korean": "찾기"}, {"한국어": "a=b", "*": "query=c"}, {"en": "", "*": ""}],
)
def test_the_line_that_prepares_says_every_language(instructions: dict[str, str], tmp_path: Path) -> None:
    """Whatever a language is called, and whatever an instruction looks like."""
    spec = RunSpec(model_name_or_path="m", dataset_file_path="d", instructions=instructions)
    words = shlex.split(prepare_command(spec, tmp_path))
    typed = [words[place + 1] for place, word in enumerate(words) if word == "--instruction"]
    assert (NO_OTHERS in typed) is ("*" not in instructions)
    assert _instructions([with_line_breaks(text) for text in typed if text != NO_OTHERS]) == instructions


def test_an_instruction_typed_by_hand() -> None:
    assert _instructions(["Find = it", "en=a=b"]) == {"*": "Find = it", "en": "a=b"}
    assert _instructions(["*=query=b"]) == {"*": "query=b"}
    with pytest.raises(InputError, match="two for all other languages"):
        _instructions(["Find it", "*=Look"])
    with pytest.raises(InputError, match="two for en"):
        _instructions(["en=Find it", "en=Look"])


@pytest.mark.parametrize("output", ["output", "."])
def test_a_folder_that_holds_the_output_is_prepared_once(output: str, small_model: Path, tmp_path: Path) -> None:
    """What the run writes below its data does not make them other data."""
    folder = tmp_path / "project"
    folder.mkdir()
    write_world(folder)
    spec = RunSpec(model_name_or_path=str(small_model), dataset_file_path=str(folder), max_seq_length=64,
                   output_dir=str(folder / output))  # fmt: skip
    (folder / "spec.json").unlink(missing_ok=True)
    prepared = prepare_raw(spec)
    assert training_pairs(spec, contract_for(spec)).folder == prepared == prepare_raw(spec)
