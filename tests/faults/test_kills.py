"""kill -9 at random moments of every phase: the run that is started again each time ends bit for bit the same.

`PYTHONPATH=tests:. python tests/faults/test_kills.py MODEL KILLS RANKS` counts what docs/reliability.md shows.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from faults.harness import Started, assert_bitwise, descendants, fork_server, metrics, write_spec, write_world

PHASES = ("start-up", "start-up (data and checkpoint)", "step", "evaluation", "saving")
SPEC = {"max_steps": 24, "save_steps": 3, "eval_steps": 4, "save_total_limit": 2}


def await_own_phase(run: Path, started: Started, phase: str) -> bool:
    """Until this start says that it is in `phase`; False when it ended before."""
    own = started.pids[0]
    while started.server.wait(own, 0.0) is None:
        try:
            where = json.loads((run / "logs/where/rank-0.json").read_text())
        except (OSError, ValueError):
            where = {}
        if where.get("phase") == phase and where["pid"] in (own, *descendants(own)):
            return True
        time.sleep(0.002)
    return False


def kill_and_continue(
    folder: Path, model: Path, num_kills: int, seed: int, ranks: int = 1, **spec: Any
) -> Counter[str]:
    """Start one run again and again, killed each time, until it ends; as many runs as it takes. Kills by phase.

    With several ranks the launcher or one of them is killed, and the others must go.
    """
    rng = random.Random(seed)
    kills: Counter[str] = Counter()
    whole = folder / "out" / "whole"
    arguments = ["train", str(write_spec(folder, model, experiment_id="whole", **SPEC, **spec))]
    several = ["--nproc-per-node", str(ranks)] if ranks > 1 else []
    assert fork_server().run([*arguments, *several], folder)[0] == 0
    number = 0
    while sum(kills.values()) < num_kills:
        number += 1
        name = f"killed-{number}"
        run = folder / "out" / name
        arguments = ["train", str(write_spec(folder, model, experiment_id=name, **SPEC, **spec))]
        for _ in range(200):
            started = fork_server().start([*arguments, *several], folder)
            phase = rng.choice(PHASES)
            if sum(kills.values()) < num_kills and await_own_phase(run, started, phase):
                time.sleep(rng.uniform(0.0, 0.06))
                processes = [started.pids[0], *descendants(started.pids[0])]
                os.kill(rng.choice(processes), signal.SIGKILL)
            code = started.wait()
            if code == 0:
                break
            assert code == -signal.SIGKILL or "was killed by SIGKILL" in started.said, started.said
            kills[phase] += 1
        assert metrics(run) == metrics(whole)
        assert_bitwise(run / "checkpoint-24", whole / "checkpoint-24")
        left = [path.name for path in run.glob(".checkpoint*")]
        assert not left, left
    return kills


@pytest.mark.parametrize("precision", ["float32"])
def test_a_few_kills(small_model: Path, tmp_path: Path, precision: str) -> None:
    write_world(tmp_path)
    kills = kill_and_continue(tmp_path, small_model, 4, seed=int(time.time()) % 1000, precision=precision)
    assert sum(kills.values()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fifty_kills(small_model: Path, tmp_path: Path, precision: str) -> None:
    write_world(tmp_path)
    more = {"precision": precision, "deepspeed": "zero2_bf16" if precision == "bfloat16" else "zero2_fp32"}
    assert sum(kill_and_continue(tmp_path, small_model, 50, seed=0, **more).values()) == 50


def main() -> None:
    model, num_kills, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for precision, config in (("float32", "zero2_fp32"), ("bfloat16", "zero2_bf16")):
        with tempfile.TemporaryDirectory() as folder:
            write_world(Path(folder))
            kills = kill_and_continue(Path(folder), model, num_kills, 0, ranks, precision=precision, deepspeed=config)
            print(precision, ranks, dict(kills), flush=True)


if __name__ == "__main__":
    main()
