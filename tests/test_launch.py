"""Who a process is by its environment, what is kept of what it writes, and the ways to start that need no launcher."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.harness import Started, fork_server, losses, write_spec, write_world

from anchor_cli.base.errors import InputError
from anchor_cli.base.runs import RunFolder
from anchor_cli.processes import launch
from anchor_cli.processes import ranks as ranks_of
from anchor_cli.processes.watchdog import Failure

PATIENCE_S, END_S = 600.0, 60.0  # to start on a loaded machine; to end
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
POD = {"RANK": "1", "WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
SRUN_NODES = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
SALLOC = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}


@pytest.mark.parametrize(
    ("env", "ranks", "node"),
    [
        ({}, None, None),
        (TORCHRUN, (3, 1, 4), None),
        (POD, (1, 0, 2), (1, 2)),
        (SRUN, (5, 1, 8), None),
        (SRUN_NODES, (1, 0, 2), (1, 2)),
        (SALLOC, None, None),
        ({**SRUN, **TORCHRUN}, (3, 1, 4), None),  # torchrun started by srun: the inner launcher counts
    ],
)
def test_who_a_process_is(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], ranks: object, node: tuple[int, int] | None
) -> None:
    set_environment(monkeypatch, env)
    assert ranks_of.environment_ranks() == ranks
    assert ranks_of.as_node() == node


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "29400",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip


def set_environment(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    monkeypatch.setattr(os, "environ", dict(env))  # a copy: what is set there does not reach other tests


def test_processes_that_cannot_meet_are_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, SRUN)
    with pytest.raises(InputError, match="MASTER_ADDR is not set"):
        ranks_of.complete_rendezvous()


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({**SRUN, "MASTER_ADDR": "node0"}, ("node0", "20000")),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "free"}, ("127.0.0.1", "free")),  # one process meets nobody
        ({**SRUN, "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, ("node0", "29500")),
        ({**TORCHRUN, "WORLD_SIZE": "1"}, ("host", "29400")),  # the agent's store: elsewhere nobody would answer
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[03-05,09],cpu1", "SLURM_JOB_ID": "123456"}, ("gpu03", "23456")),
        ({**SRUN, "SLURM_STEP_NODELIST": "a,b", "SLURM_LAUNCH_NODE_IPADDR": "login"}, ("a", "20000")),
    ],
)
def test_where_processes_meet(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], want: tuple[str, str]) -> None:
    set_environment(monkeypatch, env)
    monkeypatch.setattr(ranks_of, "free_port", lambda: "free")
    ranks_of.complete_rendezvous()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == want


@pytest.mark.parametrize(
    ("nodes", "want"),
    [("", ""), ("node7", "node7"), ("n[5,7]", "n5"), ("r[1-2]n[3-4]-ib,x[1-9]", "r1n3-ib"), ("a-b[007-012]", "a-b007")],
)
def test_the_first_host_of_a_list(nodes: str, want: str) -> None:
    assert ranks_of.first_host(nodes) == want


def bare_workers(num: int) -> launch.Workers:
    """Without handlers of signals, which are the test process's own."""
    made = launch.Workers.__new__(launch.Workers)
    made.signals, made._num, made._processes, made._first_signal_s = [], num, [], 0.0
    return made


@pytest.mark.parametrize("by_all", [True, False])
def test_rank_0_may_finish_its_trackers_after_an_end_of_all_ranks(
    monkeypatch: pytest.MonkeyPatch, by_all: bool
) -> None:
    """After 0.5 s rank 0 ends too; a rank that only lost touch is explained by then, or not."""
    monkeypatch.setattr(launch, "_CAUSE_S", 0.1)
    one = launch.Ended(1, 11, 1, Failure("not finite", consequence=True, by_all=by_all))
    zero = launch.Ended(0, 10, 1, Failure("not finite", reported=True))
    workers, began = bare_workers(2), time.monotonic()
    monkeypatch.setattr(workers, "ended", lambda: [one, zero] if time.monotonic() > began + 0.5 else [one])
    assert workers.wait() == ([one, zero] if by_all else [one])
    from anchor_cli.processes.launch import CLOSE_S

    assert launch._BY_ALL_S > CLOSE_S


