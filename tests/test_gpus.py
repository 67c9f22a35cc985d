"""GPUs that are here and cannot be used are an error with its remedy; the CPU is taken only when it is asked for."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import Card, FakeNvml, install

from anchor_cli.base.errors import InputError
from anchor_cli.cli import run
from anchor_cli.evaluate.embedder import load_embedder
from anchor_cli.processes import gpus

ROOT = Path(__file__).parents[1]
TWO = [Card(uuid="GPU-1"), Card(uuid="GPU-2")]


class FakeCuda:
    """libcuda at its C interface: the CUDA release that the driver runs, and whether it starts."""

    def __init__(self, release: int, init: int = 0) -> None:
        self.release, self.init = release, init

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802
        number._obj.value = self.release
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = ctypes.c_char_p(b"CUDA_ERROR_SYSTEM_NOT_READY").value
        return 0


def host(monkeypatch: pytest.MonkeyPatch, driver: str, cuda: FakeCuda | None, build: tuple[str, str | None]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install(monkeypatch, FakeNvml(TWO, driver=driver))
    monkeypatch.setattr(gpus, "_libcuda", lambda: cuda)
    monkeypatch.setattr(gpus, "_torch_build", lambda: build)


@pytest.mark.parametrize(
    ("driver", "cuda", "build", "reason", "remedy"),
    [
        ("550.54.15", FakeCuda(12040), ("2.13.0+cu130", "13.0"),
         "driver 550.54.15 runs CUDA 12.4 at most, torch 2.13.0+cu130 is built for CUDA 13.0, which needs driver 580 "
         "or newer",
         "update the driver, or pip install torch --index-url https://download.pytorch.org/whl/cu126"),
        ("580.95.05", FakeCuda(13000), ("2.13.0+cpu", None), "torch 2.13.0+cpu is built without CUDA",
         "install a build with CUDA"),
        ("580.95.05", None, ("2.13.0+cu130", "13.0"), "the driver's libcuda.so.1 is not here", "compute capability"),
        ("580.95.05", FakeCuda(13000, 802), ("2.13.0+cu130", "13.0"),
         "the driver does not start: CUDA_ERROR_SYSTEM_NOT_READY (802)", "nvidia-smi and dmesg"),
    ],
)  # fmt: skip
def test_the_reason_names_driver_build_and_remedy(
    driver: str, cuda: FakeCuda | None, build: tuple[str, str | None], reason: str, remedy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    host(monkeypatch, driver, cuda, build)
    with pytest.raises(InputError) as caught:
        gpus.on_gpu()
    assert caught.value.message == f"2 GPUs (NVIDIA H100 NVL) cannot be used: {reason}"
    hint = caught.value.hint
    assert hint is not None
    assert hint.startswith(remedy.split(" (")[0]) or remedy in hint
    assert hint.endswith("; --device cpu computes on the CPU")


@pytest.mark.parametrize("release", [12080, 13000, 13010])
def test_a_driver_of_the_same_major_release_or_newer_is_no_problem(
    release: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    host(monkeypatch, "580.95.05", FakeCuda(release), ("2.12.0+cu129", "12.9"))
    assert gpus.cuda_problem() is None


def test_torch_build_is_that_of_torch() -> None:
    import torch

    assert gpus._torch_build() == (torch.__version__, torch.version.cuda)


def spec_file(folder: Path, model: Path) -> Path:
    raw = folder / "raw.jsonl"
    raw.write_text("\n".join(json.dumps({"query": f"q {i}", "document": "d " * 9}) for i in range(8)))
    keys = {"model_name_or_path": str(model), "dataset_file_path": str(raw), "precision": "float32", "max_steps": 1,
            "max_seq_length": 160, "global_batch_size": 4, "warmup_steps": 0,
            "output_dir": str(folder / "out")}  # fmt: skip
    path = folder / "spec.json"
    path.write_text(json.dumps(keys))
    return path


def test_every_command_says_it(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host(monkeypatch, "550.54.15", FakeCuda(12040), ("2.13.0", "13.0"))
    path = str(spec_file(tmp_path, small_model))
    reason = "2 GPUs (NVIDIA H100 NVL) cannot be used: driver 550.54.15 runs CUDA 12.4 at most"
    demo = ["demo", "--out", str(tmp_path / "out")]
    for command in (["train", path], ["train", path, "--device", "cuda"], ["plan", path, "--probe"], demo):
        assert run(command) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be used"):
        load_embedder(small_model)
    assert not (tmp_path / "out").exists()
    assert run(["plan", path, "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["GPUs"]["status"] == "fail" and reason in checks["GPUs"]["message"]
    from anchor_cli.doctor.doctor import check_host
    from anchor_cli.doctor.needs import Needs

    driver = next(check for check in check_host(Needs()) if check.name == "driver")
    assert driver.status == "fail" and reason in driver.message


def test_the_cpu_when_asked_for(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs to its end, in a process that inherits the choice."""
    host(monkeypatch, "550.54.15", FakeCuda(12040), ("2.13.0", "13.0"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    started: list[tuple[int, str]] = []
    monkeypatch.setattr("anchor_cli.processes.signals.StopFlag.install", lambda flag: None)
    monkeypatch.setattr(
        "anchor_cli.train.worker.run_rank", lambda *_: started.append((1, os.environ["CUDA_VISIBLE_DEVICES"]))
    )
    assert run(["train", str(spec_file(tmp_path, small_model)), "--device", "cpu"]) == 0
    assert started == [(1, "")]
    assert gpus.local_gpus() == [] and gpus.on_gpu() is False


def test_a_host_without_gpus_refuses_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if gpus.local_gpus():
        pytest.skip("this host has GPUs")
    assert run(["train", str(tmp_path / "x.json"), "--device", "cuda"]) == 2
    assert "there is no NVIDIA GPU here" in capsys.readouterr().err


SOURCE = """
#include <string.h>
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { *h = (void *)1; return 0; }
int nvmlDeviceGetName(void *h, char *t, unsigned n) { strcpy(t, "NVIDIA H100 NVL"); return 0; }
int nvmlDeviceGetUUID(void *h, char *t, unsigned n) { strcpy(t, "GPU-1"); return 0; }
int nvmlDeviceGetMemoryInfo(void *h, unsigned long long *m) { m[0] = 95830ull << 20; return 0; }
int nvmlSystemGetDriverVersion(char *t, unsigned n) { strcpy(t, "580.95.05"); return 0; }
"""


def test_a_real_process_with_a_drivers_library_and_a_cpu_build_of_torch(small_model: Path, tmp_path: Path) -> None:
    """A library that the dynamic linker finds, as on a GPU host; nothing of Python's is replaced."""
    import shutil

    import torch

    if torch.version.cuda is not None or shutil.which("cc") is None:
        pytest.skip("wants a CPU build of torch and a C compiler")
    (tmp_path / "nvml.c").write_text(SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    path = spec_file(tmp_path, small_model)
    command = [sys.executable, "-m", "anchor_cli", "train", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("anchor: 1 GPU (NVIDIA H100 NVL) cannot be used: torch")
    under = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    torchrun = subprocess.run(
        command, env=environment | under, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert torchrun.returncode == 2 and "cannot be used" in torchrun.stderr
