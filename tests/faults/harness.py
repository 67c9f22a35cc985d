"""What fault tests share: a small world of pairs and a benchmark, quick starts of `anchor`, and looking at runs."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from anchor_cli.data.training_set import prepare_raw
from anchor_cli.processes.ranks import free_port
from anchor_cli.spec.load import load_spec

REPOSITORY = Path(__file__).parents[2]
TRAIN_KEYS = ("step", "train/loss", "train/d2q_loss", "train/q2d_loss", "train/learning_rate", "train/grad_norm")


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "ANCHOR_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
            "COLUMNS": "400", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true",
            "TOKENIZERS_PARALLELISM": "false", **more}  # fmt: skip


def write_world(folder: Path, num_rows: int = 64) -> None:
    """`pairs.jsonl` and a BEIR folder `world` of 12 queries and 12 documents."""
    rng = np.random.default_rng(0)
    words = "수달 강 바다 복지 급여 otter river sea benefit query document 문서 질문 apply where".split()

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(2, longest)))

    rows = [(f"{i} {text(8)}", f"{i} {text(24)}") for i in range(num_rows)]
    lines = [json.dumps({"anchor": query, "positive": document}, ensure_ascii=False) for query, document in rows]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    beir = folder / "world"
    (beir / "qrels").mkdir(parents=True)
    for name, column in (("corpus", 1), ("queries", 0)):
        texts = [json.dumps({"_id": f"{name}{i}", "text": row[column]}) for i, row in enumerate(rows[:12])]
        (beir / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    judged = [f"queries{i}\tcorpus{i}\t1" for i in range(12)]
    (beir / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")


def write_spec(folder: Path, model: Path, **changes: Any) -> Path:
    """A spec on `write_world`'s folder; the run is `{folder}/out/{experiment_id}`."""
    spec = {
        "model_name_or_path": str(model), "dataset_file_path": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "out"), "experiment_id": "run", "max_seq_length": 64, "precision": "float32",
        "global_batch_size": 8, "max_tokens_per_micro_batch": 400, "max_steps": 8, "warmup_steps": 2,
        "learning_rate": 1e-3, "save_steps": 2, "eval_steps": 4, "eval_data": [f"ko:{folder / 'world'}"],
    } | changes  # fmt: skip
    path = folder / f"{spec['experiment_id']}.json"
    path.write_text(json.dumps(spec))
    return path


@dataclass
class Started:
    """A command that runs: one process a rank (`pids`), what they print in `logs`."""

    server: ForkServer
    pids: list[int]
    logs: list[Path]
    codes: list[int | None] = field(default_factory=list)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code of rank 0 when all have ended (they are killed, and the test fails, when they have not)."""
        end = time.monotonic() + seconds
        self.codes = [self.server.wait(pid, max(0.0, end - time.monotonic())) for pid in self.pids]
        if None in self.codes:
            self.send(signal.SIGKILL)
            for pid, code in zip(self.pids, self.codes):
                code is None and self.server.wait(pid, 5)
            raise AssertionError(f"still running after {seconds} s; codes {self.codes}; said: {self.said}")
        assert self.codes[0] is not None
        return self.codes[0]

    def send(self, number: int, rank: int | None = None) -> None:
        for pid in self.pids if rank is None else [self.pids[rank]]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    @property
    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())


class ForkServer:
    """The process of fork_server.py."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
            env=environment(Path("/nonexistent")), cwd=REPOSITORY,
        )  # fmt: skip
        assert self._server.stdout is not None and json.loads(self._server.stdout.readline())["ready"]
        atexit.register(self._server.kill)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        return json.loads(self._server.stdout.readline())

    def wait(self, pid: int, seconds: float) -> int | None:
        return self.ask(op="wait", pid=pid, seconds=seconds)["code"]

    def start(
        self,
        arguments: list[str],
        folder: Path,
        *,
        ranks: int = 1,
        die_at: tuple[str, int] | None = None,
        answers: dict[str, Any] | None = None,
        **env: str,
    ) -> Started:
        """Start `anchor arguments`; with `ranks` > 1 as that many workers, as torchrun would, on prepared data."""
        if ranks > 1 and arguments[0] == "train":
            prepare_raw(load_spec(Path(arguments[1])))
        started = Started(self, [], [])
        port = str(free_port())
        for rank in range(ranks):
            log = folder / f"said-{time.monotonic_ns()}-{rank}.txt"
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": port} if ranks > 1 else {}  # fmt: skip
            request = {"arguments": arguments, "env": environment(folder / "home", **own, **env), "log": str(log)}
            answer = self.ask(op="start", die_at=die_at if rank == 0 else None, answers=answers, **request)
            started.pids.append(answer["pid"])
            started.logs.append(log)
        return started

    def run(self, arguments: list[str], folder: Path, seconds: float = 120.0, **more: Any) -> tuple[int, str]:
        """(exit code of rank 0, all that was printed)."""
        started = self.start(arguments, folder, **more)
        return started.wait(seconds), started.said


@functools.cache
def fork_server() -> ForkServer:
    """One for the whole session."""
    return ForkServer()


def metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("perf/")} for line in lines
    ]


def losses(run: Path) -> list[tuple[float, ...]]:
    """TRAIN_KEYS of every training line."""
    return [tuple(line[key] for key in TRAIN_KEYS) for line in metrics(run) if "train/loss" in line]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Model weights and optimizer state of a checkpoint, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= {f"{path.name.split('-')[0]}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_bitwise(one: Path, other: Path) -> None:
    """Two checkpoints hold the same numbers, bit for bit."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def largest_difference(one: Path, other: Path) -> float:
    """Largest difference of two checkpoints' fp32 master weights, relative to the largest weight of the tensor."""
    ours, theirs = tensors(one), tensors(other)
    return max(
        ((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-12)).item()
        for name in ours
        if name.endswith(".fp32")
    )


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Processes below `pid`."""
    from anchor_cli.processes.signals import children

    return [below for child in children(pid) for below in (child, *descendants(child))]
