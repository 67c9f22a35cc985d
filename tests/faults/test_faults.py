"""Each fault ends in the promised message, exit code and state (docs/reliability.md has the table)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.harness import (
    Started,
    alive,
    assert_bitwise,
    descendants,
    events,
    fork_server,
    losses,
    metrics,
    write_spec,
    write_world,
)

from anchor_cli.base.checkpoints import list_checkpoints, verify_checkpoint

LONG = {"max_steps": 400, "save_steps": 50, "eval_steps": 0}


class World:
    """A folder with data, a model, and one run that nothing happened to."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        write_world(folder)

    def run(self, name: str) -> Path:
        return self.folder / "out" / name

    def start(self, name: str, *arguments: str, spec: dict[str, Any] | None = None, **more: Any) -> Started:
        path = write_spec(self.folder, self.model, experiment_id=name, **(spec or {}))
        return fork_server().start(["train", str(path), *arguments], self.folder, **more)

    def end(self, name: str, *arguments: str, **more: Any) -> tuple[int, str]:
        started = self.start(name, *arguments, **more)
        return started.wait(), started.said


@pytest.fixture(scope="module")
def world(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("faults"), small_model)


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    assert world.end("whole")[0] == 0
    return world.run("whole")


def await_phase(run: Path, phase: str, rank: int = 0, seconds: float = 60.0) -> None:
    """Until a rank says that it is in `phase`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((run / f"logs/where/rank-{rank}.json").read_text())["phase"] == phase:
                return
        time.sleep(0.005)
    raise AssertionError(f"never in {phase}")


def await_file(folder: Path, pattern: str, seconds: float = 60.0) -> None:
    """Until a file of that name is there."""
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        assert time.monotonic() < end, f"never {pattern}"
        time.sleep(0.005)


@contextlib.contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found_at", ["the check before writing", "the write itself"])
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(world: World, whole: Path, found_at: str) -> None:
    one = sum(path.stat().st_size for path in (whole / "checkpoint-2").iterdir())
    out = world.folder / f"small-{len(found_at)}"
    # a disk that looks roomy lets every save begin and run into the wall
    answers = {"anchor_cli.train.saving:free_bytes": 10**12} if found_at == "the write itself" else None
    with mounted(out, "-t", "tmpfs", "-o", f"size={int(2.9 * one)}", "tmpfs"):
        spec = {"output_dir": str(out), "dataset_file_path": str(next((world.folder / "out/prepared").iterdir()))}
        ballast = out / "ballast"
        ballast.write_bytes(b"x" * int(0.2 * one))
        code, said = world.end("run", spec=spec, answers=answers)
        run = out / "run"
        assert code == 1, said
        assert "checkpoint-6 could not be written (" in said and "checkpoint-4 stays; next try at step 7" in said, said
        assert ("No space left" in said) == (found_at == "the write itself"), said
        assert (" needed, " in said) == (found_at == "the check before writing"), said
        assert "anchor: " in said and "checkpoint-8 could not be written" in said
        assert losses(run) == losses(whole)  # training went on to its last step
        assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
        assert not verify_checkpoint(run / "checkpoint-4")
        assert not list(run.glob(".checkpoint*"))
        failed = [event for event in events(run) if event["event"] == "checkpoint_failed"]
        assert [event["step"] for event in failed] == [6, 7, 8]
        ballast.unlink()
        shutil.rmtree(run / "checkpoint-2")
        code, said = world.end("run", spec=spec | {"save_steps": 0})
        assert code == 0, said
        assert metrics(run) == metrics(whole)
        assert_bitwise(run / "checkpoint-8", whole / "checkpoint-8")


def test_a_run_that_is_further_than_it_shall_go_is_refused(world: World, whole: Path) -> None:
    code, said = world.end("whole", spec={"stop_after_n_steps": 4})
    assert code == 2 and "stop_after_n_steps: 4, but" in said and "has 8 steps already" in said, said


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(world: World, whole: Path) -> None:
    out = world.folder / "tiny-disk"
    with mounted(out, "-t", "tmpfs", "-o", "size=300k", "tmpfs"):
        spec = {"output_dir": str(out), "dataset_file_path": str(next((world.folder / "out/prepared").iterdir()))}
        code, said = world.end("run", spec=spec)
    assert code == 2 and "free, but one checkpoint needs" in said, said
    assert "step 1/" not in said


def test_a_read_only_folder_is_refused_in_two_lines(world: World) -> None:
    out = world.folder / "read-only"
    with mounted(out, "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs"):
        code, said = world.end("run", spec={"output_dir": str(out)})
    assert code == 2, said
    assert "output_dir: " in said and "cannot be written (Read-only file system)" in said and "Traceback" not in said


def test_data_that_cannot_be_read_is_refused(world: World, whole: Path) -> None:
    prepared = next((world.folder / "out/prepared").iterdir())
    cut = world.folder / "cut-data"
    shutil.copytree(prepared, cut)
    shard = max(cut.glob("*.arrow"), key=lambda path: path.stat().st_size)
    os.truncate(shard, shard.stat().st_size // 2)
    code, said = world.end("cut-data", spec={"dataset_file_path": str(cut)})
    assert code == 2 and f"{shard}: " in said and "anchor prepare" in said, said
    noise = world.folder / "noise"
    shutil.copytree(prepared, noise)
    shard = noise / shard.name
    shard.write_bytes(os.urandom(shard.stat().st_size))
    code, said = world.end("noise", spec={"dataset_file_path": str(noise)})
    assert code == 2 and "damaged" in said and "Traceback" not in said, said


def test_data_that_vanish_under_a_run_are_told_as_such(world: World, whole: Path) -> None:
    data = world.folder / "vanishing"
    shutil.copytree(next((world.folder / "out/prepared").iterdir()), data)
    spec = LONG | {"dataset_file_path": str(data)}
    started = world.start("vanishing", "--nproc-per-node", "2", spec=spec)
    await_phase(world.run("vanishing"), "step")
    os.truncate(max(data.glob("*.arrow"), key=lambda path: path.stat().st_size), 0)
    assert started.wait(60) == 1, started.said
    assert "was killed by SIGBUS" in started.said and "memory-mapped file became unreadable" in started.said


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A model with one damaged weight: the input embedding of one token is not a number. Returns (folder, the word)."""
    import torch
    from transformers import AutoModelForCausalLM

    from anchor_cli.data.text import load_tokenizer

    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    [token] = load_tokenizer(small_model).encode("Z", add_special_tokens=False).ids
    with torch.no_grad():
        model.model.embed_tokens.weight[token, 3] = float("nan")
    model.save_pretrained(folder)
    return folder, "Z"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_that_is_not_finite_changes_nothing_and_can_be_replayed_and_skipped(
    poisoned: tuple[Path, str], tmp_path: Path, precision: str
) -> None:
    model, word = poisoned
    world = World(tmp_path, model)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    marked = {11: "anchor", 40: "positive"}
    for row, column in marked.items():
        record = json.loads(lines[row])
        lines[row] = json.dumps(record | {column: f"{record[column]} {word}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    from anchor_cli.data.batches import epoch_order

    steps = sorted({int(list(epoch_order(64, 42, 0)).index(row)) // 8 for row in marked})
    first = steps[0]
    spec = {"save_steps": 1, "eval_steps": 0, "precision": precision}
    spec |= {"deepspeed": "zero2_fp32" if precision == "float32" else "zero2_bf16"}
    code, said = world.end("run", spec=spec, ranks=2)
    run = world.run("run")
    assert code == 1, said
    assert f"step {first}: the gradient is not finite" in said and "no weight was changed" in said, said
    assert f"--skip-step {first}" in said and "anchor replay" in said
    incident = json.loads((run / f"incident-step-{first}.json").read_text())
    assert set(incident["rows"]) == set(epoch_order(64, 42, 0)[first * 8 : first * 8 + 8].tolist())
    assert len(losses(run)) == first
    for checkpoint in list_checkpoints(run):
        assert not verify_checkpoint(checkpoint)
    assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{n}" for n in range(1, first + 1)]

    shutil.rmtree(run / f"checkpoint-{first}", ignore_errors=True)  # the nearest is then one step further back
    code, said = fork_server().run(["replay", str(run), "--step", str(first), "--json"], tmp_path)
    assert code == 0, said
    found = json.loads(said[said.index("{\n") : said.rindex("}") + 1])
    assert found["finite"] is False
    bad = {row["row"] for micro in found["micro_batches"] for row in micro["non_finite_rows"]}
    assert bad == {row for row in marked if row in incident["rows"]}
    if first > 1:
        assert {micro["rank"] for micro in found["micro_batches"]} == {0, 1}

    skipping = [argument for step in steps for argument in ("--skip-step", str(step))]
    code, said = world.end("run", *skipping, spec=spec, ranks=2)
    assert code == 0, said
    assert len(losses(run)) == 8 - len(steps)
    assert all(math.isfinite(number) for line in losses(run) for number in line)
    state = json.loads((run / "checkpoint-8/training_state.json").read_text())
    assert state["skipped_steps"] == steps and state["step"] == 8


def test_two_bad_steps_between_two_checkpoints(poisoned: tuple[Path, str], tmp_path: Path) -> None:
    """No checkpoint knows the first skip when the second step fails: what is printed then names both, and works."""
    model, word = poisoned
    world = World(tmp_path, model)
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines()
    for row in (11, 40):
        record = json.loads(lines[row])
        lines[row] = json.dumps(record | {"anchor": f"{record['anchor']} {word}"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    from anchor_cli.data.batches import epoch_order

    first, second = sorted(int(list(epoch_order(64, 42, 0)).index(row)) // 8 for row in (11, 40))
    assert first < second
    spec = {"save_steps": 0, "eval_steps": 0, "precision": "float32", "deepspeed": "zero2_fp32"}
    code, said = world.end("run", spec=spec)
    assert code == 1 and said.rstrip().endswith(f"go on without it: --skip-step {first}"), said
    code, said = world.end("run", "--skip-step", str(first), spec=spec)
    options = ["--skip-step", str(first), "--skip-step", str(second)]
    assert code == 1 and f"go on without it: {' '.join(options)}" in said, said
    code, said = fork_server().run(["replay", str(world.run("run")), "--step", str(second), "--json"], tmp_path)
    assert code == 0 and '"finite": false' in said, said
    code, said = world.end("run", *options, spec=spec)
    assert code == 0, said


# -- processes ---------------------------------------------------------------------------------------------------------


def gone_within(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal (bit mask SigCgt of proc(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("phase", ["step", "saving", "evaluation"])
def test_sigterm_to_the_launcher_saves_in_every_phase_and_leaves_nothing(world: World, phase: str) -> None:
    name = f"launched-{phase}"
    spec = LONG | {"save_steps": 3, "eval_steps": 3}
    started = world.start(name, "--nproc-per-node", "2", spec=spec)
    run = world.run(name)
    await_phase(run, phase)
    workers = descendants(started.pids[0])
    assert len(workers) >= 2
    started.send(signal.SIGTERM)
    assert started.wait(60) == 75, started.said
    assert gone_within(workers, 2.0)
    stop = events(run)[-1]
    assert stop["event"] == "stop" and stop["signal"] == "SIGTERM"
    assert not verify_checkpoint(run / f"checkpoint-{stop['step']}")
    assert started.said.count("stopped at step") == 1
    if phase == "step":  # the next start goes on from there
        code, said = world.end(name, "--nproc-per-node", "2", spec=spec | {"stop_after_n_steps": stop["step"] + 1})
        assert code == 0 and f"(step {stop['step']}" in said, said
        steps = [line["step"] for line in metrics(run) if "train/loss" in line]
        assert steps == list(range(1, stop["step"] + 2))


def test_a_signal_before_the_first_step_ends_the_run_with_75(world: World) -> None:
    """While data are prepared; and as soon as the launcher handles signals."""
    name = "early"
    pairs = world.folder / "many.jsonl"
    pairs.write_text((world.folder / "pairs.jsonl").read_text() * 2000)
    for preparing in (True, False):
        started = world.start(name, "--nproc-per-node", "2", spec={"dataset_file_path": str(pairs)})
        if preparing:
            await_file(world.folder / "out/prepared", ".many-*.partial-*")
        while not hears(started.pids[0], signal.SIGUSR1):
            time.sleep(0.001)
        workers = descendants(started.pids[0])
        started.send(signal.SIGUSR1)
        assert started.wait(30) == 75, started.said
        assert gone_within(workers, 2.0)
    assert not list_checkpoints(world.run(name))


def test_a_killed_rank_takes_the_others_down_and_is_named(world: World) -> None:
    started = world.start("rank-killed", "--nproc-per-node", "2", spec=LONG)
    run = world.run("rank-killed")
    await_phase(run, "step", rank=1)
    workers = descendants(started.pids[0])
    victim = json.loads((run / "logs/where/rank-1.json").read_text())["pid"]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    assert started.wait(30) == 1
    assert time.monotonic() - began < 5.0
    assert f"rank 1 (pid {victim}) was killed by SIGKILL" in started.said, started.said
    assert gone_within(workers, 2.0)


def test_a_killed_launcher_leaves_no_orphans(world: World) -> None:
    started = world.start("launcher-killed", "--nproc-per-node", "2", spec=LONG)
    await_phase(world.run("launcher-killed"), "step")
    workers = descendants(started.pids[0])
    started.send(signal.SIGKILL)
    started.wait(10)
    assert gone_within(workers, 3.0)


def test_a_hung_rank_is_named_with_stacks_and_the_run_ends(world: World) -> None:
    started = world.start("hung", "--nproc-per-node", "2", spec=LONG, ANCHOR_HANG_TIMEOUT_S="15")
    run = world.run("hung")
    await_phase(run, "step", rank=1)
    workers = descendants(started.pids[0])
    os.kill(json.loads((run / "logs/where/rank-1.json").read_text())["pid"], signal.SIGSTOP)
    assert started.wait(60) == 1, started.said
    said = " ".join(started.said.split())
    assert "no progress for 15 s: rank 0 on" in said and "Python stacks follow" in said, said
    assert "rank 1 on" in said and "NOT RESPONDING" in said and "train.py" in said
    assert gone_within(workers, 2.0)


def test_a_second_ctrl_c_ends_everything_at_once(world: World) -> None:
    started = world.start("ctrl-c", "--nproc-per-node", "2", spec=LONG)
    run = world.run("ctrl-c")
    await_phase(run, "step", rank=1)
    workers = descendants(started.pids[0])
    os.kill(json.loads((run / "logs/where/rank-1.json").read_text())["pid"], signal.SIGSTOP)  # so that no save is quick
    started.send(signal.SIGINT)
    time.sleep(0.8)
    assert alive(started.pids[0])
    started.send(signal.SIGINT)
    began = time.monotonic()
    assert started.wait(10) == 130
    assert time.monotonic() - began < 2.0
    assert gone_within(workers, 2.0)


def test_the_same_run_started_twice_is_refused(world: World) -> None:
    first = world.start("twice", spec=LONG)
    await_phase(world.run("twice"), "step")
    code, said = world.end("twice", spec=LONG)
    assert code == 2 and "is being trained already by process" in said, said
    logs = world.run("twice") / "logs"
    assert (logs / "rank-0.log").read_text().count("--- ") == 1  # the second start left the first one's log alone
    assert json.loads((logs / "where/rank-0.json").read_text())["pid"] == first.pids[0]
    first.send(signal.SIGINT)
    assert first.wait() == 75


# -- the world outside -------------------------------------------------------------------------------------------------


def test_a_tracker_that_raises_costs_a_warning(world: World, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(
        "class Settings:\n"
        "    def __init__(self, **_): pass\n"
        "class Run:\n"
        "    logged = 0\n"
        "    def __init__(self, id): self.id = id or 'abc'\n"
        "    def log(self, *_, **__):\n"
        "        self.logged += 1\n"
        "        if self.logged > 2: raise RuntimeError('wandb is down')\n"
        "    def finish(self): raise ConnectionError('still down')\n"
        "def init(id, **_):\n"
        "    print('wandb.init with id', id, flush=True)\n"
        "    return Run(id)\n"
    )
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    more = {"PYTHONPATH": paths, "WANDB_DISABLED": "", "WANDB_MODE": "offline"}
    code, said = world.end("wandb-raises", spec={"report_to": "wandb", "stop_after_n_steps": 4}, **more)
    assert code == 0, said
    assert "wandb.init with id None" in said
    assert "wandb stopped taking metrics (RuntimeError: wandb is down)" in said, said
    code, said = world.end("wandb-raises", spec={"report_to": "wandb"}, **more)
    assert code == 0 and "wandb.init with id abc" in said, said  # the same W&B run goes on
    run = world.run("wandb-raises")
    assert metrics(run) == metrics(whole)
    state = json.loads((run / "checkpoint-8/training_state.json").read_text())
    assert state["wandb_run_id"] == "abc"


@pytest.fixture()
def silent_server() -> Iterator[str]:
    """A loopback server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        held = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listener.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


OF_THE_HUB = {
    "model_name_or_path": "nobody/nothing",
    "dataset_file_path": "hf://nobody/nothing",
    "eval_data": ["ko:NanoNQ"],
}
"""Keys of a spec that name what this host does not have."""


@pytest.mark.slow
@pytest.mark.parametrize("what", [*OF_THE_HUB, "anchor eval", "anchor prepare"])
def test_a_hub_that_never_answers_is_an_error_in_a_minute(world: World, silent_server: str, what: str) -> None:
    """A real start: huggingface_hub reads its settings when it is imported."""
    from faults.harness import environment

    changes: dict[str, Any] = {what: OF_THE_HUB[what]} if what in OF_THE_HUB else {}
    path = write_spec(world.folder, world.model, experiment_id=f"hub-{what}", **changes)
    arguments = {
        "anchor eval": ["eval", "nobody/nothing"],
        "anchor prepare": ["prepare", "hf://nobody/nothing", "--out", "prepared", "--tokenizer", str(world.model)],
    }.get(what, ["train", str(path)])
    env = environment(world.folder / "home", HF_ENDPOINT=silent_server, HF_HOME=str(world.folder / "hf"))
    env["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-m", "anchor_cli", *arguments]
    began = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=world.folder)
    assert done.returncode in (1, 2), done.stderr
    assert time.monotonic() - began < 180
    last = [line for line in done.stderr.splitlines() if line.startswith("anchor: ") and "does not answer" not in line]
    assert len(last) == 1 and ("nobody/nothing" in last[0] or "Nano" in last[0]), done.stderr
    assert done.stderr.count("does not answer within 10 s") == 1
    assert "Traceback" not in done.stderr
