"""The live panel: its parts by arithmetic, its look at two widths, and a terminal that is given back."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from anchor_cli.train.panel import Curve, State, clock, sparkline

RECORD = {
    "step": 12345, "epoch": 0.848, "train/loss": 1.5, "train/d2q_loss": 1.25, "train/q2d_loss": 2.5,
    "train/learning_rate": 3.2e-5, "train/grad_norm": 0.71, "perf/pairs_per_s": 812.3, "perf/tokens_per_s": 190123.4,
    "perf/mfu": 0.423, "perf/peak_memory_gb": 71.3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "width", "want"),
    [
        ([], 5, ""),
        ([1.0], 5, "▁"),
        ([2.0, 2.0, 2.0], 3, "▁▁▁"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, "▁▂▃▄▅▆▇█"),
        ([8.0, 0.0], 2, "█▁"),
        ([0.0, 2.0, 6.0, 8.0], 2, "▁█"),  # means of pairs: 1 and 7
        ([float("nan"), 1.0], 2, "▁▁"),
    ],
)
def test_sparkline(values: list[float], width: int, want: str) -> None:
    assert sparkline(values, width) == want


@pytest.mark.parametrize(
    ("seconds", "want"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3723, "1:02:03"), (90061, "1 d 1:01:01"), (-3, "0:00")],
)
def test_clock(seconds: float, want: str) -> None:
    assert clock(seconds) == want


def test_a_curve_spans_the_whole_run_in_bounded_memory() -> None:
    curve = Curve()
    for value in range(100_000):
        curve.add(float(value))
    assert len(curve.values) <= 512
    gaps = {b - a for a, b in zip(curve.values[:-1], curve.values[1:], strict=True)}
    assert len(gaps) == 1  # evenly thinned
    assert curve.values[0] < 200 and curve.values[-1] > 99_000


def state(**changes: object) -> State:
    subtitle = (
        "2 x NVIDIA H100 NVL, bfloat16, attention flash_attention_2, Liger, 128 pairs a step in 2 x 3 micro-batches"
    )
    made = State("kure-ko-en", subtitle, 0, 43662, total_memory_gb=94.0, eta_s=86_461.0)
    for step in range(40):
        made.learn({**RECORD, "step": 12305 + step, "train/d2q_loss": 3.0 - step / 20})
    made.learn({"step": 10000, "eval/avg/ndcg@10": 0.4711})
    made.learn({"step": 12000, "eval/avg/ndcg@10": 0.4632})
    made.learn(RECORD)
    made.checkpoint = "checkpoint-12000"
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def drawn(panel: State, width: int) -> list[str]:
    out = StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(panel)
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip("\n").splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_in_the_panel(width: int) -> None:
    lines = drawn(state(), width)
    assert {cell_len(line) for line in lines} == {width}
    text = "\n".join(lines)
    for part in ("kure-ko-en", "step 12,345/43,662", "28.3%", "epoch 0.85", "1 d 0:01:01", "1.2500", "2.5000",
                 "3.20e-05", "0.710", "812.3", "190,123", "42.3%", "71.3/94 GB", "0.4632 at 12,000",
                 "best 0.4711 at 10,000", "checkpoint-12000", "█", "▁"):  # fmt: skip
        assert part in text, part
    assert ("…" in lines[-1]) == (width == 80)  # what does not fit is cut, and seen to be


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_before_the_first_step(width: int) -> None:
    lines = drawn(State("new", "1 x cpu", 0, 10), width)
    assert {cell_len(line) for line in lines} == {width}
    assert "step 0/10" in "\n".join(lines) and "nothing yet" in "\n".join(lines)


def test_a_stop_is_announced() -> None:
    assert "SIGTERM: finishing" in drawn(state(notice=lambda: "SIGTERM: finishing this step, then saving"), 80)[-1]


RUN = """
import os, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace
import torch
from anchor_cli.processes.logs import rank_log
from anchor_cli.processes.signals import leave
from anchor_cli.train.watch import Watch
from anchor_cli.base.console import say, warn

