"""The prepared measurements of benchmarks/gpu run whole on a CPU, with tiny sizes (minutes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def dry(out: Path, *arguments: str) -> dict[str, dict[str, object]]:
    """Part -> its line."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/run.py", *arguments, "--dry", "--out", str(out)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert done.returncode == 0, [line for line in lines if "failed" in line]
    return {line["part"]: line for line in lines}


def test_a_part_prints_its_line_and_a_failing_one_loses_nothing(tmp_path: Path) -> None:
    found = dry(tmp_path / "gpu.jsonl", "one-card", "--only", "ceiling")
    assert list(found) == ["ceiling"] and "result" in found["ceiling"]


@pytest.mark.slow
def test_the_script_of_one_card_runs_whole(tmp_path: Path) -> None:
    found = dry(tmp_path / "gpu.jsonl", "one-card")
    assert list(found) == ["host", "ceiling", "attention", "output", "stock", "liger", "compile",
                           "large", "train", "padded", "curve", "encode"]  # fmt: skip
    assert found["curve"]["result"]["resumed_difference"] == 0  # type: ignore[index]
    assert found["train"]["result"]["as_is"]["exit"] == 0  # type: ignore[index]


@pytest.mark.slow
def test_the_script_of_two_cards_runs_whole(tmp_path: Path) -> None:
    found = dry(tmp_path / "gpu.jsonl", "two-cards")
    assert list(found) == ["zero2", "overlap", "zero1", "killed", "resume"]
    assert found["killed"]["result"]["exit"] not in (0, None)  # type: ignore[index]
