"""`anchor doctor`: each line against a host made good or bad on purpose."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_nvml import Card, FakeNvml, install

from anchor_cli.base.check import Check, lines_of
from anchor_cli.doctor import doctor
from anchor_cli.doctor import gpu as doctor_gpu
from anchor_cli.doctor import host as doctor_host
from anchor_cli.doctor import parallel as doctor_parallel
from anchor_cli.doctor import software as doctor_software
from anchor_cli.doctor.doctor import HostCheck
from anchor_cli.doctor.needs import Needs
from anchor_cli.train.deepspeed_versions import TESTED as TESTED_DEEPSPEED
from anchor_cli.train.deepspeed_versions import refused_deepspeed

ROOT = Path(__file__).parents[1]
KURE = ROOT / "train_configs/stage_I/Qwen3_0.6b_q2d_d2q_512.json"


def ask(host_check: HostCheck, needs: Needs | None = None) -> list[Check]:
    checks = list(host_check(needs or Needs()))
    for check in checks:
        assert (check.remedy is None) == (check.status == "ok"), check
        assert "\n" not in check.message
    return checks


def only(host_check: HostCheck, needs: Needs | None = None) -> Check:
    (check,) = ask(host_check, needs)
    return check


@pytest.mark.parametrize(
    ("version", "issue"),
    [("0.17.5", None), ("0.17.6", "7718"), ("0.18.0", "7718"), ("0.18.2+cu130", "7718"), ("0.18.3", "8224"),
     ("0.19.3", "8224"), ("0.19.4", None), ("0.19.8", None), ("1.0", None)],
)  # fmt: skip
def test_refused_deepspeed(version: str, issue: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = refused_deepspeed(version)
    assert (reason is None) == (issue is None) and (issue is None or f"issues/{issue}" in str(reason))
    monkeypatch.setattr(doctor_software, "version_of", lambda _: version)
    want = "fail" if issue else "ok" if version.startswith("0.19") else "warn"
    assert only(doctor_software.deepspeed).status == want


def test_tested_versions_are_the_pinned_ones() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    for name, version in {**doctor_software.TESTED, "deepspeed": TESTED_DEEPSPEED}.items():
        assert pins[name] == version, name


def test_packages_older_newer_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: dict[str, str | None] = {**doctor_software.TESTED, "torch": "2.13.7+cu130", "wandb": None}
    monkeypatch.setattr(doctor_software, "version_of", installed.get)
    assert only(doctor_software.packages).status == "ok"  # a patch release more, and an optional one missing
    installed["torch"] = "2.11.0"
    warned = only(doctor_software.packages)
    assert warned.status == "warn" and "torch 2.11.0 (tested 2.13.0)" in warned.message
    installed["numpy"] = None
    failed, warned = ask(doctor_software.packages)
    assert failed.status == "fail" and failed.message == "not installed: numpy" and warned.status == "warn"


def test_python_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = namedtuple("fake", "major minor micro")
    for version, want in ((fake(3, 10, 1), "fail"), (fake(3, 11, 9), "ok"), (fake(3, 19, 0), "warn")):
        monkeypatch.setattr(doctor_software.sys, "version_info", version)
        assert only(doctor_software.python).status == want
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert only(doctor_software.compiler).message.startswith("no C compiler")
    monkeypatch.setenv("CC", "clang-99")
    assert only(doctor_software.compiler).message.startswith("CC=clang-99 not found")


def test_compiler_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert only(doctor_software.compiler_locks).status == "ok"
    lock = tmp_path / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert only(doctor_software.compiler_locks).message == "1 held by a running build"
    import os

    os.utime(lock, (time.time() - 3600,) * 2)
    found = only(doctor_software.compiler_locks)
    assert found.status == "fail" and str(lock) in found.message and f"rm {lock}" in str(found.remedy)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a new file system in memory that holds as much as asked for, such as "64m"."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / size
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this user or container may not mount a file system")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_shared_memory(file_system: Callable[[str], Path], tmp_path: Path) -> None:
    for size, want in (("64m", "warn"), ("512m", "warn"), ("16g", "ok")):
        (check,) = doctor_host.shared_memory(Needs(), file_system(size))
        assert check.status == want
        assert ("Docker's default" in check.message) == (size == "64m")
    (check,) = doctor_host.shared_memory(Needs(), tmp_path / "absent")
    assert check.status == "warn"


def test_file_descriptors() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        check = next(doctor_host.file_descriptors(Needs()))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert check.status == "warn" and "1,024" in check.message and "ulimit" in str(check.remedy)


def test_disk(file_system: Callable[[str], Path]) -> None:
    """Free space, and the speed only where the probe's 64 MB fit."""
    for size, want in (("500m", ["fail"]), ("4g", ["fail", "ok"]), ("20g", ["warn", "ok"]), ("900g", ["ok", "ok"])):
        folder = file_system(size)
        checks = ask(doctor_host.disk, Needs(output_dir=folder / "not" / "yet" / "made"))
        assert [check.status for check in checks] == want
        assert list(folder.iterdir()) == []


