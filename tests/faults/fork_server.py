"""Starts `anchor` commands in a second instead of fifteen: everything heavy is imported once, each command is a fork.

A command runs exactly as from the shell (`anchor_cli.cli.run` with its arguments, environment, working folder
and streams, in a session of its own). Requests and answers are JSON lines on stdin and stdout.

A fork can be told to kill itself with SIGKILL at the k-th call of some function (`die_at`): in the middle of a save
there are only so many moments at which the disk changes, and each one can be tried. `answers` makes a function give a
constant, such as a disk that says it has room. Workers that the launcher starts are forks, too (`ForkedWorker`).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

HEAVY = (
    "torch", "torch.distributed", "pandas", "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed", "pyarrow",
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "transformers",
    "transformers.models.qwen3.modeling_qwen3",
    "safetensors.torch", "tokenizers", "anchor_cli.data.prepare.prepare", "anchor_cli.train.loop",
    "anchor_cli.train.worker", "anchor_cli.train.start",
    "anchor_cli.base.environment", "anchor_cli.cli",
)  # fmt: skip


def prepare_child(request: dict[str, Any]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(":")  # as a new interpreter would
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    from anchor_cli.processes import watchdog

    watchdog.WRITE_EVERY_S = 0.05  # so that the harness sees in which phase a run was killed
    if request.get("die_at"):
        die_at(*request["die_at"])
    for name, value in (request.get("answers") or {}).items():
        place, last = find(name)
        setattr(place, last, lambda *_, value=value, **__: value)
    from anchor_cli.processes import launch

    launch.subprocess = SimpleNamespace(Popen=ForkedWorker, DEVNULL=None, STDOUT=None)


class ForkedWorker:
    """What the launcher needs of `subprocess.Popen`, without the start of a new interpreter."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if stdout is not None:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
        os.environ.clear()
        os.environ.update(env)
        run_here(command[3:])

    def poll(self) -> int | None:
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if done else None
        return self._code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self._code is not None
        return self._code


def die_at(name: str, count: int) -> None:
    """SIGKILL this process right before the `count`-th call of `module:attribute`."""
    place, last = find(name)
    function, calls = getattr(place, last), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(place, last, call)


def find(name: str) -> tuple[Any, str]:
    """Where `module:attribute` is, and its last name."""
    module, attribute = name.split(":")
    place: Any = importlib.import_module(module)
    *path, last = attribute.split(".")
    for part in path:
        place = getattr(place, part)
    return place, last


def start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    prepare_child(request)
    run_here(request["arguments"])
    raise AssertionError


def run_here(arguments: list[str]) -> None:
    """The command, and the end of this process."""
    code = 70
    try:
        from anchor_cli.cli import run

        sys.argv = ["anchor", *arguments]
        code = run(arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


ended: dict[int, int] = {}


def wait(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while pid not in ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            return None
        else:
            time.sleep(0.01)
    return ended[pid]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    for name in HEAVY:
        importlib.import_module(name)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "start":
            answers.write(json.dumps({"pid": start(request)}) + "\n")
        else:
            answers.write(json.dumps({"code": wait(request["pid"], request["seconds"])}) + "\n")


if __name__ == "__main__":
    main()
