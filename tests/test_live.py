"""The live view: its parts by arithmetic, its look at two widths, and a terminal that is restored."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from anchor_cli.train.live import Live, RunProgress, clock, fit, measurements, stop_notice

if TYPE_CHECKING:
    from anchor_cli.train.run import Run

RECORD = {
    "step": 12345, "epoch": 0.848, "train/loss": 1.5, "train/d2q_loss": 1.25, "train/q2d_loss": 2.5,
    "train/learning_rate": 3.2e-5, "train/grad_norm": 0.71, "perf/pairs_per_s": 812.3, "perf/tokens_per_s": 190123.4,
    "perf/mfu": 0.423, "perf/peak_memory_gb": 71.3,
}  # fmt: skip
EXTRA = {"eval/avg/ndcg@10": 0.4711, "saved": 12000, "total_gb": 93.6}
SHORT = "loss D2Q 1.250 Q2D 2.500  lr 3.2e-05  nDCG@10 0.471  812.3 pairs/s  MFU 42.3%"
LONG = SHORT + "  norm 0.710  190,123 tokens/s  71.3/94 GB  saved 12,000"


@pytest.mark.parametrize(
    ("seconds", "want"),
    [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3723, "1:02:03"), (90061, "1 d 1:01:01"), (-3, "0:00")],
)
def test_clock(seconds: float, want: str) -> None:
    assert clock(seconds) == want


@pytest.mark.parametrize(("width", "want"), [(0, ""), (1, "a"), (3, "a"), (4, "a"), (5, "a  질"), (80, "a  질  b")])
def test_as_many_parts_as_fit_a_line(width: int, want: str) -> None:
    assert fit([Text("a"), Text("질"), Text("b")], width).plain == want  # 질 is two columns wide


def drawn(width: int, newest: dict[str, float], eta_s: float | None, notice: str | None = None) -> list[str]:
    out = StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    progress = RunProgress(console, "kure-ko-en", 0, 43662, newest, lambda: notice)
    if eta_s is not None:
        progress.reached(int(newest["step"]), eta_s)
    console.print(progress.get_renderable())
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).rstrip("\n").splitlines()


@pytest.mark.parametrize(("width", "numbers"), [(80, SHORT), (140, LONG)])
def test_two_lines_have_what_one_wants_to_know(width: int, numbers: str) -> None:
    bar, below = drawn(width, RECORD | EXTRA, 86_461.0)
    assert cell_len(bar) <= width
    for part in ("kure-ko-en", "━", "12345/43662", "28%", "0:00:0", "ETA 1 d 0:01:01"):
        assert part in bar, part
    assert below.rstrip() == numbers


def test_before_the_first_step() -> None:
    (bar,) = drawn(80, {}, None)
    assert "0/43662" in bar and bar.endswith("ETA …")


def test_what_was_not_measured_is_left_out() -> None:
    cpu = {key: value for key, value in RECORD.items() if key != "perf/mfu"}
    assert " ".join(part.plain for part in measurements(cpu)).count("MFU") == 0


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_stop_is_announced_to_its_last_word(signal_name: str, width: int) -> None:
    last = drawn(width, RECORD, 1.0, stop_notice(signal_name))[-1].rstrip()
    assert last.startswith(f"{signal_name}: finishing this step, then saving")
    assert last.endswith("unsaved") == (signal_name == "SIGINT")


@pytest.mark.parametrize(
    ("mean_cosine", "near_identical", "want"),
    [
        (0.9, 0.5, None),  # at the thresholds of docs/evaluation.md: not yet
        (0.91, 0.0, "mean cosine of two documents 0.910, above 0.9: the embeddings have collapsed"),
        (0.2, 0.51, "51% of the documents have a near-identical other one: the embeddings have collapsed"),
    ],
)
def test_a_collapse_is_warned_of(
    capsys: pytest.CaptureFixture[str], mean_cosine: float, near_identical: float, want: str | None
) -> None:
    scores = {"ndcg@10": 0.25, "mean_cosine": mean_cosine, "near_identical": near_identical}
    run = cast("Run", SimpleNamespace(best={"step": 5, "value": 0.5}))
    Live(run, enabled=True).evaluated(7, {f"eval/avg/{key}": value for key, value in scores.items()})
    evaluation, *warnings = capsys.readouterr().err.splitlines()
    assert evaluation == "evaluation at step 7: nDCG@10 0.2500"
    assert warnings == ([f"warning: step 7: {want}"] if want else [])


RUN = """
import os, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace
from anchor_cli.processes.logs import rank_log
from anchor_cli.processes.signals import leave
from anchor_cli.train.live import Live
from anchor_cli.base.console import say, warn

