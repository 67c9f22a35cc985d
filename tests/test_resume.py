"""Whatever ends a run, the same command continues it: bit for bit, on the same number of processes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from faults.harness import (
    Started,
    assert_bitwise,
    environment,
    events,
    fork_server,
    largest_difference,
    losses,
    metrics,
    write_spec,
    write_world,
)

from anchor_cli.base.checkpoints import list_checkpoints, newest_whole, prune, verify_checkpoint
from anchor_cli.base.errors import InputError
from anchor_cli.spec.spec import RunSpec
from anchor_cli.train.verify_resume import Verdict, difference

pytestmark = pytest.mark.usefixtures("small_model")


class World:
    """A folder with data, runs on it by name."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        write_world(folder)

    def path(self, name: str) -> Path:
        return self.folder / "out" / name

    def start(self, name: str, *, ranks: int = 1, die_at: tuple[str, int] | None = None, **changes: Any) -> Started:
        spec = write_spec(self.folder, self.model, experiment_id=name, **changes)
        return fork_server().start(["train", str(spec)], self.folder, ranks=ranks, die_at=die_at)

    def train(self, name: str, *, code: int = 0, **more: Any) -> Path:
        started = self.start(name, **more)
        assert started.wait() == code, started.said
        return self.path(name)


@pytest.fixture(scope="module")
def world(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("resume"), small_model)


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """The uninterrupted float32 run of one process."""
    return world.train("whole")


def test_killed_in_step_evaluation_and_save_it_ends_as_if_nothing_had_happened(world: World, whole: Path) -> None:
    kills = [
        ("anchor_cli.train.stages.reconstruct:train_step", 4, 2),  # in step 3; checkpoint-2 stands
        ("anchor_cli.evaluate.evaluate:evaluate_one", 1, 2),  # at step 4, before its line
        ("anchor_cli.train.saving:os.rename", 1, 2),  # checkpoint-4 is written, but not under its name
        ("anchor_cli.train.saving:fsync_folder", 1, 4),  # right after it has its name
    ]
    for name, count, newest in kills:
        run = world.train("killed", die_at=(name, count), code=-signal.SIGKILL)
        assert [path.name for path in list_checkpoints(run)][-1] == f"checkpoint-{newest}", name
    run = world.train("killed")
    assert metrics(run) == metrics(whole)  # also: no line twice, none missing
    assert len(losses(run)) == 8
    assert_bitwise(run / "checkpoint-8", whole / "checkpoint-8")
    assert difference(whole, run, 8).none  # what `anchor verify-resume` would say
    assert not list(run.glob(".checkpoint*"))
    state, want = (json.loads((path / "checkpoint-8/training_state.json").read_text()) for path in (run, whole))
    assert state["best"] == want["best"] and state["evaluated_step"] == 8


