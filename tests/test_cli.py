"""The command line as a whole: help that costs nothing, failures in words, exit codes, what the README promises."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from anchor_cli import __version__, cli
from anchor_cli.base import console
from anchor_cli.base.contract import TextContract, write_contract
from anchor_cli.base.errors import AnchorError, InputError, RunError, Stopped, nearest
from anchor_cli.spec.load import load_spec

REPOSITORY = Path(__file__).parents[1]
NAMES = [name for names in cli.COMMANDS.values() for name in names]
HEAVY = "torch transformers deepspeed datasets numpy pyarrow matplotlib wandb tokenizers pydantic".split()


def test_help_groups_commands_and_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom anchor_cli.cli import run\ncode = run(['--help'])\n"
        f"print('LOADED', sorted(set({HEAVY}) & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED [] 0"
    places = [done.stdout.index(f"\n{heading}:\n") for heading in cli.COMMANDS]
    assert places == sorted(places)
    assert [name for name in NAMES if not re.search(rf"^  {name}  ", done.stdout, re.MULTILINE)] == []


def test_a_wrong_name_is_answered_before_anything_heavy_is_loaded(tmp_path: Path) -> None:
    """torch and transformers take seconds to import."""
    wrong = ["eval nowhere", "export nowhere", "search nowhere corpus question", "checkpoints list nowhere",
             "report nowhere", "replay nowhere --step 1", "train nowhere.json", "plan nowhere.json",
             "verify-resume nowhere.json", "prepare nowhere.jsonl --out x",
             "mine nowhere.jsonl --model nowhere --out x", "mine nowhere.jsonl --model . --out x",
             "mine . --model . --corpus nowhere --out x",
             "mine . --model . --cross-encoder ./nowhere --out x"]  # fmt: skip
    (tmp_path / "config.json").write_text("{}")  # `.` is a model folder
    script = (
        f"import sys\nfrom anchor_cli.cli import run\nfor line in {wrong}:\n    code = run(line.split())\n"
        "    print(code, sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == ["2 []"] * len(wrong), done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"Usage: anchor {name}" in printed
    _, examples = printed.split("Examples:\n")
    assert [" ".join(line.split()) for line in examples.splitlines()] == [*cli.EXAMPLES[name]]
    command = typer.main.get_command(cli.app).get_command(None, name)  # type: ignore[attr-defined]
    for line in cli.EXAMPLES[name]:
        anchor, command_name, *rest = shlex.split(line)
        assert (anchor, command_name) == ("anchor", name)
        command.make_context(f"anchor {name}", rest, resilient_parsing=False)


@pytest.mark.parametrize(
    ("arguments", "code", "err"),
    [
        (["trian"], 2, "anchor: trian: no such command\n  did you mean anchor train?\n"),
        (["xyzzy"], 2, "anchor: xyzzy: no such command\n  anchor --help lists them\n"),
        (["spec", "--keyz"], 2, "anchor: No such option: --keyz (Possible options: --keys)\n"),
        (["init", "a", "b"], 2, "anchor: Got unexpected extra argument(s) (b)\n"),
        (["init", "--global-batch-size", "x"], 2, "anchor: Invalid value for '--global-batch-size': "),
        (["spec"], 2, "anchor: SPEC is missing, expected a spec file\n  anchor init writes one to start from\n"),
    ],
)
def test_wrong_usage(arguments: list[str], code: int, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == code
    said = capsys.readouterr()
    assert said.err.startswith(err)
    assert len(said.err.splitlines()) <= 2
    assert said.out == ""


def test_bare_anchor_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "Usage: anchor" in capsys.readouterr().out
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"anchor {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "err"),
    [
        (InputError("a.json: seed: wrong", "mend it"), 2, "anchor: a.json: seed: wrong\n  mend it\n"),
        (RunError("rank 3 died"), 1, "anchor: rank 3 died\n"),
        (Stopped("stopped at step 7"), 75, "anchor: stopped at step 7\n"),
        (KeyboardInterrupt(), 130, "anchor: stopped\n"),
        (ZeroDivisionError("[red]1/0[/red]\nmore"), 1, "anchor: ZeroDivisionError: [red]1/0[/red]\n  ANCHOR_DEBUG=1"),
    ],
)
def test_failures_become_words(
    error: BaseException, code: int, err: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("anchor_cli.spec.load.read_spec", fail)
    monkeypatch.delenv("ANCHOR_DEBUG", raising=False)
    assert cli.run(["spec", "x.json"]) == code
    said = capsys.readouterr().err
    assert said.startswith(err)
    assert "Traceback" not in said
    monkeypatch.setenv("ANCHOR_DEBUG", "1")
    assert cli.run(["spec", "x.json"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_errors_survive_the_way_between_processes() -> None:
    import pickle

    for kind in (AnchorError, InputError, RunError, Stopped):
        got = pickle.loads(pickle.dumps(kind("a", "b")))
        assert (type(got), got.message, got.hint, str(got)) == (kind, "a", "b", "a\nb")


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m anchor_cli.cli spec --keys | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("argument", "want"),
    [
        ("~/a b", "/home/otter/a b"),
        ("~", "/home/otter"),
        ("--out=~/x", "--out=/home/otter/x"),
        ("ko:~/beir", "ko:/home/otter/beir"),
        ("--data=en:~/beir", "--data=en:/home/otter/beir"),
        ("a/~/b", "a/~/b"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("--set", "--set"),
    ],
)
def test_a_tilde_is_the_home_folder_in_every_argument(
    argument: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/otter")
    taken: list[list[str]] = []
    monkeypatch.setattr(typer.main, "get_command", lambda _: SimpleNamespace(main=lambda args, **_: taken.append(args)))
    cli.run(["prepare", argument])
    assert taken == [["prepare", want]]


def test_init_writes_a_spec_that_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    assert cli.run(["init", str(path), "--data", "쌍.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"spec": str(path)}
    schema = json.loads(path.read_text(encoding="utf-8"))["$schema"]
    assert schema.startswith("./")  # no path of this host
    assert (tmp_path / schema).read_bytes() == (REPOSITORY / "docs/spec.schema.json").read_bytes()
    assert cli.run(["spec", str(path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["spec"]["dataset_file_path"] == "쌍.jsonl"
    assert shown["sources"]["d2q_weight"] == "default"
    assert cli.run(["init", str(path), "--data", "x"]) == 2
    assert capsys.readouterr().err.startswith(f"anchor: {path}: exists already\n")
    assert cli.run(["init", str(path), "--data", "x", "--force"]) == 0


def test_init_takes_the_texts_of_prepared_data(tmp_path: Path) -> None:
    """Else plan and train would refuse the spec that was just written: the data were made for another length."""
    instructions = {"*": "찾으세요", "en": "Find"}
    contract = TextContract(tokenizer_fingerprint="", max_seq_length=256, training_instructions=instructions)
    write_contract(tmp_path, contract)
    assert cli.run(["init", str(tmp_path / "run.json"), "--data", str(tmp_path)]) == 0
    spec = load_spec(tmp_path / "run.json")
    assert (spec.max_seq_length, spec.training_instructions) == (256, instructions)
    assert "text_template" not in json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("gpus", "options", "want"),
    [
        ([], [], "float32"),
        ([("NVIDIA H100 NVL", 94.0)], [], "bfloat16"),
        ([], ["--precision", "bfloat16"], "bfloat16"),
        ([("NVIDIA H100 NVL", 94.0)], ["--precision", "float32"], "float32"),
    ],
)
def test_init_looks_at_the_host(
    gpus: list[Any],
    options: list[str],
    want: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("anchor_cli.processes.gpus.local_gpus", lambda: gpus)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["init", "run.json", "--data", "data/pairs", *options]) == 0
    lines = capsys.readouterr().err
    assert ("no GPU here: precision float32" in lines) == (not gpus and not options)
    assert "data/pairs: not here yet; anchor prepare SOURCE… --spec run.json --out data/pairs makes it" in lines
    assert str(tmp_path) not in Path("run.json").read_text()
    assert cli.run(["spec", "run.json", "--json"]) == 0
    spec = json.loads(capsys.readouterr().out)["spec"]
    assert spec["precision"] == want and spec["deepspeed"] == ("zero2_bf16" if want == "bfloat16" else "zero2_fp32")


def test_a_spec_is_not_judged_by_a_number_of_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"train_batch_size": 128, "train_micro_batch_size_per_gpu": 32, "zero_optimization": {"stage": 2}}
    (tmp_path / "ds.json").write_text(json.dumps(config))  # 32 x 2 on 2 GPUs
    spec = {"model_name_or_path": "m", "dataset_file_path": "d", "deepspeed": "ds.json"}
    path, keys = tmp_path / "run.json", {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 2}
    path.write_text(json.dumps(spec | keys))
    assert cli.run(["spec", str(path)]) == 0
    capsys.readouterr()
    path.write_text(json.dumps(spec | keys | {"global_batch_size": 256}))  # the same on any number of GPUs
    assert cli.run(["spec", str(path)]) == 2
    assert "train_batch_size 128 contradicts the spec's global batch" in capsys.readouterr().err
    path.write_text(json.dumps(spec | keys | {"per_device_train_batch_size": 16}))
    assert cli.run(["spec", str(path)]) == 2
    assert "train_micro_batch_size_per_gpu 32 contradicts" in capsys.readouterr().err


def test_a_global_batch_hides_the_factors_that_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def rows(**keys: int) -> dict[str, str]:
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"model_name_or_path": "m", "dataset_file_path": "d"} | keys))
        assert cli.run(["spec", str(path)]) == 0
        cells = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
        return {key: " ".join(rest.split()) for key, rest in cells}

    alone = rows(global_batch_size=128)
    assert alone["global_batch_size"] == "128 file"
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        assert alone[key] == "- not used: global_batch_size"
    both = rows(global_batch_size=128, per_device_train_batch_size=16, gradient_accumulation_steps=4)
    assert both["per_device_train_batch_size"] == "16 file"
    assert rows()["per_device_train_batch_size"] == "32 default"


def test_init_asks_only_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err == "anchor: --data is missing, expected a prepared folder or a raw source\n"
    assert cli.run(["init", str(tmp_path / "a.json"), "--data", "x", "--global-batch-size", "0"]) == 2
    assert not (tmp_path / "a.json").exists()


def test_a_result_is_all_there_is_on_stdout_and_wide_letters_line_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "dataset_file_path": "한국어", "fp16": False, "tf32": True}))
    assert cli.run(["spec", str(path)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{path}: ignored, they mean nothing here: tf32\n"
    from rich.cells import cell_len

    lines = {line.split()[0]: line for line in said.out.splitlines() if line}
    places = {cell_len(lines[key].partition("  file")[0].rstrip()) for key in ("model_name_or_path",)}
    assert places == {len("per_device_train_batch_size") + 2 + len('"m"')}
    columns = [
        cell_len(line[: line.rindex(source)])
        for line, source in ((lines["dataset_file_path"], "file"), (lines["seed"], "default"))
    ]
    assert columns[0] == columns[1]


def test_no_color_and_no_terminal_mean_plain_text() -> None:
    for extra in ({}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}):
        done = subprocess.run(
            [sys.executable, "-m", "anchor_cli.cli", "trian"],
            capture_output=True,
            text=True,
            env={**os.environ, **extra},
        )
        assert done.returncode == 2
        assert "\x1b[3" not in done.stderr  # no colour


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}),
    ],
)
def test_the_allocator_is_set_before_torch_is_imported(given: dict[str, str], want: dict[str, str]) -> None:
    script = (
        "import os, sys, atexit\nsys.argv = ['anchor', '--version']\nfrom anchor_cli.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules, "
        "{key: value for key, value in os.environ.items() if 'ALLOC_CONF' in key}))\nmain()"
    )
    environment = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key} | given
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"False {want}"


def test_progress_without_a_terminal_is_lines_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 10.0, 15.0, 20.0, 21.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.progress("reading", total=1000) as bar:
        for _ in range(5):
            bar.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 200/1,000 rows, 20.0/s, 40 s left",
        "reading: 400/1,000 rows, 20.0/s, 30 s left",
    ]


@pytest.mark.parametrize(("seconds_each", "want"), [(0.1, False), (0.6, True)])
def test_a_bar_on_a_terminal_for_long_work_only(
    monkeypatch: pytest.MonkeyPatch, seconds_each: float, want: bool
) -> None:
    from rich.console import Console

    out = StringIO()
    monkeypatch.setattr(console, "screen", lambda: Console(file=out, force_terminal=True, width=100))
    clock = iter([seconds_each * number for number in range(4)])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with console.progress("reading", total=3, unit="files") as bar:
        for _ in range(3):
            bar.advance()
    assert ("3/3 files 1.7/s" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())) == want
    assert bool(out.getvalue()) == want


def test_readme_commands_exist() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\s*(?:\$ )?anchor ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named
    assert named <= set(NAMES)
    targets = set(re.findall(r"^\s*(?:\$ )?make ([a-z][a-z-]*)", text, re.MULTILINE))
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "want"),
    [("lerning_rate", "learning_rate"), ("SEED", "seed"), ("save-steps", "save_steps"), ("zzz", None)],
)
def test_nearest(name: str, want: str | None) -> None:
    assert nearest(name, ["learning_rate", "seed", "save_steps"]) == want


def test_shell_completion_knows_commands_and_options() -> None:
    for words, place, want in (("anchor tra", 1, "train"), ("anchor spec --k", 2, "--keys")):
        env = {**os.environ, "_ANCHOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
        command = [sys.executable, "-c", "from anchor_cli.cli import main; main()"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        assert done.stdout.split() == [want]


def test_the_generated_page_is_current() -> None:
    from anchor_cli import cli_docs

    assert (REPOSITORY / cli_docs.PAGE).read_text(encoding="utf-8") == cli_docs.page(), "run `make docs`"


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("checkpoints", "anchor checkpoints ACTION [RUN] [OPTIONS]"),
        ("prepare", "anchor prepare SOURCE... --out PATH [OPTIONS]"),
        ("eval", "anchor eval [CHECKPOINT]... [OPTIONS]"),
        ("replay", "anchor replay RUN --step N [OPTIONS]"),
        ("doctor", "anchor doctor [SPEC] [OPTIONS]"),
    ],
)
def test_usage_marks_what_may_be_left_out(command: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    from anchor_cli import cli_docs

    assert f"```text\n{usage}\n```" in cli_docs.page()
    assert cli.run([command, "--help"]) == 0  # the same words in the same brackets
    theirs = capsys.readouterr().out.splitlines()[0].replace("{", "").replace("}", "").split()[4:]
    assert theirs == [word for word in usage.split()[2:] if word not in ("--out", "PATH", "--step", "N", "[OPTIONS]")]


def test_defaults_of_zero_are_shown() -> None:
    from anchor_cli import cli_docs

    assert "| `--seed N` | Seed of the world, the weights and the order of rows. Default: `0`. |" in cli_docs.page()


def test_environment_variables_that_are_read_are_on_the_page() -> None:
    from anchor_cli import cli_docs

    code = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "anchor_cli").rglob("*.py"))
    read = set(re.findall(r'(?:environ(?:\.get|\.setdefault)?|env\.get|env)[(\[]\s*"([A-Z][A-Z_]+)"', code))
    read |= set(re.findall(r'"(ANCHOR_[A-Z_]+|HF_TOKEN)"', code))
    told = set(re.findall(r"[A-Z]+_?[A-Z_]+", " ".join(cli_docs.ENVIRONMENT)))
    set_for_others = set("DS_ACCELERATOR WANDB_SILENT TOKENIZERS_PARALLELISM ANCHOR_LAUNCHED PYTHONPATH USER".split())
    assert {name for name in read if not name.startswith("SLURM_")} - told - set_for_others == set()
    assert len(read) > 15


def test_an_encoding_that_lacks_characters_costs_these_characters_only() -> None:
    script = (
        "import sys; from anchor_cli import cli; from anchor_cli.base.console import print_json\n"
        "assert cli.run(['--version']) == 0\n"
        r"print('\ud55c \u2192 \uad6d'); print_json({'\uc9c8\ubb38': '\u2192'})"
    )
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    _, plain, *document = done.stdout.splitlines()
    assert plain == r"\ud55c -> \uad6d"
    assert json.loads("\n".join(document)) == {"질문": "→"}


@pytest.mark.slow
def test_a_wheel_brings_its_configs_and_schema(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)
    script = (
        "from anchor_cli.spec.deepspeed import configs_folder, load_ds_config\n"
        "from anchor_cli.cli import run\n"
        "load_ds_config('zero2_bf16', '/nowhere')\n"
        "print(configs_folder(), run(['init', 'a.json', '--data', 'x']))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=True)
    assert done.stdout == f"{tmp_path}/site/anchor_cli/_ds_configs 0\n"
    schema = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["$schema"]
    packaged = tmp_path / "site/anchor_cli/_spec.schema.json"
    assert (tmp_path / schema).read_bytes() == packaged.read_bytes(), "a copy beside the spec, wherever that goes"