folder = Path(sys.argv[1])
run = SimpleNamespace(
    folder=folder, last_step=3, total_steps=3, best=None, kernel="sdpa", liger=False,
    spec=SimpleNamespace(precision="float32"), first_step=0, checkpoint=None,
    plan=SimpleNamespace(num_rows=9, global_batch_size=3, num_micro_batches=1),
    ranks=SimpleNamespace(device=SimpleNamespace(type="cpu"), world_size=1))
record = {"epoch": 0.5, "train/loss": 1.5, "train/d2q_loss": 1.25, "train/q2d_loss": 2.5, "train/learning_rate": 3e-5,
    "train/grad_norm": 0.7, "perf/pairs_per_s": 8.0, "perf/tokens_per_s": 19.0, "perf/peak_memory_gb": 0.5}
with rank_log(folder, 0, redirected=False):
    view = Live(run, enabled=True)
    view.begin()
    view.logged({**record, "step": 1})
    warn("a warning of ours")
    os.write(2, b"a line from C\\n")
    warnings.warn("a warning of python")
    while "warning of python" not in (folder / "rank-0.log").read_text():
        time.sleep(0.1)
    time.sleep(1.0)  # on a loaded machine, from the log to the terminal
    view.logged({**record, "step": 2})
    exec(sys.argv[2])
print("after the run", file=sys.stderr)
"""


def on_a_terminal(folder: Path, end: str, columns: int = 80, **env: str) -> tuple[str, int]:
    """What a terminal of 24 rows got, and the exit code. The process reads nothing, as a launched worker."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
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
    whole = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    whole |= {"TERM": "xterm-256color", **env}
    command = [sys.executable, "-c", RUN, str(folder), end]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave, env=whole, timeout=120, start_new_session=True
    )
    os.close(slave)
    reader.join(20)
    os.close(master)
    return b"".join(got).decode(errors="replace"), done.returncode


ENDS = {"close": "view.close()", "error": "raise RuntimeError('broken')", "leave": "leave(75)", "exit": "sys.exit(3)"}


@pytest.mark.parametrize("end", ENDS)
def test_the_terminal_is_restored(tmp_path: Path, end: str) -> None:
    got, code = on_a_terminal(tmp_path, ENDS[end])
    assert code == {"close": 0, "error": 1, "leave": 75, "exit": 3}[end]
    assert got.count("\x1b[?25l") > 0  # rich hides the cursor when it begins
    assert got.rfind("\x1b[?25h") > got.rfind("\x1b[?25l")
    assert "\x1b[?1049h" not in got  # no other screen that would swallow the history
    last_frame = got.rindex("━")
    assert "\n" in got[last_frame:]  # what follows begins on a line of its own
    for line in ("a warning of ours", "a line from C", "a warning of python"):
        assert 0 < got.index(line) < last_frame
    assert (end == "close") == ("after the run" in got[last_frame:])
    log = (tmp_path / "rank-0.log").read_text()
    assert "a line from C" in log and "step 1/3" in log and "━" not in log and "\x1b" not in log


@pytest.mark.parametrize("columns", [60, 140])
def test_a_launched_process_uses_the_whole_width_of_the_terminal(tmp_path: Path, columns: int) -> None:
    got, _ = on_a_terminal(tmp_path, "view.close()", columns)
    frames = re.findall(r"[^\r\n]*━[^\r\n]*", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", got))
    assert max(map(cell_len, frames)) == columns


@pytest.mark.parametrize("number", [9, 11])
def test_last_words_of_a_rank_that_dies_at_once(tmp_path: Path, number: int) -> None:
    words = "os.write(2, b'x' * 200_000 + b'\\nlast words\\n')"  # more than fits a pipe
    got, code = on_a_terminal(tmp_path, f"{words}; os.kill(os.getpid(), {number})")
    assert code == -number
    assert "last words" in got[got.rindex("━") :]
    assert got.count("x") >= 200_000
    assert (tmp_path / "rank-0.log").read_text().endswith("last words\n")
    assert got.rfind("\x1b[?25h") > got.rfind("\x1b[?25l")  # the cursor is visible


def test_no_color(tmp_path: Path) -> None:
    plain, _ = on_a_terminal(tmp_path, "view.close()", NO_COLOR="1")
    coloured, _ = on_a_terminal(tmp_path, "view.close()")
    colour = re.compile(r"\x1b\[[0-9;]*(?<![0-9])(?:3[0-7]|9[0-7]|38)[0-9;]*m")
    assert "━" in plain and not colour.search(plain)
    assert colour.search(coloured)