def test_a_second_ctrl_c_waits_for_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing a signal may interrupt is the main thread's own poll(), which holds Popen's lock."""
    workers = bare_workers(1)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    workers._processes, workers.signals = [process], [signal.SIGINT]
    left: list[int] = []
    monkeypatch.setattr(launch.os, "_exit", left.append)
    with process._waitpid_lock:  # type: ignore[attr-defined]
        thread = threading.Thread(target=workers._pass_on, args=(signal.SIGINT, None), daemon=True)
        thread.start()
        thread.join(5)
        assert left[:1] == [launch.AT_ONCE]
    assert process.wait(5) == -signal.SIGKILL


def test_a_launcher_touches_nothing_of_a_run_that_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = RunFolder(tmp_path).heartbeats
    where.mkdir(parents=True)
    (where / "rank-0.json").write_text("{}")
    monkeypatch.setattr(launch, "Workers", lambda *_: None)
    monkeypatch.setattr("anchor_cli.base.runs.LOCK_TIMEOUT_S", 0.3)
    with open(tmp_path / ".lock", "w") as lock:
        lock.write("process 7 on node7")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="is being trained already by process 7 on node7"):
            launch.launch(["train"], 2, tmp_path)
        assert (where / "rank-0.json").exists()
    launch.refuse_if_trained(tmp_path)


STOPS = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)  # CI may be under nohup
from anchor_cli.processes.signals import StopFlag
flag = StopFlag()
flag.install()
flag.poll_from_now_on()
os.kill(os.getpid(), signal.SIGHUP)
end = time.monotonic() + 10
while flag.signal_name is None and time.monotonic() < end and sys.argv[1] != "nohup":
    time.sleep(0.01)
print(flag.signal_name)
"""


@pytest.mark.parametrize(("how", "want"), [("ssh", "SIGHUP"), ("nohup", "None")])
def test_a_lost_terminal_stops_a_run_but_not_under_nohup(how: str, want: str) -> None:
    done = subprocess.run([sys.executable, "-c", STOPS, how], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, want), done.stderr


LAST_WORDS = """
import os, sys
from pathlib import Path
from anchor_cli.processes.logs import rank_log
with rank_log(Path(sys.argv[1]), int(sys.argv[2]), redirected=False):
    print("from python")
    os.write(2, b"from C\\n")
    subprocess = os.system("echo from a child")
    exec(sys.argv[3])
print("after", file=sys.stderr)
"""


def rank(folder: Path, number: int, end: str, *, log: str | None = None) -> subprocess.CompletedProcess[str]:
    if log:
        (folder / f"rank-{number}.log").symlink_to(log)
    command = [sys.executable, "-u", "-c", LAST_WORDS, str(folder), str(number), end]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_all_that_rank_0_writes_is_kept_and_goes_on(tmp_path: Path) -> None:
    done = rank(tmp_path, 0, "pass")
    want = ["from python", "from C", "from a child"]
    assert done.stderr.splitlines() == [*want, "after"]
    first, *rest = (tmp_path / "rank-0.log").read_text().splitlines()
    assert first.startswith("--- ") and "rank 0 on" in first
    assert rest == want


@pytest.mark.parametrize("end", ["os.abort()", "os.kill(os.getpid(), 9)", "os._exit(3)"])
def test_last_words_before_a_sudden_death_are_kept(tmp_path: Path, end: str) -> None:
    done = rank(tmp_path, 0, f"os.write(2, b'last words\\n'); {end}")
    assert done.returncode != 0
    assert done.stderr.endswith("last words\n")
    assert (tmp_path / "rank-0.log").read_text().endswith("last words\n")


def test_an_error_is_in_the_log_too(tmp_path: Path) -> None:
    done = rank(tmp_path, 0, "raise ValueError('what went wrong')")
    assert done.stderr.count("what went wrong") == 1  # said once, by python here
    log = (tmp_path / "rank-0.log").read_text()
    assert "Traceback" in log and log.rstrip().endswith("ValueError: what went wrong")


def test_a_full_disk_costs_lines_of_the_log_only(tmp_path: Path) -> None:
    done = rank(tmp_path, 0, "pass", log="/dev/full")
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["from python", "from C", "from a child", "after"]