folder = Path(sys.argv[1])
run = SimpleNamespace(
    folder=folder, last_step=3, total_steps=3, best=None, kernel="sdpa", liger=False,
    spec=SimpleNamespace(precision="float32"), settled=SimpleNamespace(first_step=0, checkpoint=None),
    plan=SimpleNamespace(num_rows=9, global_batch_size=3, num_micro_batches=1),
    ranks=SimpleNamespace(device=torch.device("cpu"), world_size=1))
record = {"epoch": 0.5, "train/loss": 1.5, "train/d2q_loss": 1.25, "train/q2d_loss": 2.5, "train/learning_rate": 3e-5,
    "train/grad_norm": 0.7, "perf/pairs_per_s": 8.0, "perf/tokens_per_s": 19.0, "perf/peak_memory_gb": 0.5}
with rank_log(folder, 0, redirected=False):
    watch = Watch(run, enabled=True)
    watch.begin()
    watch.logged({**record, "step": 1})
    warn("a warning of ours")
    os.write(2, b"a line from C\\n")
    warnings.warn("a warning of python")
    while "warning of python" not in (folder / "rank-0.log").read_text():
        time.sleep(0.1)
    time.sleep(1.0)  # on a loaded machine, from the log to the terminal
    watch.logged({**record, "step": 2})
    exec(sys.argv[2])
print("after the run", file=sys.stderr)
"""


def on_a_terminal(folder: Path, end: str, **env: str) -> tuple[str, int]:
    """What a terminal of 24 x 80 got, and the exit code."""
    master, slave = pty.openpty()
    os.set_blocking(master, True)
    got: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:
                return
            if not chunk:
                return
            got.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    whole = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", **env}
    command = [sys.executable, "-c", RUN, str(folder), end]
    done = subprocess.run(command, stdin=slave, stdout=slave, stderr=slave, env=whole, timeout=120)
    os.close(slave)
    reader.join(20)
    os.close(master)
    return b"".join(got).decode(errors="replace"), done.returncode


ENDS = {"close": "watch.close()", "error": "raise RuntimeError('broken')", "leave": "leave(75)", "exit": "sys.exit(3)"}


@pytest.mark.parametrize("end", ENDS)
def test_the_terminal_is_given_back(tmp_path: Path, end: str) -> None:
    got, code = on_a_terminal(tmp_path, ENDS[end])
    assert code == {"close": 0, "error": 1, "leave": 75, "exit": 3}[end]
    assert got.count("\x1b[?25l") > 0  # rich hides the cursor when it begins
    assert got.rfind("\x1b[?25h") > got.rfind("\x1b[?25l")
    assert "\x1b[?1049h" not in got  # no other screen that would swallow the history
    last_frame = got.rindex("╰")
    assert "\n" in got[last_frame:]  # what follows begins on a line of its own
    for said in ("a warning of ours", "a line from C", "a warning of python"):
        assert 0 < got.index(said) < last_frame
    assert (end == "close") == ("after the run" in got[last_frame:])
    log = (tmp_path / "rank-0.log").read_text()
    assert "a line from C" in log and "step 1/3" in log and "╭" not in log and "\x1b" not in log


def test_a_sigkill_leaves_a_visible_cursor(tmp_path: Path) -> None:
    got, _ = on_a_terminal(tmp_path, "os.kill(os.getpid(), 9)")
    assert got.rfind("\x1b[?25h") > got.rfind("\x1b[?25l")


def test_no_color(tmp_path: Path) -> None:
    plain, _ = on_a_terminal(tmp_path, "watch.close()", NO_COLOR="1")
    coloured, _ = on_a_terminal(tmp_path, "watch.close()")
    colour = re.compile(r"\x1b\[[0-9;]*(?<![0-9])(?:3[0-7]|9[0-7]|38)[0-9;]*m")
    assert "╭" in plain and not colour.search(plain)
    assert colour.search(coloured)