def test_two_bf16_processes_stopped_by_a_signal_go_on_bit_for_bit(world: World) -> None:
    bf16 = {"precision": "bfloat16", "deepspeed": "zero2_bf16", "ranks": 2}
    whole = world.train("whole-bf16", **bf16)
    started = world.start("stopped-bf16", **bf16)
    run = world.path("stopped-bf16")
    while not (run / "metrics.jsonl").is_file() or not losses(run):
        time.sleep(0.01)
    started.send(signal.SIGTERM, rank=1)  # one rank is told; all agree
    assert started.wait() == 75, started.said
    stopped = events(run)[-1]
    assert stopped["event"] == "stop" and 1 <= stopped["step"] < 8
    assert not verify_checkpoint(run / f"checkpoint-{stopped['step']}")
    world.train("stopped-bf16", **bf16)
    assert metrics(run) == metrics(whole)
    assert_bitwise(run / "checkpoint-8", whole / "checkpoint-8")


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_another_number_of_processes_changes_rounding_only(world: World, whole: Path, first: int, second: int) -> None:
    name = f"elastic-{first}-{second}"
    other_bins = {"max_tokens_per_micro_batch": 200}  # else two ranks cut a step where `whole` cuts it, too
    world.train(name, ranks=first, stop_after_n_steps=4, **other_bins)
    run = world.train(name, ranks=second, **other_bins)
    for got, want in zip(losses(run), losses(whole), strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    assert largest_difference(run / "checkpoint-8", whole / "checkpoint-8") < 1e-4
    found = difference(whole, run, 8)
    assert found.largest_number < 1e-4 and found.tensors_different and not found.none
    noisy = Verdict(4, 1, found, found)
    assert noisy.passed and not noisy.exact and not Verdict(4, 1, found, None).passed


def test_zero3_is_written_and_read_whole(world: World) -> None:
    zero3 = {"precision": "bfloat16", "deepspeed": "zero3_bf16", "ranks": 2, "max_steps": 4, "eval_steps": 0}
    whole = world.train("whole-zero3", **zero3)
    world.train("cut-zero3", **zero3, stop_after_n_steps=2)
    run = world.train("cut-zero3", **zero3)
    assert metrics(run) == metrics(whole)
    assert_bitwise(run / "checkpoint-4", whole / "checkpoint-4")


@pytest.mark.slow
def test_verify_resume_proves_it_with_real_processes(world: World) -> None:
    spec = write_spec(world.folder, world.model, experiment_id="proved", eval_steps=2)
    command = [sys.executable, "-m", "anchor_cli", "verify-resume", str(spec), "--steps", "2", "--json"]
    done = subprocess.run(command, env=environment(world.folder / "home"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exact"] and found["passed"] and found["noise"] is None
    assert found["resumed"]["numbers_compared"] == 4 * 6 and found["resumed"]["tensors_compared"] > 50
    assert not list((world.folder / "out").glob(".verify-resume-*"))
    command[command.index("2")] = "5"
    done = subprocess.run(command, env=environment(world.folder / "home"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 2 and "fewer than 10 steps" in done.stderr
    assert "saved " not in done.stderr and "report.html" not in done.stderr  # of what is removed


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero1_bf16", "zero2_offload_bf16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_other_config_resumes_bit_for_bit(world: World, config: str, ranks: int) -> None:
    more = {"precision": "bfloat16", "deepspeed": config, "ranks": ranks, "max_steps": 4, "eval_steps": 0}
    whole = world.train(f"whole-{config}-{ranks}", **more)
    world.train(f"cut-{config}-{ranks}", **more, stop_after_n_steps=2)
    run = world.train(f"cut-{config}-{ranks}", **more)
    assert metrics(run) == metrics(whole)
    assert_bitwise(run / "checkpoint-4", whole / "checkpoint-4")


def test_a_damaged_newest_is_named_and_the_one_before_is_taken(world: World, whole: Path) -> None:
    run = world.train("damaged", stop_after_n_steps=6)
    with open(run / "checkpoint-6/model.safetensors", "r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))  # one bit
    with open(run / "checkpoint-4/optimizer-00001-of-00001.safetensors", "r+b") as file:
        file.truncate(1000)
    started = world.start("damaged")
    assert started.wait() == 0
    assert "checkpoint-6: damaged: model.safetensors was changed after it was written" in started.said
    assert "checkpoint-4: damaged: optimizer-00001-of-00001.safetensors has 1,000 bytes" in started.said
    assert "resuming from" in started.said and "checkpoint-2 (step 2" in started.said
    assert metrics(run) == metrics(whole)
    assert_bitwise(run / "checkpoint-8", whole / "checkpoint-8")
    assert not verify_checkpoint(run / "checkpoint-6")  # written anew on the way


def test_a_changed_spec_is_refused_with_what_differs_and_harmless_changes_are_not(world: World, whole: Path) -> None:
    started = world.start("whole", learning_rate=2e-3, seed=7, save_steps=3)
    assert started.wait() == 2
    assert "learning_rate: 0.001 -> 0.002" in started.said and "seed: 42 -> 7" in started.said
    assert "save_steps" not in started.said
    before = metrics(whole)
    world.train("whole", save_steps=3, logging_steps=5, report_to="tensorboard", max_tokens_per_micro_batch=300)
    assert metrics(whole) == before


def test_a_save_is_never_rotated_away_for_a_newer_one_that_is_damaged(tmp_path: Path) -> None:
    """One bit of checkpoint-300 flips: the run goes on from further back, and what it saves then stays."""
    from anchor_cli.train.saving import commit

    def saved(step: int) -> Path:
        partial = tmp_path / f".checkpoint-{step}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"weights")
        commit(partial, tmp_path / f"checkpoint-{step}")
        return tmp_path / f"checkpoint-{step}"

    (saved(300) / "model.safetensors").write_bytes(b"weighty")
    assert newest_whole(tmp_path)[0] is None
    for step, gone in ((100, ["checkpoint-300"]), (200, ["checkpoint-100"]), (300, ["checkpoint-200"])):
        newest = saved(step)
        assert [path.name for path in prune(tmp_path, 1, saved=newest)] == gone
        assert newest_whole(tmp_path)[0] == newest


def test_the_start_model_may_move_and_go_but_not_be_another(tmp_path: Path, small_model: Path) -> None:
    from anchor_cli.base.checkpoints import model_digest
    from anchor_cli.train.saving import copy_tokenizer
    from anchor_cli.train.start import is_another_model

    model, moved = shutil.copytree(small_model, tmp_path / "a"), shutil.copytree(small_model, tmp_path / "b")
    state = {"start_model": model_digest(model)}

    def another(name: Path | str) -> bool:
        spec = RunSpec(model_name_or_path=str(name), dataset_file_path="d", output_dir=str(tmp_path / "out"),
                       experiment_id="run")  # fmt: skip
        return is_another_model(spec, state)

    weights = moved / "model.safetensors"
    own = shutil.copytree(moved, tmp_path / "out" / "run" / "checkpoint-1")
    assert not another(model) and not another(moved) and another("Qwen/Qwen3-0.6B")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    for folder in (moved, own):
        (folder / "model.safetensors").write_bytes(content)
    assert another(moved) and not another(own)  # a checkpoint of the run itself is where it stands
    state.clear()  # written by an older version
    assert not another(moved)

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    copy_tokenizer(str(model), tmp_path / "first")
    shutil.rmtree(model)  # such as a checkpoint of Stage I that its own run rotates away
    copy_tokenizer(str(model), tmp_path / "second")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "tokenizer.json" in names and names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (small_model / name).read_bytes()


def test_a_step_is_cut_as_before_where_it_can_be() -> None:
    """Less is free on the card at the next start, or more: the same cut rounds the same."""
    from anchor_cli.plan.budget import Budget
    from anchor_cli.train.start import as_it_was

    spec = RunSpec(model_name_or_path="m", dataset_file_path="d")
    state = {"token_budget": 900, "world_size": 2, "spec": spec.model_dump()}
    own = spec.model_copy(update={"max_tokens_per_micro_batch": 1000})
    for fits, of, then, ranks, want in (
        (1000, spec, state, 2, 900), (900, spec, state, 2, 900), (899, spec, state, 2, 899),
        (1000, spec, state, 1, 1000), (1000, own, state, 2, 1000), (1000, spec, {}, 2, 1000),
        (1000, spec, state | {"spec": own.model_dump()}, 2, 1000),
    ):  # fmt: skip
        assert as_it_was(Budget(fits, "what fits in memory", False, "auto"), of, then, ranks).tokens == want


def test_a_run_whose_start_model_is_gone_is_told_how_to_go_on(tmp_path: Path, small_model: Path) -> None:
    from anchor_cli.train.start import _contract

    spec = RunSpec(model_name_or_path=str(tmp_path / "gone"), dataset_file_path="d", output_dir=str(tmp_path),
                   experiment_id="run")  # fmt: skip
    with pytest.raises(InputError) as refused:
        _contract(spec)
    assert "checkpoint" not in str(refused.value.hint)
    shutil.copytree(small_model, tmp_path / "run" / "checkpoint-3")
    with pytest.raises(InputError) as refused:
        _contract(spec)
    assert refused.value.hint == f"to go on without it, set model_name_or_path to {tmp_path / 'run' / 'checkpoint-3'}"


def test_rotation_keeps_the_best_and_the_newest_whole(tmp_path: Path) -> None:
    from anchor_cli.base.metric_names import EVAL_AVG_NDCG_10
    from anchor_cli.train.saving import commit

    for step in (2, 4, 6, 8, 10):
        partial = tmp_path / f".checkpoint-{step}.partial"
        partial.mkdir()
        (partial / "model.safetensors").write_bytes(b"weights" * step)
        commit(partial, tmp_path / f"checkpoint-{step}")
    scores = {2: 0.3, 3: 0.9, 4: 0.5, 6: 0.4}  # nothing was saved at step 3
    lines = [json.dumps({"step": step, EVAL_AVG_NDCG_10: score}) for step, score in scores.items()]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "checkpoint-10/model.safetensors").write_bytes(b"short")
    assert [path.name for path in prune(tmp_path, 4)] == ["checkpoint-10"]  # the damaged one goes first
    assert [path.name for path in prune(tmp_path, 2)] == ["checkpoint-2", "checkpoint-6"]
    assert [path.name for path in prune(tmp_path, 1)] == []  # the best and the newest stay, whatever the limit
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]