def test_other_ranks_do_not_talk(tmp_path: Path) -> None:
    done = rank(tmp_path, 1, "pass")
    assert (done.stdout, done.stderr) == ("", "after\n")
    assert (tmp_path / "rank-1.log").read_text().splitlines()[1:] == ["from python", "from C", "from a child"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("launch")
    write_world(place)
    return place


def start(
    folder: Path, model: Path, name: str, envs: list[dict[str, str]], *arguments: str, **changes: object
) -> list[Started]:
    """`anchor train` once for each environment, on one spec."""
    base: dict[str, object] = {"experiment_id": name, "max_steps": 3, "eval_steps": 0, "save_steps": 0}
    spec = write_spec(folder, model, **{**base, **changes})
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port())} if len(envs) > 1 else {}
    return [fork_server().start(["train", str(spec), *arguments], folder, **where, **env) for env in envs]


def pods(count: int) -> list[dict[str, str]]:
    return [{"RANK": str(rank), "WORLD_SIZE": str(count)} for rank in range(count)]


def test_two_pods_train_as_one_process_does(folder: Path, small_model: Path) -> None:
    """Kubernetes: RANK and WORLD_SIZE of pods of one process. Sums are split in another way: fp32 rounding, no more."""
    two = start(folder, small_model, "pods", pods(2))
    assert [pod.wait(PATIENCE_S) for pod in two] == [0, 0], [pod.said for pod in two]
    assert "2 x cpu" in two[0].said
    assert two[1].said == ""  # rank 0 alone talks
    assert (folder / "out/pods/logs/rank-1.log").read_text().startswith("--- ")
    (one,) = start(folder, small_model, "alone", [{}])
    assert one.wait(PATIENCE_S) == 0, one.said
    got, want = losses(folder / "out/pods"), losses(folder / "out/alone")
    assert [step[0] for step in got] == [1, 2, 3]
    for ours, theirs in zip(got, want, strict=True):
        assert ours[1:4] == pytest.approx(theirs[1:4], rel=1e-6)


def test_two_pods_start_two_workers_each(folder: Path, small_model: Path) -> None:
    nodes = start(folder, small_model, "pods-of-two", pods(2), "--nproc-per-node", "2")
    assert [node.wait(PATIENCE_S) for node in nodes] == [0, 0], [node.said for node in nodes]
    assert "4 x cpu" in nodes[0].said
    names = {path.name for path in (folder / "out/pods-of-two/logs").glob("*.log")}
    assert names == {f"rank-{rank}.log" for rank in range(4)}


def test_ranks_of_another_launcher_refuse_raw_data_together(folder: Path, small_model: Path) -> None:
    """As srun starts them: both end with 2 before a model is loaded, and the line to type is printed once."""
    tasks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2"} for rank in range(2)]
    both = start(folder, small_model, "raw", tasks, max_seq_length=61)
    assert [rank.wait(PATIENCE_S) for rank in both] == [2, 2], [rank.said for rank in both]
    assert "pairs.jsonl: raw data, which one of several processes cannot prepare" in both[0].said
    assert "anchor prepare " in both[0].said and "--max-seq-length 61" in both[0].said
    assert both[1].said == ""


def await_steps(run: Path, num: int = 2) -> None:
    end = time.monotonic() + PATIENCE_S
    while not (run / "metrics.jsonl").is_file() or (run / "metrics.jsonl").read_text().count("\n") < num:
        assert time.monotonic() < end
        time.sleep(0.1)


def workers(run: Path) -> dict[int, int]:
    """Process id by rank."""
    states = [json.loads(path.read_text()) for path in (run / "logs/where").glob("rank-*.json")]
    return {state["rank"]: state["pid"] for state in states}


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}/exe").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


VICTIMS: dict[str, Callable[[dict[int, int], list[Started]], int]] = {
    "rank 0": lambda ranks, _: ranks[0],
    "a rank of the other node": lambda ranks, _: ranks[3],
    "the other node's launcher": lambda _, nodes: nodes[1].pids[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_kill_ends_both_nodes(folder: Path, small_model: Path, victim: str) -> None:
    name = f"killed-{victim.replace(' ', '-')}"
    nodes = start(folder, small_model, name, pods(2), "--nproc-per-node", "2", max_steps=100_000)
    run = folder / "out" / name
    await_steps(run)
    ranks = workers(run)
    os.kill(VICTIMS[victim](ranks, nodes), signal.SIGKILL)
    killed_s = time.monotonic()
    codes = [node.wait(END_S) for node in nodes]
    said = [node.said for node in nodes]
    assert gone([*ranks.values(), *(node.pids[0] for node in nodes)], END_S), said
    assert all(code not in (0, 75) for code in codes), (codes, said)
    print(f"{victim}: everybody gone after {time.monotonic() - killed_s:.1f} s; {codes}; {said}")