def test_a_slow_disk(tmp_path: Path) -> None:
    """8,300 MB at 83 MB/s."""
    check = doctor_host.disk_speed(tmp_path, 83.0)
    assert check.status == "warn"
    assert check.message == f"83 MB/s into {tmp_path}: a checkpoint of 0.6B parameters takes 100 s"


def test_write_speed_measures_and_cleans_up(tmp_path: Path) -> None:
    assert doctor_host.write_speed(tmp_path, num_mb=2) > 0
    assert list(tmp_path.iterdir()) == []


def test_hub_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of our own, an hour ahead, stands in for the Hub; then nobody listens there any more."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Refusing(BaseHTTPRequestHandler):
        ahead = 0.0

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + self.ahead)

        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusing)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert only(doctor_host.hub).status == "ok"
    on_time = only(doctor_host.clock)
    assert on_time.status == "ok" and on_time.message.endswith("s from the Hub's")
    Refusing.ahead = 3600
    late = only(doctor_host.clock)
    assert late.status == "warn" and re.match(r"-3,(599|600) s from the Hub's", late.message)
    server.shutdown()
    server.server_close()
    assert only(doctor_host.hub).status == "warn" and only(doctor_host.clock).status == "ok"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(doctor_host.hub).status == "ok"


def test_wandb_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_DISABLED", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    secret = "0123456789abcdef" * 3
    rc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(rc))
    needs = Needs(report_to=("wandb",))
    assert only(doctor_host.wandb, needs).status == "warn" and only(doctor_host.wandb).status == "ok"
    rc.write_text(f"machine api.wandb.ai login user password {secret}\n")
    rc.chmod(0o600)
    check = only(doctor_host.wandb, needs)
    assert check.status == "ok" and secret not in repr(check)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")  # the key is not this server's
    assert only(doctor_host.wandb, needs).status == "warn"
    rc.write_text(f"# wandb\nmachine wandb.example.org login user password {secret}\n")
    assert only(doctor_host.wandb, needs).status == "ok"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert only(doctor_host.wandb, needs).message == "off by WANDB_DISABLED"


