"""The walkthrough works from the repository alone: its commands run one after the other, and its Python too."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ANCHOR_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


def command_of(line: str) -> list[str]:
    program, *rest = shlex.split(line)
    starts = {"anchor": [sys.executable, "-m", "anchor_cli"], "python": [sys.executable]}
    return [*starts[program], *(str(ROOT / word) if word.startswith("examples/") else word for word in rest)]


def test_the_world_is_made_and_prepared(tmp_path: Path) -> None:
    run([sys.executable, str(ROOT / "examples" / "tiny_world.py"), "world", "--documents", "12"], tmp_path)
    assert (tmp_path / "world" / "model" / "model.safetensors").is_file()
    for language in ("ko", "en"):
        assert (tmp_path / "world" / f"heldout-{language}" / "qrels" / "test.tsv").is_file()
    out = ["--out", "pairs", "--tokenizer", "world/model", "--max-seq-length", "64"]
    printed = run([sys.executable, "-m", "anchor_cli", "prepare", "world/train.jsonl", *out], tmp_path)
    assert re.search(r"^pairs: 60 pairs in ", printed, re.MULTILINE)


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    [spec] = re.findall(r"^```json\n(\{\n.*?\n\})\n```", PAGE, re.DOTALL | re.MULTILINE)
    (tmp_path / "spec.json").write_text(spec, encoding="utf-8")
    commands = re.findall(r"^\$ (.+)$", PAGE, re.MULTILINE)
    assert [command.split()[1] for command in commands[1:]] == ["prepare", "plan", "train", "eval", "export", "report"]
    printed = {command: run(command_of(command), tmp_path) for command in commands}
    assert re.search(r"^fingerprint f05f6c722fe70283;", printed[commands[1]], re.MULTILINE)  # as the page has it
    [program] = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    differences = re.findall(
        r"^(?:queries|documents) +(\S+)$", run([sys.executable, "-c", program], tmp_path), re.MULTILINE
    )
    assert len(differences) == 2 and max(map(float, differences)) < 1e-5