def test_links_are_those_of_the_gpus_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES=3,2: torch's 0 and 1 are the driver's 3 and 2. Then cards behind a switch, cards on PCIe."""
    import torch

    class Properties:
        def __init__(self, index: int) -> None:
            self.uuid = ("33", "22")[index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    pairs: list[tuple[int | None, ...]] = [(1,) * 6, (0,) * 6, (3,) * 18, (2,) * 18]
    for links, want in ((pairs, "NV18"), ([(None,) * 4] * 4, "NV4")):
        cards = [Card(uuid=f"GPU-{index}{index}", links=links[index]) for index in range(4)]
        install(monkeypatch, FakeNvml(cards))
        assert only(doctor_gpu.links).message == f"peer access and NVLink between all 2 ({want})"
    install(monkeypatch, FakeNvml([Card(uuid=f"GPU-{index}{index}") for index in range(4)]))
    assert only(doctor_gpu.links).message == "peer access, but no NVLink between 0-1 SYS"


def test_memory_errors_of_a_card_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Properties:
        uuid = "22"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    install(monkeypatch, FakeNvml([Card(uuid="GPU-11"), Card(uuid="GPU-22", ecc_errors=3)]))
    assert doctor_gpu.uncorrected_errors(0) == 3
    install(monkeypatch, FakeNvml([Card(uuid="GPU-11", ecc_errors=3)]))
    assert doctor_gpu.uncorrected_errors(0) == 0  # the driver does not know torch's card


def test_the_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from anchor_cli.spec.spec import RunSpec

    spec = RunSpec(model_name_or_path="m", dataset_file_path="d", output_dir="~/runs")
    assert Needs.of(spec).output_dir == Path.home() / "runs"


def test_attention_kernel_is_really_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from anchor_cli.model import attention

    good = only(doctor_gpu.attention_kernel, Needs(attn_implementation="flash_attention_2"))
    assert good.status == "ok"

    def leaky(query, key, value, packing, scale):  # type: ignore[no-untyped-def]
        """Attends across the boundaries of texts: what a broken varlen kernel would do."""
        return kernels["sdpa"](query, key, value, replace(packing, lengths=(sum(packing.lengths),)), scale)

    kernels = dict(attention.KERNELS)
    name = good.message.split()[0].rstrip(",")
    monkeypatch.setitem(attention.KERNELS, name, leaky)
    assert only(doctor_gpu.attention_kernel).status == "fail"


def test_a_check_that_breaks_is_a_line() -> None:
    def broken(_: Needs):  # type: ignore[no-untyped-def]
        raise OSError("driver\nwent away")
        yield

    (check,) = doctor._guarded("driver", broken, Needs())
    assert check.status == "fail" and check.message == "the check itself failed: OSError: driver went away"


def test_a_hanging_and_a_dying_rank_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(doctor_parallel.WorkerFailed, match=r"rank \d ended with 1: KeyError: 'nonsense'"):
        doctor_parallel.run_workers("nonsense", 1, 60.0)
    monkeypatch.setattr(doctor_parallel.sys, "executable", "/bin/cat")  # cat -m …: ends with an error at once
    with pytest.raises(doctor_parallel.WorkerFailed, match="rank 0 ended with 1"):
        doctor_parallel.run_workers("all_reduce", 1, 5.0)
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(doctor_parallel.WorkerFailed, match=r"no answer in 0 s from rank 0"):
            doctor_parallel._wait([sleeper], [Path("/dev/null")], 0.2)  # type: ignore[list-item]
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2_fp32", "zero2_bf16"])
def test_gradients_of_this_deepspeed_are_right(config: str) -> None:
    check = only(doctor_parallel.gradients, Needs(deepspeed=config))
    assert check.status == "ok", check.message


@pytest.mark.slow
def test_gradients_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DeepSpeed's accumulation is made to say one micro-batch too few, as releases with issue 7718 amounted to."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'gradients' in sys.orig_argv:\n"
        "    from anchor_cli.train import deepspeed as e\n"
        "    build = e.build_engine\n"
        "    def broken(*a):\n"
        "        engine, optimizer = build(*a)\n"
        "        true = engine.gradient_accumulation_steps()\n"
        "        backward, calls = engine.backward, []\n"
        "        def skipping(loss):\n"
        "            calls.append(1)\n"
        "            return backward(loss * (0.0 if len(calls) == 1 else 1.0))\n"
        "        engine.backward = skipping\n"
        "        return engine, optimizer\n"
        "    e.build_engine = broken\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    check = only(doctor_parallel.gradients, Needs(deepspeed="zero2_fp32"))
    assert check.status == "fail" and "relative error" in check.message


def test_command_json_and_exit_code(tmp_path: Path) -> None:
    """On this very host, with a run's eyes: one JSON document on stdout; the exit code says whether anything failed."""
    done = subprocess.run(
        [sys.executable, "-m", "anchor_cli", "doctor", str(KURE), "--json"],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, env=_environment(),
    )  # fmt: skip
    found = json.loads(done.stdout)
    names = [check["name"] for check in found["checks"]]
    for name in ("python", "packages", "deepspeed", "compiler", "compiler locks", "attention kernel", "memory",
                 "shared memory", "file descriptors", "disk", "Hub", "clock", "W&B", "all-reduce"):  # fmt: skip
        assert name in names, name
    counts = {s: sum(check["status"] == s for check in found["checks"]) for s in ("ok", "warn", "fail")}
    assert found["counts"] == counts
    assert done.returncode == (1 if counts["fail"] else 0)
    disk = found["checks"][names.index("disk")]["message"]
    assert disk.endswith("GB free for output/stage_I/Qwen3-0.6B-q2d-d2q-WO-PEFT")
    reduced = found["checks"][names.index("all-reduce")]
    assert re.search(r"(gloo|nccl) over \d+ (processes|GPUs), [\d.]+ GB/s", reduced["message"]), reduced
    assert list(tmp_path.iterdir()) == []


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_lines() -> None:
    assert lines_of(Check("disk", "warn", "20 GB free", "clear it"), width=6) == [
        "warn  disk   20 GB free",
        "             → clear it",
    ]
    assert doctor.summary([Check("a", "ok", ""), Check("b", "warn", "", "x")])["verdict"] == "warn"
